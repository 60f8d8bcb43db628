"""Item 1, starting: help, a settings mistake, seconds to the first optimizer step beside a bare script and TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Bench, Finished, alternate, answer, child, comparison, environment, finish, limit
from benchmarks.inputs import generated_rows, tiny_model

ROWS = 256


def measure(bench: Bench) -> dict[str, Any]:
    """The table of the item."""
    job = Job(bench)
    variants: dict[str, Callable[[], dict[str, float]]] = {
        "interpreter": lambda: times(finish([sys.executable, "-c", "import argparse"])),
        "help": lambda: times(finish([sys.executable, "train.py", "--help"])),
        "mistake": job.mistake,
        "bare": job.bare,
        "first": job.first,
        "again": job.again,
    }
    if bench.full:
        variants["trl"] = job.trl
    figures = alternate(variants, bench.rounds)
    seconds = {name: found["median"]["seconds"] for name, found in figures.items()}
    bare = "bare script, same imports and step"
    cpu = {name: found["median"]["cpu_seconds"] for name, found in figures.items() if name != "trl"}
    lines = [
        limit("--help", seconds["help"], "<= 0.2", unit="s"),
        limit("a settings mistake", seconds["mistake"], "<= 0.2", unit="s"),
        comparison("--help", seconds["help"], seconds["interpreter"], unit="s", against="python -c 'import argparse'"),
        comparison("to the first step", seconds["first"], seconds["bare"], unit="s", against=bare, target="<= 1.0"),
        comparison("labels cached", seconds["again"], seconds["bare"], unit="s", against=bare),
        comparison("CPU seconds to the end", cpu["first"], cpu["bare"], unit="s", against=f"{bare}; nothing saved"),
    ]
    if bench.full:
        lines.append(comparison("to the first step", seconds["first"], seconds["trl"], unit="s", against="trl sft"))
    return {"title": f"Start: {ROWS} rows, LoRA r 8, a tiny Qwen3", "comparisons": lines, "figures": figures}


def times(finished: Finished) -> dict[str, float]:
    """Seconds, and CPU seconds: what stays the same when others use the machine as well."""
    return {"seconds": finished.seconds, "cpu_seconds": finished.cpu_seconds, "to_the_end": finished.seconds}


class Job:
    """The tiny job as an env file, as a bare script and for TRL's command."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.folder = bench.folder("start")
        self.rows = generated_rows(self.folder / "rows.jsonl", ROWS)
        self.model = tiny_model(self.folder / "model", self.rows)

    def stage(self, **settings: object) -> Path:
        """An --env-dir of its own with stage1.env."""
        folder = self.bench.folder("stage")
        values = {
            "SFT_BASE_MODEL": self.model, "SFT_DATASET_ID": self.rows, "SFT_OUT_LORA_DIR": folder / "out",
            "SFT_LORA_R": 8, "SFT_VAL_RATIO": 0, "SFT_MAX_STEPS": 1, "SFT_LOGGING_STEPS": 1, "SFT_GRAD_ACCUM": 1,
            "SFT_PER_DEVICE_TRAIN_BS": 8, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        } | settings  # fmt: skip
        (folder / "stage1.env").write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))
        return folder

    def mistake(self) -> dict[str, float]:
        folder = self.stage(SFT_LORA_RR=8)
        command = [sys.executable, "train.py", "--stage", 1, "--env-dir", folder]
        return times(finish(command, expected=2))

    def train(self, cache: Path) -> dict[str, float]:
        """Seconds from the command to the record of the first step."""
        folder = self.stage()
        started = time.time()
        command = [sys.executable, "train.py", "--stage", 1, "--env-dir", folder]
        finished = finish(command, HF_DATASETS_CACHE=str(cache))
        lines = (folder / "out_stage1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        first = next(record for record in map(json.loads, lines) if "loss" in record)
        return times(finished) | {"seconds": first["time"] - started}

    def first(self) -> dict[str, float]:
        """Nothing prepared: a cache folder of its own."""
        return self.train(self.bench.folder("cache"))

    def again(self) -> dict[str, float]:
        """The same rows once more: their labels are in the cache from the second round's start on, made here first."""
        cache = self.folder / "cache"
        if not cache.exists():
            self.train(cache)
        return self.train(cache)

    def bare(self) -> dict[str, float]:
        started = time.time()
        finished = child("start", self.model, self.rows)
        return times(finished) | {"seconds": finished.figures()["time"] - started}

    def trl(self) -> dict[str, float]:
        """TRL's command, stopped once it has logged its first step."""
        command = [
            Path(sys.executable).with_name("trl"), "sft", "--model_name_or_path", self.model,
            "--dataset_name", "json", "--output_dir", self.bench.folder("trl"), "--use_peft", "true", "--lora_r", "8",
            "--max_steps", "1", "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no",
            "--learning_rate", "1e-4", "--dataset_config", self.folder,
        ]  # fmt: skip
        return {"seconds": seconds_until(command, "'loss'", folder=self.folder)}


def seconds_until(command: list[Any], text: str, *, folder: Path) -> float:
    """Seconds until the command has printed `text`; the command is then left to end by itself.

    Raises:
        RuntimeError: it ended without.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        [str(part) for part in command], env=environment(PYTHONUNBUFFERED="1"), cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as running:  # fmt: skip
        seen, found = "", None
        assert running.stdout is not None
        while block := os.read(running.stdout.fileno(), 65536):
            seen += block.decode(errors="replace")
            if found is None and text in seen:
                found = time.perf_counter() - started
    if found is None:
        raise RuntimeError(f"{command[0]} took no step:\n{seen[-3000:]}")
    return found


def bare_script(model: Path, rows: Path) -> None:
    """What anybody would write by hand: the same libraries, the rows rendered and encoded, one step of LoRA."""
    import mlflow  # noqa: F401
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = load_dataset("json", data_files=str(rows), split="train")["messages"]
    texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in messages]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(loaded, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=targets))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-4, fused=True)
    batch = torch.tensor([token for row in encoded[:8] for token in row])[None]
    positions = torch.cat([torch.arange(len(row)) for row in encoded[:8]])[None]
    adapted(input_ids=batch, position_ids=positions, labels=batch, use_cache=False).loss.backward()
    optimizer.step()
    answer({"time": time.time()})


if __name__ == "__main__":
    bare_script(Path(sys.argv[1]), Path(sys.argv[2]))

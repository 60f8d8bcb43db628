"""Item 3, training: our program beside a bare PyTorch loop over the same batches, and beside TRL padded and packed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from ctypes.util import find_library
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.common import Bench, alternate, answer, child, comparison, finish
from benchmarks.training_peers import TRL, bare_loop, train_trl
from sft.heap import tight_environment

TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
ROWS_PER_STEP, MICRO_BATCH, SEQUENCE = 8, 2, 1024
MEASURED = {
    "speed": ("tokens/s", "tokens/s"),
    "cpu_speed": ("tokens per CPU second", "tokens/s"),
    "peak_bytes": ("peak memory", "bytes"),
    "loss": ("loss per trained token", ""),
}
LABELS = {
    "bare": "bare loop, same batches, attention by rows, trained positions",
    "bare-bfloat16": "bare loop, the same in bfloat16",
    "bare-sdpa": "bare loop, transformers' attention and head",
    **{name: found.label for name, found in TRL.items()},
    "llamafactory": "LLaMA-Factory packed, float32",
    "trl-jemalloc": f"{TRL['trl'].label}, jemalloc",
}


def measure(bench: Bench) -> dict[str, Any]:
    """The table of the item."""
    job = TrainingJob(bench)
    variants: dict[str, Callable[[], dict[str, float]]] = {
        "ours": job.ours,
        "bare": job.bare,
        "ours-bfloat16": lambda: job.ours(SFT_DTYPE="bfloat16"),
        "bare-bfloat16": lambda: job.bare("rows", "bfloat16"),
    }
    if preloaded := jemalloc():
        variants["ours-bfloat16-jemalloc"] = lambda: job.ours(preloaded, SFT_DTYPE="bfloat16")
        variants["trl-jemalloc"] = lambda: job.trl("trl", preloaded)
    if bench.full:
        variants["bare-sdpa"] = lambda: job.bare("sdpa")
    peers = TRL if bench.full else ("trl",)
    variants |= {name: lambda name=name: job.trl(name) for name in peers}  # type: ignore[misc]
    if bench.llamafactory:
        variants["llamafactory"] = job.llamafactory
    figures = alternate(variants, bench.rounds)
    return {
        "title": f"Training: {'SmolLM2-135M' if bench.real else 'a random model of its shape'}, LoRA r 8 on all linear "
        f"layers, {ROWS_PER_STEP} rows a step, at most {SEQUENCE} tokens a row",
        "comparisons": lines(figures),
        "tables": [speeds(figures)],
        "figures": figures,
    }


def lines(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons. TRL trains in bfloat16 by default, so ours is held against it in both number formats."""
    middle = {name: found["median"] for name, found in figures.items()}
    packed = max(
        (name for name in middle if name.startswith("trl-packed")), key=lambda n: middle[n]["speed"], default=""
    )
    wanted = [
        ("speed", "ours", "bare", ">= 1.12"), ("speed", "ours", "bare-sdpa", ""), ("speed", "ours", "trl", ">= 2.2"),
        ("speed", "ours", packed, ">= 1.2"), ("speed", "ours-bfloat16", "bare-bfloat16", ">= 1.12"),
        ("speed", "ours-bfloat16", "trl", ">= 3"), ("speed", "ours-bfloat16-jemalloc", "trl-jemalloc", ">= 3"),
        ("speed", "ours", "llamafactory", ">= 1.6"),
        *[("cpu_speed", "ours", name, "") for name in ("bare", "trl", packed, "llamafactory")],
        ("cpu_speed", "ours-bfloat16", "bare-bfloat16", ""),
        *[("peak_bytes", "ours", name, "") for name in ("bare", "trl", packed)],
        ("peak_bytes", "ours-bfloat16", "trl", "<= 0.35"),
        ("peak_bytes", "ours-bfloat16-jemalloc", "trl-jemalloc", "<= 0.35"),
        ("loss", "ours", "bare", ""), ("loss", "ours", "trl", ""), ("loss", "ours-bfloat16", "trl", ""),
    ]  # fmt: skip
    return [
        comparison(
            MEASURED[figure][0] + ours.removeprefix("ours").replace("-", ", "),
            middle[ours][figure], middle[rival][figure],
            unit=MEASURED[figure][1], against=LABELS[rival], target=target,
        )
        for figure, ours, rival, target in wanted
        if {ours, rival} <= middle.keys()
    ]  # fmt: skip


def speeds(figures: dict[str, Any]) -> dict[str, Any]:
    """All variants, with the spread of their speed over the rounds."""
    rows = []
    for name, found in figures.items():
        middle = found["median"]
        between = f"{found['lowest']['speed']:.0f} to {found['highest']['speed']:.0f}"
        size = f"{middle['peak_bytes'] / 1e9:.2f} GB"
        cpu = f"{middle['cpu_speed']:.0f}"
        loss = f"{middle['loss']:.4f}" if "loss" in middle else ""
        rows.append([LABELS.get(name, name), f"{middle['speed']:.0f}", between, cpu, size, loss])
    return {
        "title": "All variants",
        "head": ["variant", "tokens/s", "rounds", "per CPU second", "peak memory", "loss"],
        "rows": rows,
    }


class TrainingJob:
    """The same rows for everybody: a stage of ours, its batches for the loop, its rows in its order for TRL.

    Tokens are those of the rows, padding not counted; the first step is not timed.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.steps = 6 if bench.full else 3
        self.folder = bench.folder("training")
        lines = bench.rows.read_text(encoding="utf-8").splitlines()
        self.rows = self.folder / "rows.jsonl"
        self.rows.write_text("\n".join(lines[: ROWS_PER_STEP * self.steps]) + "\n", encoding="utf-8")
        self.cache = str(self.folder / "cache")
        child("training", "prepare", self.stage(), HF_DATASETS_CACHE=self.cache)

    def stage(self, **settings: object) -> Path:
        folder = self.bench.folder("stage")
        # The general questions are answered after training; the rivals answer none.
        values = {
            "SFT_BASE_MODEL": self.bench.model, "SFT_DATASET_ID": self.rows, "SFT_OUT_LORA_DIR": folder / "out",
            "SFT_LORA_R": 8, "SFT_LORA_ALPHA": 16, "SFT_LORA_TARGET_MODULES": TARGETS, "SFT_MAX_SEQ_LEN": SEQUENCE,
            "SFT_OVERLONG": "truncate", "SFT_VAL_RATIO": 0, "SFT_PER_DEVICE_TRAIN_BS": MICRO_BATCH, "SFT_EPOCHS": 1,
            "SFT_GRAD_ACCUM": ROWS_PER_STEP // MICRO_BATCH, "SFT_LOGGING_STEPS": 1, "SFT_LR_SCHEDULER": "constant",
            "SFT_LR": 1e-4, "SFT_WARMUP_RATIO": 0, "SFT_GENERAL_EVAL": 0,
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        } | settings  # fmt: skip
        (folder / "stage1.env").write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))
        return folder

    def ours(self, variables: Mapping[str, str] = MappingProxyType({}), **settings: object) -> dict[str, float]:
        """The program as people run it, every step logged and tracked; the first step is not timed."""
        folder = self.stage(**settings)
        tight = tight_environment({}) or {}  # train.py begins anew with it
        finished = child("training", "ours", folder, HF_DATASETS_CACHE=self.cache, **tight, **variables)
        steps = finished.figures()["steps"]
        assert len(steps) == self.steps, steps
        tokens, seconds, cpu_seconds = (b - a for a, b in zip(steps[0][:3], steps[-1][:3], strict=True))
        weights = json.loads((self.folder / "trained.json").read_text())
        loss = sum(step[3] * weight for step, weight in zip(steps, weights, strict=True)) / sum(weights)
        speeds = {"speed": tokens / seconds, "cpu_speed": tokens / cpu_seconds}
        return speeds | {"peak_bytes": finished.peak_bytes, "loss": loss}

    def bare(self, attention: str = "rows", dtype: str = "float32") -> dict[str, float]:
        return weighed("training", "bare", self.bench.model, self.folder, attention, dtype)

    def trl(self, name: str, variables: Mapping[str, str] = MappingProxyType({})) -> dict[str, float]:
        return weighed("training", name, self.bench.model, self.folder, **variables)

    def llamafactory(self) -> dict[str, float]:
        folder = self.bench.folder("llamafactory")
        command = [self.bench.llamafactory, "-m", "benchmarks.llamafactory", self.bench.model, self.rows, folder]
        finished = finish([*command, TARGETS, SEQUENCE], DISABLE_VERSION_CHECK="1", HF_DATASETS_CACHE=self.cache)
        return finished.figures() | {"peak_bytes": finished.peak_bytes}


def jemalloc() -> dict[str, str]:
    """Preloads the allocator that keeps fewer freed blocks than glibc's; {} where libjemalloc2 is not installed."""
    library = find_library("jemalloc")
    return {"LD_PRELOAD": library} if library else {}


def weighed(*command: Any, **variables: str) -> dict[str, float]:
    finished = child(*command, **variables)
    return finished.figures() | {"peak_bytes": finished.peak_bytes}


def prepare(env_dir: Path) -> None:
    """Writes our run's batches (batches.pt), its rows in order (ordered.jsonl) and its trained tokens per step."""
    import torch
    from transformers import AutoTokenizer

    from sft.data.mixture import prepare_mix
    from sft.settings import load_settings
    from sft.training.batches import EpochBatches, Order, TrainingRows, join_rows

    settings = load_settings(1, env_dir=env_dir)
    mix = prepare_mix(settings, AutoTokenizer.from_pretrained(settings.base_model))
    rows = TrainingRows(mix.train)
    keys = list(EpochBatches(Order(len(rows), settings.seed), batch_size=settings.per_device_train_bs))
    batches = [join_rows([rows[key] for key in batch]) for batch in keys]
    folder = Path(settings.dataset_id or "").parent
    torch.save(batches, folder / "batches.pt")
    ordered = [rows.row(0, position) for batch in keys for position in batch]
    with (folder / "ordered.jsonl").open("w", encoding="utf-8") as file:
        for row in ordered:
            file.write(json.dumps({name: row[name].tolist() for name in ("input_ids", "labels")}) + "\n")
    per_step = settings.grad_accum
    counts = [batch["num_items"] for batch in batches]
    trained = [sum(counts[start : start + per_step]) for start in range(0, len(counts), per_step)]
    (folder / "trained.json").write_text(json.dumps(trained))


def run_ours(env_dir: Path) -> dict[str, Any]:
    """train.py with a clock at its logs: (tokens so far, seconds, CPU seconds, loss) of every step."""
    import train
    from sft import cli
    from sft.training.progress import Metrics

    steps: list[tuple[float, ...]] = []
    log = Metrics.on_log

    def clocked(self: Any, args: Any, state: Any, control: Any, logs: dict[str, float], **keywords: Any) -> None:
        log(self, args, state, control, logs=logs, **keywords)
        if "tokens" in logs:
            steps.append((logs["tokens"], time.perf_counter(), time.process_time(), logs["loss"]))

    Metrics.on_log = clocked  # type: ignore[method-assign]
    assert cli.command_line(train.main, ["--stage", "1", "--env-dir", str(env_dir)]) == 0
    return {"steps": steps}


def main(name: str, *rest: str) -> None:
    if name == "prepare":
        prepare(Path(rest[0]))
        return
    if name == "ours":
        answer(run_ours(Path(rest[0])))
        return
    started = time.perf_counter()
    model, folder = Path(rest[0]), Path(rest[1])
    accumulation = ROWS_PER_STEP // MICRO_BATCH
    if name == "bare":
        found = bare_loop(model, folder, rest[2], rest[3], accumulation=accumulation, targets=TARGETS.split(","))
    else:
        found = train_trl(model, folder, TRL[name], rows_per_step=ROWS_PER_STEP, targets=TARGETS.split(","))
    answer(found | {"whole_seconds": time.perf_counter() - started})


if __name__ == "__main__":
    main(*sys.argv[1:])

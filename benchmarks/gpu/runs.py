"""Items ladder, engines and shortage: runs of train.py, stopped and killed, under every launch file, too large."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common import ROOT
from benchmarks.gpu.job import Job
from benchmarks.gpu.shapes import QWEN, shape
from benchmarks.gpu.steps import settings_of, trainer_of
from sft.errors import RunFailed
from sft.planning.need import raise_shortage
from sft.programs.benchmark import random_model


class Runs:
    """Runs of train.py at the same time, each with an output of its own; a demo model leaves a GPU nearly idle."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.started: dict[str, subprocess.Popen] = {}

    def start(
        self, name: str, *options: object, stage: object = 1, launch: tuple[str, ...] = (), **settings: Any
    ) -> None:
        common = {
            "SFT_OUT_LORA_DIR": self.job.folder / name, "SFT_GENERAL_EVAL": 0,
            "SFT_MAX_STEPS": self.steps, "SFT_EVAL_STEPS": 10**6, "SFT_SAVE_STEPS": 1, "SFT_LOGGING_STEPS": 1,
            "SFT_GEN_EVAL_SAMPLES": 2, "SFT_GEN_MAX_NEW_TOKENS": 8, "SFT_PER_DEVICE_TRAIN_BS": 4,
            "SFT_REPORT_TO": "mlflow" if find_spec("mlflow") else "none",
        }  # fmt: skip
        sets = [part for key, value in (common | settings).items() for part in ("--set", f"{key}={value}")]
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{self.job.folder / name}.db"}
        command = ["--stage", stage, "--env-dir", ROOT, *sets]
        self.started[name] = self.job.start(*command, launch=launch, log=f"{name}.log", **store)

    @property
    def steps(self) -> int:
        return self.job.size(20, 3)

    def folder(self, name: str, stage: int = 1) -> Path:
        return self.job.folder / f"{name}_stage{stage}"

    def end(self, name: str) -> int:
        return self.started[name].wait()

    def said(self, name: str) -> str:
        return (self.job.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def losses(self, name: str, stage: int = 1) -> list[float]:
        lines = (self.folder(name, stage) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    def ended_well(self, name: str) -> bool:
        code = self.end(name)
        self.job.check(f"{name}: exit code", code, "<= 0")
        if code:
            self.job.skip(f"{name}: the rest", self.said(name).strip()[-300:])
        return code == 0

    def until_step(self, name: str, step: int) -> None:
        """Waits until a checkpoint of that step is there, or the run has ended."""
        while self.started[name].poll() is None and not (self.folder(name) / f"checkpoint-{step}").exists():
            time.sleep(0.05)


def ladder(job: Job) -> None:
    """The embedded ladder, three stages: against float32, the merge's KL, stopped and killed runs that go on."""
    runs = Runs(job)
    stages = job.size("all", 1)
    runs.start("ladder", stage=stages)
    runs.start("float32", SFT_DTYPE="float32")
    for name in ("stopped", "killed"):
        runs.start(name)
    for name, number in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        runs.until_step(name, 1)
        if runs.started[name].poll() is None:
            runs.started[name].send_signal(number)
        # 128 + 15, or -9: one that had ended before it could be stopped shows nothing.
        job.check(f"{name}: exit code", abs(runs.end(name)), ">= 9", of_gpu=True)
        runs.start(name)
    if not runs.ended_well("ladder") or not runs.ended_well("float32"):
        return
    ours, exact = runs.losses("ladder"), runs.losses("float32")
    worst = max(abs(a - b) / b for a, b in zip(ours, exact, strict=True))
    job.check("loss beside float32", worst, job.size("<= 0.05", "<= 0.00001"))
    for name in ("stopped", "killed"):
        if runs.ended_well(name):
            found = runs.losses(name)
            job.check(f"{name} and resumed: loss beside one go", abs(found[-1] - ours[-1]) / ours[-1], "<= 0.005")
    for stage in job.size((2, 3), ()):
        merge = json.loads((runs.folder("ladder", stage) / "stage.json").read_text(encoding="utf-8"))["merge"]
        job.check(f"stage {stage}: KL of the merged base", merge["kl"] or 0.0, "<= 0.05")
    metrics = (runs.folder("ladder") / "metrics.jsonl").read_text(encoding="utf-8")
    job.check("answers are scored", float("gen_score" in metrics), ">= 1")
    if not find_spec("mlflow"):
        job.skip("GPU metrics in MLflow", "mlflow missing")
    elif not job.rehearse:
        job.check("GPU metrics in MLflow", gpu_metrics(job.folder / "ladder.db"), ">= 1")


def gpu_metrics(database: Path) -> int:
    """Kinds of figures about the GPU in an MLflow store."""
    import sqlite3

    with sqlite3.connect(database) as store:
        return store.execute("select count(distinct key) from metrics where key like 'system/gpu%'").fetchone()[0]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launched(engine: str, processes: int) -> tuple[str, ...]:
    file = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    port = ("--main_process_port", str(free_port()))
    return ("-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(processes), *port)


def engines(job: Job) -> None:
    """Every launch file with one process, and with `--gpus 2` with two: loss beside a run alone, saved, gone on."""
    runs = Runs(job)
    four = {"SFT_MAX_STEPS": job.size(4, 2), "SFT_GRAD_ACCUM": 2}
    runs.start("alone", **four)
    kinds: dict[str, tuple[str, int, dict[str, Any]]] = {
        name: (name, 1, {}) for name in job.size(("ddp", "zero2", "zero3", "fsdp"), ("ddp",))
    }
    if not job.rehearse:
        kinds["zero2 in 4 bits"] = ("zero2", 1, {"SFT_LOAD_IN_4BIT": 1})
    if job.gpus > 1:
        kinds |= {f"{name} on two": (name, 2, {"SFT_GRAD_ACCUM": 1}) for name in ("ddp", "zero2", "zero3", "fsdp")}
    for name, (engine, processes, values) in list(kinds.items()):
        if (engine.startswith("zero") and job.lacks(name, "deepspeed")) or (
            "SFT_LOAD_IN_4BIT" in values and job.lacks(name, "bitsandbytes")
        ):
            del kinds[name]
        else:
            runs.start(name.replace(" ", "_"), launch=launched(engine, processes), **(four | values))
    if not runs.ended_well("alone"):
        return
    alone = runs.losses("alone")
    for name, (engine, processes, values) in kinds.items():
        run = name.replace(" ", "_")
        if runs.ended_well(run):
            worst = max(abs(a - b) / b for a, b in zip(runs.losses(run), alone, strict=True))
            # In 4 bits it is another model: only that it trains.
            job.check(
                f"{name}: loss beside a run alone", worst, "<= 0.5" if "SFT_LOAD_IN_4BIT" in values else "<= 0.005"
            )
            weights = load_file(runs.folder(run) / "adapter_model.safetensors")
            job.check(
                f"{name}: saved adapter is finite", float(all(w.isfinite().all() for w in weights.values())), ">= 1"
            )
        if name == "ddp" and job.has_time("ddp: gone on", 15):
            go_on(job, runs, engine, processes, four)
    if job.gpus > 1 and job.has_time("a killed rank", 25):
        killed_rank(job, runs)


def go_on(job: Job, runs: Runs, engine: str, processes: int, settings: dict[str, Any]) -> None:
    """More steps from the checkpoint, under the same launcher."""
    shutil.rmtree(runs.folder("ddp"), ignore_errors=True)
    runs.start("ddp", launch=launched(engine, processes), **settings)
    runs.until_step("ddp", 1)
    runs.started["ddp"].terminate()
    job.figure("ddp, stopped: exit code", runs.end("ddp"))
    runs.start("ddp", launch=launched(engine, processes), **settings)
    if runs.ended_well("ddp"):
        job.check(
            "ddp, gone on: loss beside one go", abs(runs.losses("ddp")[-1] / runs.losses("alone")[-1] - 1), "<= 0.005"
        )


def killed_rank(job: Job, runs: Runs) -> None:
    """kill -9 of one of two ranks: the launcher ends the other and itself."""
    runs.start("killed_rank", launch=launched("ddp", 2), SFT_MAX_STEPS=2000)
    runs.until_step("killed_rank", 1)
    children = Path(f"/proc/{runs.started['killed_rank'].pid}/task/{runs.started['killed_rank'].pid}/children")
    ranks = [int(each) for each in children.read_text(encoding="ascii").split()]
    os.kill(ranks[-1], signal.SIGKILL)
    start = time.monotonic()
    runs.end("killed_rank")
    job.check("killed rank: all ended after", time.monotonic() - start, "<= 60", "s")


def shortage(job: Job) -> None:
    """A row that can't fit: one message with the estimate, the peak and what to change."""
    length = job.size(200_000, 16)
    settings = settings_of(job, QWEN)
    model = random_model(shape(job, QWEN, job.size(None, 2)), job.dtype)
    trainer = trainer_of(job, model, settings, length=length)
    if job.rehearse:
        trainer.compute_loss = lambda *arguments, **keywords: torch.empty(2**60)  # type: ignore[method-assign]
    message = ""
    try:
        trainer.train()
    except (RuntimeError, MemoryError) as error:
        try:
            rows = trainer.train_dataset.rows
            raise_shortage(error, model.config, settings, rows, checkpointing=False)
        except RunFailed as failed:
            message = str(failed)
    job.check("one message with the estimate", float("GiB were estimated" in message), ">= 1")
    job.check("and the peak", float("at the peak" in message), ">= 1", of_gpu=True)
    job.check("and what to change", float("SFT_" in message), ">= 1")

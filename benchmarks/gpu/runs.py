"""Items ladder, engines and shortage: runs of train.py, stopped and killed, under every launch file, too large."""

from __future__ import annotations

import json
import math
import os
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

    def trains(self, name: str) -> bool:
        """Whether the run goes on and has no checkpoint yet."""
        return self.started[name].poll() is None and not (self.folder(name) / "checkpoint-1").exists()

    def cut_off(self, *cuts: tuple[str, int]) -> None:
        """Each run gets its signal as soon as its first checkpoint is there, and must not have ended by then."""
        waiting = dict(cuts)
        while waiting:
            for name in [name for name in waiting if not self.trains(name)]:
                self.started[name].send_signal(waiting.pop(name))
            time.sleep(0.02)
        for name, _ in cuts:
            # 128 + 15, -9, or the launcher's 1; a run that had ended before its signal shows nothing.
            self.job.check(f"{name}: exit code", abs(self.end(name)), ">= 1")


# A stop must arrive while the run still has something to do, and a demo model's steps take milliseconds.
SLOW = {"SFT_GEN_EVAL_SAMPLES": 8, "SFT_GEN_MAX_NEW_TOKENS": 48}


def ladder(job: Job) -> None:
    """The embedded ladder, three stages: against float32, the merge's KL, stopped and killed runs that go on."""
    runs = Runs(job)
    stages = job.size((1, 2, 3), (1, 2))
    cut: dict[str, Any] = SLOW | {"SFT_EVAL_STEPS": job.size(5, 1)}
    runs.start("ladder", stage=f"1-{stages[-1]}")
    runs.start("float32", SFT_DTYPE="float32")
    for name in ("stopped", "killed"):
        runs.start(name, **cut)
    runs.cut_off(("stopped", signal.SIGTERM), ("killed", signal.SIGKILL))
    for name in ("stopped", "killed"):
        runs.start(name, **cut)
    if not runs.ended_well("ladder") or not runs.ended_well("float32"):
        return
    ours, exact = runs.losses("ladder"), runs.losses("float32")
    worst = max(abs(a - b) / b for a, b in zip(ours, exact, strict=True))
    job.check("loss beside float32", worst, job.size("<= 0.05", "<= 0.00001"))
    for name in ("stopped", "killed"):
        if runs.ended_well(name):
            found = runs.losses(name)
            job.check(f"{name} and resumed: loss beside one go", abs(found[-1] - ours[-1]) / ours[-1], "<= 0.005")
    for stage in stages[1:]:
        merge = json.loads((runs.folder("ladder", stage) / "stage.json").read_text(encoding="utf-8"))["merge"]
        found_kl = math.nan if merge["kl"] is None else merge["kl"]
        job.check(f"stage {stage}: KL of the merged base", found_kl, "<= 0.05")
    metrics = (runs.folder("ladder") / "metrics.jsonl").read_text(encoding="utf-8")
    job.check("answers are scored", float("gen_score" in metrics), ">= 1")
    if not find_spec("mlflow"):
        job.skip("GPU metrics in MLflow", "mlflow missing")
    else:
        job.check("GPU metrics in MLflow", gpu_metrics(job.folder / "ladder.db"), ">= 1", of_gpu=True)


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


Kind = tuple[str, int, dict[str, Any]]
ENGINES = ("ddp", "zero2", "zero3", "fsdp")


def engine_kinds(job: Job) -> dict[str, Kind]:
    """Launch file, processes and settings of every run; without the packages of some they are skipped."""
    all_of_them = job.gpus > 1 or not job.rehearse  # the suite's rehearsal, with one process, has no time for them
    kinds: dict[str, Kind] = {name: (name, 1, {}) for name in (ENGINES if all_of_them else ENGINES[:1])}
    if all_of_them:
        kinds["zero2 in 4 bits"] = ("zero2", 1, {"SFT_LOAD_IN_4BIT": 1})
    if job.gpus > 1:
        kinds |= {f"{name} on two": (name, 2, {"SFT_GRAD_ACCUM": 1}) for name in ENGINES}
    return {
        name: kind
        for name, kind in kinds.items()
        if not (kind[0].startswith("zero") and job.lacks(name, "deepspeed"))
        and not ("SFT_LOAD_IN_4BIT" in kind[2] and job.lacks(name, "bitsandbytes"))
    }


def engines(job: Job) -> None:
    """Every launch file with one process, and with `--gpus 2` with two: loss beside a run alone, saved, gone on; then
    with two what they gain, and one of them killed."""
    runs, kinds = Runs(job), engine_kinds(job)
    four = {"SFT_MAX_STEPS": job.size(4, 3), "SFT_GRAD_ACCUM": 2}
    runs.start("alone", **four)
    for name, (engine, processes, values) in kinds.items():
        runs.start(spelt(name), launch=launched(engine, processes), **(four | values))
    if not runs.ended_well("alone"):
        return
    for name, (_, _, values) in kinds.items():
        if runs.ended_well(spelt(name)):
            same_as_alone(job, runs, name, quantised="SFT_LOAD_IN_4BIT" in values)
    plain = {name: kind for name, kind in kinds.items() if "SFT_LOAD_IN_4BIT" not in kind[2]}
    if job.has_time("gone on", 20):
        go_on(job, runs, plain, four)
    if job.gpus > 1 and job.has_time("two beside one", 60):
        scaling(job)
    if job.gpus > 1 and job.has_time("a killed rank", 25):
        killed_rank(job, runs)


def spelt(name: str) -> str:
    return name.replace(" ", "_")


def same_as_alone(job: Job, runs: Runs, name: str, *, quantised: bool) -> None:
    """Losses of a run beside those of one process alone, and what it saved."""
    worst = max(abs(a - b) / b for a, b in zip(runs.losses(spelt(name)), runs.losses("alone"), strict=True))
    # In 4 bits it is another model: only that it trains.
    job.check(f"{name}: loss beside a run alone", worst, "<= 0.5" if quantised else "<= 0.005")
    weights = load_file(runs.folder(spelt(name)) / "adapter_model.safetensors")
    finite = all(weight.isfinite().all() for weight in weights.values())
    job.check(f"{name}: saved adapter is finite", float(finite), ">= 1")


def go_on(job: Job, runs: Runs, kinds: dict[str, Kind], settings: dict[str, Any]) -> None:
    """The same runs once more, stopped at their first checkpoint and gone on from it under the same launcher."""
    again = {f"{spelt(name)}_again": kind for name, kind in kinds.items()}

    def start() -> None:
        for name, (engine, processes, values) in again.items():
            slow = settings | values | SLOW | {"SFT_EVAL_STEPS": 1}
            runs.start(name, launch=launched(engine, processes), **slow)

    start()
    runs.cut_off(*((name, signal.SIGTERM) for name in again))
    start()
    for name in again:
        if runs.ended_well(name):
            apart = abs(runs.losses(name)[-1] / runs.losses("alone")[-1] - 1)
            job.check(f"{name}: loss beside one go", apart, "<= 0.005")


def scaling(job: Job) -> None:
    """Tokens/s of two processes beside those of one, plain data parallel, by the program that people measure with."""
    program = ROOT / "official_content" / "benchmark.py"
    work = ("--seq-len", job.size(512, 16), "--micro-batch", job.size(4, 2), "--warmup", 2, "--steps", job.size(6, 2))
    speeds = []
    for processes in (1, 2):
        log = f"scaling_{processes}.log"
        command = (job.size(QWEN, "tiny"), *work, "--results", job.folder / f"results_{processes}")
        started = job.start(*command, launch=launched("ddp", processes), log=log, program=program)
        if code := started.wait():
            said = (job.folder / log).read_text(encoding="utf-8", errors="replace")
            job.check(f"{processes} processes: exit code", code, "<= 0")
            job.skip("two beside one", said.strip()[-300:])
            return
        lines = (job.folder / log).read_text(encoding="utf-8", errors="replace").splitlines()
        speeds.append(json.loads([line for line in lines if line.startswith("{")][-1])["tokens_per_second"])
        job.figure(f"{processes} processes", speeds[-1], "tokens/s")
    job.check("two beside one: tokens/s", speeds[1] / speeds[0], ">= 1.7", of_gpu=True)


def killed_rank(job: Job, runs: Runs) -> None:
    """kill -9 of one of two ranks: the launcher ends the other and itself."""
    runs.start("killed_rank", launch=launched("ddp", 2), SFT_MAX_STEPS=2000, SFT_SAVE_TOTAL_LIMIT=1)
    while runs.trains("killed_rank"):
        time.sleep(0.05)
    launcher = runs.started["killed_rank"].pid
    ranks = [int(each) for each in Path(f"/proc/{launcher}/task/{launcher}/children").read_text("ascii").split()]
    os.kill(ranks[-1], signal.SIGKILL)
    start = time.monotonic()
    code = runs.end("killed_rank")
    job.check("killed rank: all ended after", time.monotonic() - start, "<= 60", "s")
    job.check("killed rank: exit code", abs(code), ">= 1")
    job.check("killed rank: ranks left", sum(Path(f"/proc/{rank}").exists() for rank in ranks), "<= 0")


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

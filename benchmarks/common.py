"""What all benchmarks share: children that are timed and weighed, alternation, comparisons, conditions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "mlflow")
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Bench:
    """How much is measured, and on what. `real` is False where the model is a random one of the same shape.

    `llamafactory` is the Python of an environment that has it, None where it's not among the rivals.
    """

    full: bool
    rounds: int
    scratch: Path
    model: Path
    rows: Path
    real: bool
    llamafactory: Path | None = None

    def folder(self, name: str) -> Path:
        """An empty folder that was not there before."""
        number = sum(1 for _ in self.scratch.glob(f"{name}-*"))
        path = self.scratch / f"{name}-{number}"
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True)
class Finished:
    """A child that ended well: wall and CPU seconds, its largest resident size, what it printed.

    Linux counts the parent's size at the fork as the child's, so a parent that measures memory must be small.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str

    def figures(self) -> dict[str, Any]:
        """The JSON of the last line of output."""
        return json.loads(self.output.strip().splitlines()[-1])


def environment(**more: str) -> dict[str, str]:
    """The environment of every child: the same threads for all, no hub, no progress bars, no settings from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SFT_", "MLFLOW_"))}
    threads = os.environ.get("OMP_NUM_THREADS", str(cores()))
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return kept | fixed | {"PYTHONPATH": str(ROOT)} | more


def cores() -> int:
    return len(os.sched_getaffinity(0))


def finish(command: Sequence[object], *, expected: int = 0, cwd: Path = ROOT, **variables: str) -> Finished:
    """Runs the command to its end.

    Raises:
        RuntimeError: it ends with another code than `expected`; holds the end of what it printed.
    """
    started = time.perf_counter()
    child = subprocess.Popen(
        [str(part) for part in command],
        env=environment(**variables),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != expected:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {child.returncode}:\n{output[-3000:]}")
    return Finished(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output)


def child(module: str, *arguments: object, **variables: str) -> Finished:
    """`python -m benchmarks.<module> arguments`."""
    return finish([sys.executable, "-m", f"benchmarks.{module}", *arguments], **variables)


def answer(figures: Mapping[str, Any]) -> None:
    """What a child reports, as its last line."""
    print(json.dumps(figures), flush=True)


def resident_bytes() -> int:
    """Resident size of this process now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The largest resident size of this process since it began to run its program."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def alternate(variants: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, dict[str, Any]]:
    """Every variant once per round, one after the other: what else the machine does strikes all alike.

    Returns, per variant, `median`, `lowest` and `highest` of each figure.
    """
    seen: dict[str, list[Figures]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, measure in variants.items():
            progress(f"round {turn + 1}/{rounds}: {name}")
            seen[name].append(measure())
    return {name: spread(runs) for name, runs in seen.items()}


def spread(runs: Sequence[Figures]) -> dict[str, dict[str, float]]:
    columns = {name: [run[name] for run in runs if name in run] for name in runs[0]}
    return {
        "median": {name: statistics.median(column) for name, column in columns.items()},
        "lowest": {name: min(column) for name, column in columns.items()},
        "highest": {name: max(column) for name, column in columns.items()},
    }


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def comparison(
    what: str, ours: float, rival: float, *, unit: str, against: str, target: str = "", ratio: float | None = None
) -> dict[str, Any]:
    """One line of a table. `target` is a bound on the ratio such as `>= 0.97`; `ratio` is ours over the rival's."""
    ratio = ours / rival if ratio is None else ratio
    line = {"what": what, "ratio": ratio, "ours": ours, "rival": rival, "unit": unit, "against": against}
    return line | ({"target": target, "met": meets(ratio, target)} if target else {})


def limit(what: str, ours: float, target: str, *, unit: str) -> dict[str, Any]:
    """A line that is held against a number instead of a rival."""
    return {"what": what, "ours": ours, "unit": unit, "target": f"{target} {unit}", "met": meets(ours, target)}


def meets(value: float, target: str) -> bool:
    sign, bound = target.split()
    return value >= float(bound) if sign == ">=" else value <= float(bound)


def load_average() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def conditions(bench: Bench) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "processor": processor(),
        "cores": cores(),
        "threads": environment()["OMP_NUM_THREADS"],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in LIBRARIES},
        "load_average_before": load_average(),
        "model": "SmolLM2-135M-Instruct" if bench.real else "random weights of SmolLM2-135M's shape",
        "rows": bench.rows.name,
        "rounds": bench.rounds,
        "form": "full" if bench.full else "short",
    }


def processor() -> str:
    """The processor's name with what decides about matrix products, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    named = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in named.items()}
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({', '.join(known)})"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

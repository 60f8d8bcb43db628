"""What an item of the acceptance run measures with: figures, thresholds, time, peaks; written down as they come."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, environment, meets

TRAIN = ROOT / "train.py"


@dataclass
class Job:
    """One item in its process. `until`: the end of its time box, by time.monotonic()."""

    name: str
    folder: Path
    until: float
    rehearse: bool = False
    gpus: int = 1
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.rehearse else torch.bfloat16

    def size(self, real: Any, tiny: Any) -> Any:
        """The second in a rehearsal."""
        return tiny if self.rehearse else real

    def figure(self, what: str, value: float, unit: str = "") -> None:
        self._add({"what": what, "value": value, "unit": unit})

    def check(self, what: str, value: float, target: str, unit: str = "", *, of_gpu: bool = False) -> None:
        """A figure held against a bound such as "<= 1.2"; `of_gpu`: a rehearsal has it, but does not judge it."""
        judged = not (of_gpu and self.rehearse)
        met = not math.isnan(value) and meets(value, target)
        self._add({"what": what, "value": value, "unit": unit, "target": target, "met": met if judged else None})

    def skip(self, what: str, why: str) -> None:
        """A part that was not measured: it has not passed."""
        self._add({"what": what, "skipped": why})

    def lacks(self, what: str, package: str) -> bool:
        """Whether a package that a part needs is missing; the part is then skipped."""
        missing = find_spec(package) is None
        if missing:
            self.skip(what, f"{package} missing")
        return missing

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds of the box are left; else the part is skipped."""
        enough = self.rehearse or time.monotonic() + seconds < self.until
        if not enough:
            self.skip(what, "no time left")
        return enough

    def _add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        # Aside and renamed: a process that is cut off leaves what it has found so far.
        (self.folder / "found.tmp").write_text(json.dumps(self.lines), encoding="utf-8")
        (self.folder / "found.tmp").replace(self.folder / "found.json")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any], times: int = 5) -> float:
        """The fastest of so many calls, after one to warm up."""
        call()
        taken = []
        for _ in range(1 if self.rehearse else times):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            taken.append(1000 * (time.perf_counter() - start))
        return min(taken)

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes of the GPU that the call took beyond what was there; 0 on a CPU."""
        if self.device.type != "cuda":
            call()
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def forget(self) -> None:
        """What is no longer referred to is given back."""
        import gc

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def start(
        self, *arguments: object, launch: Sequence[str] = (), log: str, program: Path = TRAIN, **variables: str
    ) -> subprocess.Popen:
        """A program as a person starts it, or under a launcher; what it prints goes to `log` in the folder."""
        command = [sys.executable, *launch, str(program), *map(str, arguments)]
        with (self.folder / log).open("w", encoding="utf-8") as file:
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.rehearse else {}
            there = environment(**hidden, **variables)
            # Other packages may lie beside the checkout, and a run takes what this process has.
            there["PYTHONPATH"] = ":".join(filter(None, [str(ROOT), *sys.path]))
            return subprocess.Popen(command, cwd=ROOT, env=there, stdout=file, stderr=subprocess.STDOUT)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))

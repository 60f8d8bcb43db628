"""`python -m benchmarks.gpu`: see the package's docstring."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import LIBRARIES, ROOT, installed, processor
from benchmarks.tables import amount, grid

PACKAGES = ("transformers", "accelerate", "trl", "peft", "datasets", "pydantic", "dotenv", "toml", "defusedxml")


@dataclass(frozen=True)
class Item:
    """Where the item is, and its seconds of the nine minutes."""

    module: str
    seconds: float
    packages: tuple[str, ...] = PACKAGES


ITEMS = {
    "machine": Item("machine", 15),
    "attention": Item("kernels", 45, ("transformers",)),
    "head": Item("kernels", 20, ("transformers", "trl", "datasets", "peft")),
    "experts": Item("kernels", 40, ("transformers", "peft")),
    "ladder": Item("runs", 60),
    "memory": Item("models", 100),
    "speed": Item("steps", 100),
    "loading": Item("models", 35),
    "answers": Item("models", 50),
    "formats": Item("steps", 25),
    "engines": Item("runs", 40),
    "shortage": Item("runs", 10),
}
WHOLE = sum(item.seconds for item in ITEMS.values())
FAULTS = ("missed", "failed", "cut off")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="The acceptance run on a GPU.")
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"only these of {', '.join(ITEMS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all items together (9)")
    parser.add_argument("--gpus", type=int, default=1, choices=(1, 2), help="2: the engines with two processes as well")
    parser.add_argument("--output", type=Path, help="also write the JSON document there")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if unknown := sorted(set(options.items) - set(ITEMS)):
        parser.error(f"no such item: {', '.join(unknown)}; there are {', '.join(ITEMS)}")
    return options


def main(options: argparse.Namespace) -> int:
    if options.child:
        return child(options)
    names = options.items or list(ITEMS)
    report: dict[str, Any] = {"conditions": conditions(options), "items": {}}
    print(json.dumps(report["conditions"], indent=1), flush=True)
    spare = 0.0
    with tempfile.TemporaryDirectory(prefix="staged_sft_gpu_", ignore_cleanup_errors=True) as scratch:
        for name in names:
            box = ITEMS[name].seconds * options.minutes * 60 / WHOLE + spare
            found = run(name, options, Path(scratch) / name, box)
            spare = max(0.0, box - found["seconds"])
            report["items"][name] = found
            print(shown(name, found), flush=True)
            write(options.output, report)  # what a run that is cut off itself has found so far
    print(summary(report["items"]))
    print(json.dumps(report))
    return int(any(found["state"] in FAULTS for found in report["items"].values()))


def run(name: str, options: argparse.Namespace, folder: Path, box: float) -> dict[str, Any]:
    """One item in a process group of its own, ended with its children when its time is over."""
    missing = [package for package in ITEMS[name].packages if find_spec(package) is None]
    if missing:
        return {"state": "skipped", "why": f"{', '.join(missing)} missing", "seconds": 0.0, "lines": []}
    folder.mkdir(parents=True)
    flags = ["--rehearse"] if options.rehearse else []
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--child",
        name,
        str(folder),
        "--gpus",
        str(options.gpus),
        *flags,
    ]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.rehearse else {}
    variables = os.environ | hidden | {"HF_HUB_OFFLINE": "1", "STAGED_GPU_SECONDS": str(box)}
    start = time.monotonic()
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            code: int | None = process.wait(box)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    file = folder / "found.json"
    lines = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    found: dict[str, Any] = {
        "state": state(code, lines),
        "seconds": time.monotonic() - start,
        "box": box,
        "lines": lines,
    }
    if code:
        found["why"] = (folder / "log").read_text(encoding="utf-8", errors="replace").strip()[-1500:]
    return found


def end_group(process: subprocess.Popen) -> None:
    """The item and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def state(code: int | None, lines: list[dict[str, Any]]) -> str:
    if code is None:
        return "cut off"
    if code:
        return "failed"
    if any(line.get("met") is False for line in lines):
        return "missed"
    if any("skipped" in line for line in lines):
        return "in part"
    return "met" if any(line.get("met") for line in lines) else "not judged"


def child(options: argparse.Namespace) -> int:
    """The item itself, in its process."""
    from benchmarks.gpu.job import Job
    from sft.environment import silence_libraries

    silence_libraries()
    name, folder = options.child
    until = time.monotonic() + 0.95 * float(os.environ["STAGED_GPU_SECONDS"])
    job = Job(name, Path(folder), until, rehearse=options.rehearse, gpus=options.gpus)
    getattr(importlib.import_module(f"benchmarks.gpu.{ITEMS[name].module}"), name)(job)
    return 0


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What it was measured on."""
    asked = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
    try:
        cards = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        cards = []
    versions = {name: installed(name) for name in (*LIBRARIES, "triton", "bitsandbytes", "deepspeed")}
    return {
        "gpus": {"asked": asked, "found": cards}, "processor": processor(), "python": sys.version.split()[0],
        "versions": versions, "minutes": options.minutes, "rehearsal": options.rehearse,
    }  # fmt: skip


def shown(name: str, found: dict[str, Any]) -> str:
    """The item's table."""
    rows = []
    for line in found["lines"]:
        if "skipped" in line:
            rows.append([line["what"], "", "", f"skipped: {line['skipped']}"[:90]])
            continue
        verdict = {True: "met", False: "MISSED", None: "not judged"}[line["met"]] if "met" in line else ""
        rows.append([line["what"], amount(line["value"], line["unit"]), line.get("target", ""), verdict])
    why = f": {found['why'][-300:]}" if "why" in found else ""
    title = f"\n{name}: {found['state']}, {found['seconds']:.0f} s{why}"
    return f"{title}\n\n{grid(['what', 'found', 'wanted', ''], rows)}" if rows else title


def summary(items: dict[str, Any]) -> str:
    counts: dict[str, list[str]] = {}
    for name, found in items.items():
        counts.setdefault(found["state"], []).append(name)
    return "\n" + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in counts.items()) + "\n"


def write(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(arguments()))

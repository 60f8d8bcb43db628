"""train.py under a launcher, as people start it: two processes on the CPU, found again by a mark they carry."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MARK = "STAGED_TEST_MARK"


def launcher(kind: str) -> list[str]:
    """The command that starts two processes: torchrun, or accelerate with one of the launch files."""
    if kind == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    file = ROOT / "configs" / "accelerate" / f"{kind}.yaml"
    if "zero" in kind:
        need_deepspeed()
    return [
        str(BIN / "accelerate"), "launch", "--config_file", str(file), "--num_processes", "2",
        "--main_process_port", "0",
    ]  # fmt: skip


def need_deepspeed() -> None:
    """Skips the test where DeepSpeed is not installed; `make test` installs it."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: make install-deepspeed")


def environment(mark: Path) -> dict[str, str]:
    """One thread per process, no setting and no launcher of the caller, the mark."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SFT_", "ACCELERATE_", "MLFLOW_", "FSDP_")) and name not in ("RANK", "WORLD_SIZE")
    }
    return kept | {"OMP_NUM_THREADS": "1", MARK: str(mark)}


def start(kind: str, mark: Path, *arguments: object, script: Path = ROOT / "train.py") -> subprocess.Popen[str]:
    """Two processes of train.py; what they print goes to `mark`.log."""
    command = [*launcher(kind), str(script), *(str(argument) for argument in arguments)]
    with mark.with_suffix(".log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment(mark), stdout=log, stderr=log, text=True)


def run(kind: str, mark: Path, *arguments: object, script: Path = ROOT / "train.py") -> tuple[int, str]:
    """The same, to the end: the launcher's exit code and everything printed."""
    started = start(kind, mark, *arguments, script=script)
    try:
        code = started.wait(timeout=300)
    finally:
        for process in processes(mark).values():  # after a hang
            os.kill(process, signal.SIGKILL)
    return code, mark.with_suffix(".log").read_text(encoding="utf-8")


def processes(mark: Path) -> dict[str, int]:
    """Living processes with the mark: {"launcher": pid, "0": pid, "1": pid}."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            state = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        values = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        if values.get(MARK) == str(mark) and state != "Z":
            found[values.get("RANK", "launcher")] = int(folder.name)
    return found


def until(condition: Callable[[], object], *, seconds: float = 120.0) -> None:
    """Waits for the condition; AssertionError when it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)

"""glibc's heap where training runs on the CPU: the program begins anew without caches of small freed blocks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft import heap

PROGRAM = """
import json, os, sys
from sft.heap import begin_tight
print(json.dumps([os.getpid(), sys.argv, sys.flags.utf8_mode, os.environ.get("GLIBC_TUNABLES")]), flush=True)
begin_tight()
print("runs", sys.stdin.read())
"""


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_NVIDIA", Path("/nowhere"))
    monkeypatch.setattr(heap, "has_glibc", lambda: True)


def test_the_caches_are_switched_off_once_and_a_persons_choice_stays():
    """Nothing where glibc's malloc is tuned already; what else is tuned is kept."""
    environ = heap.tight_environment({"A": "1"})
    assert environ == {"A": "1", "GLIBC_TUNABLES": heap.WITHOUT_CACHES}
    assert heap.tight_environment(environ) is None
    assert heap.tight_environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}) is None
    other = heap.tight_environment({"GLIBC_TUNABLES": "glibc.rtld.nns=4"})
    assert other == {"GLIBC_TUNABLES": f"glibc.rtld.nns=4:{heap.WITHOUT_CACHES}"}


def test_not_beside_a_gpu_or_without_glibc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """There it changes nothing that matters."""
    monkeypatch.setattr(heap, "_NVIDIA", tmp_path)
    assert heap.tight_environment({}) is None
    monkeypatch.setattr(heap, "_NVIDIA", tmp_path / "none")
    monkeypatch.setattr(heap, "has_glibc", lambda: False)
    assert heap.tight_environment({}) is None


@pytest.mark.skipif(heap.tight_environment({}) is None, reason="begins anew only with glibc and without a GPU")
def test_the_program_that_begins_anew_is_the_same_one(tmp_path: Path):
    """Number, arguments, the interpreter's own options and standard input; begun anew once."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environ = {name: value for name, value in os.environ.items() if name != heap.NAME}
    root = str(Path(heap.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-X", "utf8", script, "--stage", "1 2"],
        input="what was said", env=environ | {"PYTHONPATH": root}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *begun, last = done.stdout.splitlines()
    first, second = map(json.loads, begun)
    assert first[:3] == second[:3] == [first[0], [str(script), "--stage", "1 2"], 1]
    assert (first[3], second[3]) == (None, heap.WITHOUT_CACHES)
    assert last == "runs what was said"


def test_thresholds(monkeypatch: pytest.MonkeyPatch):
    """8 MiB where holes join and memory need not be spared, else 4."""
    calls: list[tuple[int, int]] = []
    library = type("Library", (), {"mallopt": lambda self, *given: calls.append(given)})()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv(heap.NAME, raising=False)
    heap.return_freed_memory()
    monkeypatch.setenv(heap.NAME, heap.WITHOUT_CACHES)
    heap.return_freed_memory()
    heap.return_freed_memory(sparingly=True)
    assert calls == [(-3, 4 * 2**20), (-3, 8 * 2**20), (-3, 4 * 2**20)]

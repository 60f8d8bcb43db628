"""The acceptance run for GPUs: every item rehearsed on the CPU, time boxes, missing packages, the exit code."""

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import runs
from benchmarks.gpu.job import Job

LINES = {
    "attention": 4 * 3, "head": 4, "experts": 1 + 2 * 2, "memory": 2 * 9, "speed": 4 + 1 + 2, "loading": 2 * 2,
    "answers": 2 + 2, "formats": 5, "machine": 4, "ladder": 12, "engines": 7, "shortage": 3,
}  # fmt: skip
"""Figures of each item that are held against a threshold, on the CPU."""


@pytest.mark.slow
@pytest.mark.parametrize("name", program.ITEMS)
def test_every_item_runs_on_the_cpu(name: str, tmp_path: Path):
    """With tiny shapes, all the way through: what is written down as it comes has all its thresholds, none missed; no
    part is left out but for a missing package."""
    job = Job(name, tmp_path, time.monotonic() + 1000, rehearse=True)
    getattr(importlib.import_module(f"benchmarks.gpu.{program.ITEMS[name].module}"), name)(job)
    lines = json.loads((tmp_path / "found.json").read_text())
    assert lines == job.lines
    assert [line for line in lines if line.get("met") is False] == []
    assert sum("target" in line for line in lines) >= LINES[name]
    assert [line for line in lines if not line.get("skipped", "missing").endswith("missing")] == []
    assert program.state(0, lines) in ("met", "in part", "not judged")


@pytest.mark.parametrize(
    ("gpus", "rehearse", "names"),
    [
        (1, True, ["ddp"]),
        (1, False, ["ddp", "zero2", "zero3", "fsdp", "zero2 in 4 bits"]),
        (2, False, ["ddp", "zero2", "zero3", "fsdp", "zero2 in 4 bits", *(f"{e} on two" for e in runs.ENGINES)]),
    ],
)
def test_every_launch_file_is_run(gpus: int, rehearse: bool, names: list[str], tmp_path: Path, monkeypatch: Any):
    """With two GPUs by two processes as well; `--gpus 2 --rehearse` runs the same. Without DeepSpeed it says so."""
    monkeypatch.setattr("benchmarks.gpu.job.find_spec", lambda name: object())
    assert list(runs.engine_kinds(Job("engines", tmp_path, 0.0, rehearse=rehearse, gpus=gpus))) == names
    assert list(runs.engine_kinds(Job("engines", tmp_path, 0.0, rehearse=True, gpus=2)))[-4:] == [
        f"{engine} on two" for engine in runs.ENGINES
    ]
    monkeypatch.setattr("benchmarks.gpu.job.find_spec", lambda name: None if name == "deepspeed" else object())
    job = Job("engines", tmp_path, 0.0, rehearse=rehearse, gpus=gpus)
    left = list(runs.engine_kinds(job))
    assert left == [name for name in names if not name.startswith("zero")]
    assert [line["what"] for line in job.lines] == [name for name in names if name not in left]


@pytest.mark.slow
def test_two_gpus_are_rehearsed_by_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loss beside a run alone, what two gain, one of them killed; going on is rehearsed with one."""
    monkeypatch.setattr(runs, "engine_kinds", lambda job: {"ddp on two": ("ddp", 2, {"SFT_GRAD_ACCUM": 1})})
    monkeypatch.setattr(runs, "go_on", lambda *arguments: None)
    job = Job("engines", tmp_path, time.monotonic() + 1000, rehearse=True, gpus=2)
    runs.engines(job)
    found = {line["what"]: line for line in job.lines}
    assert [line for line in job.lines if line.get("met") is False] == []
    assert found["ddp on two: loss beside a run alone"]["met"]
    assert found["two beside one: tokens/s"]["value"] > 0
    assert found["killed rank: ranks left"]["met"]


def options(**values: Any) -> Any:
    return SimpleNamespace(
        **{"rehearse": True, "gpus": 1, "items": [], "minutes": 9.0, "output": None, "child": None} | values
    )


@pytest.mark.slow
def test_an_item_has_a_process_and_a_time_box(tmp_path: Path):
    """In time its lines come back; an item that is cut off says so and leaves nobody behind."""
    found = program.run("attention", options(), tmp_path / "whole", 500.0)
    assert (found["state"], len(found["lines"]) > 12) == ("met", True), found
    start = time.monotonic()
    found = program.run("attention", options(), tmp_path / "cut", 0.3)
    assert (found["state"], found["lines"]) == ("cut off", [])
    assert time.monotonic() - start < 30


def test_an_item_whose_packages_are_missing_has_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It says which; nothing is started."""
    monkeypatch.setattr(program, "find_spec", lambda name: None if name in ("trl", "toml") else object())
    found = program.run("speed", options(), tmp_path / "speed", 10.0)
    assert (found["state"], found["why"]) == ("skipped", "trl, toml missing")
    assert not (tmp_path / "speed").exists()


@pytest.mark.parametrize(
    ("code", "lines", "state"),
    [
        (None, [], "cut off"),
        (1, [{"met": True}], "failed"),
        (0, [{"met": True}, {"met": False}], "missed"),
        (0, [{"met": True}, {"skipped": "no time left"}], "in part"),
        (0, [{"met": True}, {"value": 1}], "met"),
        (0, [{"met": None}], "not judged"),
    ],
)
def test_what_an_item_has_come_to(code: int | None, lines: list[dict[str, Any]], state: str):
    """A figure that nobody judges is no pass."""
    assert program.state(code, lines) == state


@pytest.mark.parametrize(
    ("states", "code"), [(("met", "skipped", "in part"), 0), (("met", "missed"), 1), (("cut off",), 1)]
)
def test_the_exit_code_and_the_document(
    states: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """1 where a threshold is missed, an item failed or was cut off; time that is left over goes to the next item."""
    names, boxes = list(program.ITEMS)[: len(states)], []

    def run(name: str, given: Any, folder: Path, box: float) -> dict[str, Any]:
        boxes.append(box)
        line = {
            "what": "a figure",
            "value": 3.0,
            "unit": "ms",
            "target": "<= 2",
            "met": states[len(boxes) - 1] == "met",
        }
        return {"state": states[len(boxes) - 1], "seconds": 5.0, "lines": [line]}

    monkeypatch.setattr(program, "run", run)
    assert program.main(options(items=names, output=tmp_path / "gpu.json")) == code
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [found["state"] for found in report["items"].values()] == list(states)
    assert boxes[0] == pytest.approx(15.0)
    assert boxes[1:2] == [pytest.approx(45.0 + 10.0)][: len(states) - 1]
    printed = capsys.readouterr().out
    assert json.loads(printed.strip().splitlines()[-1]) == report
    assert "a figure |  3 ms |   <= 2 |" in printed


def test_a_threshold_is_judged_where_it_can_be(tmp_path: Path):
    """A rehearsal judges what no machine changes; a figure that is no number is missed."""
    job = Job("one", tmp_path, time.monotonic() + 60, rehearse=True)
    job.check("speed", 1.0, ">= 5", of_gpu=True)
    job.check("difference", 0.1, "<= 0.02")
    job.check("nothing", float("nan"), "<= 0.02")
    assert [line["met"] for line in job.lines] == [None, False, False]
    late = Job("two", tmp_path, time.monotonic() + 5)
    assert not late.has_time("a long part", 10)
    assert late.lines == [{"what": "a long part", "skipped": "no time left"}]

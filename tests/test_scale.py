"""What docs/scale.md stands on, in small: ranks that meet through one store, caches read once, a long lineage."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest

from benchmarks.scale import lineage, preparation
from benchmarks.scale.meeting import KILLED, ROUNDS, SPEAKS, Run, Told, summary
from sft.data.sources import store
from sft.distributed import ranks
from sft.distributed.ranks import _spans

ROOT = Path(__file__).parent.parent
RANKS = 12
MEETINGS = ROUNDS + 4  # start, value, merge, and the one at which one is missing
RUNS = {SPEAKS: Run(RANKS, SPEAKS, busy=0.5, patience=60), KILLED: Run(RANKS, KILLED, busy=0.5, patience=2)}
# In a process of its own: it forks, and this one may have threads.
SIMULATE = "import json, sys; from benchmarks.scale.meeting import Run, simulate; print(json.dumps(simulate({!r})))"


def told_of(death: str) -> Told:
    command = [sys.executable, "-c", SIMULATE.format(RUNS[death])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def spoken() -> Told:
    return told_of(SPEAKS)


def test_all_ranks_go_through_every_meeting_and_hear_the_main_process(spoken: Told):
    """The value is the main process's on every rank, and nobody goes on before the last has come."""
    values = [each["found"] for each in spoken if each["event"] == "value"]
    assert values == [{"checkpoint": "checkpoint-100"}] * RANKS
    for name in [*(f"round {number}" for number in range(ROUNDS)), "merge"]:
        met = [each for each in spoken if each["event"] == name]
        assert len(met) == RANKS
        assert min(each["at"] for each in met) >= max(each["entered"] for each in met)


def test_an_end_that_is_told_is_heard_at_once_by_all(spoken: Told):
    """Rank 6 ends with 1: eleven others say which, where and with what, long before their patience of 60 s."""
    found = summary(spoken, RUNS[SPEAKS])
    assert found["heard_ranks"] == RANKS - 1
    assert found["heard_last"] < 30
    (words,) = found["words"]
    assert words.startswith("Rank 6 on ")
    assert "has ended with exit code 1" in words


def test_a_rank_that_was_killed_is_named_with_its_host_when_the_patience_ends():
    """Nobody told of it: after 2 s all others name rank 6 alone."""
    found = summary(told_of(KILLED), RUNS[KILLED])
    assert found["heard_ranks"] == RANKS - 1
    assert found["heard_first"] >= 1
    (words,) = found["words"]
    assert "missing: rank 6 on " in words


def test_the_store_does_not_grow_by_a_key_per_rank_and_meeting(spoken: Told):
    """One key a rank, one a meeting; the value's, the end's, and the one c10d keeps for itself at most."""
    assert spoken[-1]["keys"] <= RANKS + MEETINGS + 3


@pytest.mark.parametrize(
    ("numbers", "words"), [([5], "5"), ([1, 2, 3, 7], "1-3, 7"), ([0, 2, 4], "0, 2, 4"), (list(range(1, 512)), "1-511")]
)
def test_many_ranks_are_named_in_spans(numbers: list[int], words: str):
    """511 numbers would bury the sentence."""
    assert _spans(numbers) == words


@pytest.mark.parametrize(
    ("main", "first", "walk"),
    [
        (True, True, ["block", "wait", "wait"]),
        (False, True, ["wait", "block", "wait"]),
        (False, False, ["wait", "wait", "block"]),
    ],
)
def test_one_process_of_a_machine_goes_before_its_others(
    monkeypatch: pytest.MonkeyPatch, main: bool, first: bool, walk: list[str]
):
    """Where the cache is a machine's own, its other processes find the labels made; all ranks meet equally often."""
    walked = []
    state = SimpleNamespace(is_main_process=main, is_local_main_process=first)
    monkeypatch.setattr(ranks, "PartialState", lambda: state)
    monkeypatch.setattr(ranks, "wait", lambda what: walked.append("wait"))
    with ranks.main_first("the main process to read the data"):
        walked.append("block")
    assert walked == walk


@pytest.mark.parametrize(("rank", "reads"), [("8", 1), ("9", 0), ("15", 0)])
def test_a_cache_is_read_through_once_on_every_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str, reads: int
):
    """Rank 8 is the first of the second machine with eight each; the checksum of 70 GB is not for all of them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows, made, read = pa.table({"number": [1, 2]}), [], []

    def fill(write: store.Write) -> dict[str, Counter[str]]:
        made.append(write(rows))
        return {}

    store.stored("rows", rows.schema, fill)
    for name, value in {"RANK": rank, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    whole = store.xxh3
    monkeypatch.setattr(store, "xxh3", lambda path: read.append(path) or whole(path))
    assert store.stored("rows", rows.schema, fill).dataset["number"][:] == [1, 2]
    assert (len(made), len(read)) == (1, reads)


def test_the_error_of_a_lineage_does_not_add_up(tmp_path: Path):
    """Against the sum in float64: eight adapters are rounded once like one, where eight merges round eight times."""
    sizes = 256, 256, 1, 64, 200_000
    one, eight = tmp_path / "one", tmp_path / "eight"
    for folder in (one, eight):
        folder.mkdir()
    short, long = lineage.measure(one, 1, sizes), lineage.measure(eight, 8, sizes)
    assert short["error"] == short["one_by_one_error"]
    assert 0 < long["error"] < short["error"]
    assert long["one_by_one_error"] > 2 * long["error"]


def test_more_processes_share_what_does_not_run_alone():
    """One second alone, eight to share, half a second of writing beside: 9, 3, and no less than 1.5 seconds."""
    ours = {"alone_seconds": 1.0, "workers_cpu_seconds": 8.0, "parent_beside_seconds": 0.5}
    assert [preparation.seconds(ours, processes) for processes in (1, 4, 64)] == [9.0, 3.0, 1.5]

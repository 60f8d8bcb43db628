"""Reading a source in parts: by any number of processes the same rows, numbers, losses and words."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft.data import workers
from sft.data.sources import blocks, load
from sft.data.sources.load import Rows, load_source
from sft.data.sources.readers import SourceError
from sft.errors import Problems
from sft.settings import Source


def lines(count: int) -> Iterator[dict[str, Any]]:
    """Rows of which some lack a column, have no answer, a turn with a key nobody reads, or an unknown role."""
    for k in range(count):
        turns = [
            {"role": "user", "content": f"{k} é😀"},
            {"role": "assistant", "content": "" if k % 97 == 3 else f"A{k}"},
        ]
        if k % 500 == 499:
            turns[0]["role"] = "nobody"
        if k == count - 2:
            turns[1]["mood"] = "glad"
        yield (
            {"other": k}
            if k % 250 == 1
            else {"messages": turns, "note": "x"}
            if k > count // 2
            else {"messages": turns}
        )


def written(path: Path, count: int, *, before: str = "", last: str = "") -> Path:
    text = "".join(
        json.dumps(row, ensure_ascii=False) + ("\n\n" if k % 7 else "\n") for k, row in enumerate(lines(count))
    )
    path.write_text(before + text + last, encoding="utf-8")
    return path


@pytest.fixture
def small_blocks(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(blocks, "_BYTES_AT_ONCE", 4000)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def facts(rows: Rows) -> tuple[Any, ...]:
    return rows.dataset.to_dict(), rows.dropped, rows.noted, rows.first, rows.unread


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_several_processes_read_the_same_rows(tmp_path: Path, monkeypatch, small_blocks, kind: str):
    """Rows, their numbers, what was lost where and what nobody reads, as one process finds them in one go."""
    if kind == "csv":
        path = tmp_path / "rows.csv"
        path.write_text("prompt,completion\n" + "".join(f"{k},{'' if k % 9 == 2 else k}\n" for k in range(3500)))
    elif kind == "folder":
        path = tmp_path / "rows"
        path.mkdir()
        for name in "ab":
            written(path / f"{name}.jsonl", 1500, before="\ufeff")
    else:
        path = written(tmp_path / "rows.jsonl", 3000, before="\ufeff")
    several = facts(load_source(Source(id=str(path)), processes=3))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "another")
    monkeypatch.setattr(load, "blocks_of", lambda files, encoding: None)
    one = facts(load_source(Source(id=str(path)), processes=1))
    assert several == one
    assert len(one[0]["number"]) > 2500 and max(one[0]["number"]) > 2990
    assert one[4] == (() if kind == "csv" else ("messages.mood", "note"))


@pytest.mark.parametrize(
    ("last", "said"), [('{"messages": [', "line {line}: broken JSON"), ("[1]\n", "line {line}: a row is an object")]
)
def test_a_fault_is_named_by_its_line(tmp_path: Path, small_blocks, last: str, said: str):
    """The line is that of the file, whichever process found it in whichever block."""
    path = written(tmp_path / "rows.jsonl", 2000, last=last)
    line = path.read_text(encoding="utf-8").removesuffix(last).count("\n") + 1
    with pytest.raises(SourceError, match=said.format(line=line)):
        load_source(Source(id=str(path)), processes=2)


def test_bytes_that_are_no_text_are_named_by_their_place(tmp_path: Path, small_blocks):
    """Their place is that in the file, also where they stand behind the first block."""
    path = written(tmp_path / "rows.jsonl", 2000)
    place = path.stat().st_size
    with path.open("ab") as file:
        file.write('{"messages": "日本"}\n'.encode("cp932"))
    with pytest.raises(SourceError, match=rf"byte {place + 14} is not utf-8"):
        load_source(Source(id=str(path)), processes=2)


def test_problems_of_another_process_arrive_as_they_were():
    """Each by itself, and with whether every rank says it."""
    found = pickle.loads(pickle.dumps(Problems(["one", "two"], every_rank=True)))
    assert (found.problems, found.every_rank) == (["one", "two"], True)


def test_items_are_taken_as_they_are_needed():
    """A slow reader of the results is not overtaken: what waits for it does not grow with the items."""
    taken: list[int] = []
    results = workers.in_order(abs, (taken.append(k) or k for k in range(1000)), processes=2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) <= 10 + 3 * 2
    results.close()

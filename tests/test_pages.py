"""Pages of stored rows are given back while they are read, and the rows stay what they were."""

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sft.data.sources import pages
from sft.data.sources.pages import giving_back, in_turn
from sft.data.sources.store import stored

ROWS = 400_000


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if line.endswith(str(path)):
            inside = True
        elif inside and line.startswith("Rss:"):
            found, inside = found + int(line.split()[1]) * 1024, False
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="pages are looked up in /proc")
def test_a_file_read_in_turn_does_not_fill_memory(monkeypatch: Any):
    """3.2 MB of numbers: all of them right, and afterwards hardly any in memory; the same once more."""
    monkeypatch.setattr(pages, "_LOOKS_BETWEEN", 4)
    table = pa.table({"number": pa.array(range(ROWS), pa.int64())})

    def fill(write: Any) -> dict[str, Any]:
        for start in range(0, ROWS, 10_000):
            write(table.slice(start, 10_000))
        return {}

    found = stored("pages", table.schema, fill)
    for _ in range(2):
        numbers = [
            number for part in in_turn(found.dataset, ["number"], 10_000) for number in part["number"].to_pylist()
        ]
        assert numbers == list(range(ROWS))
        assert resident(found.path) < 1_000_000
    assert found.dataset[:]["number"] == numbers
    assert resident(found.path) > 3_000_000
    giving_back(found.dataset)()
    assert resident(found.path) == 0
    assert found.dataset[ROWS - 1] == {"number": ROWS - 1}


def test_rows_in_memory_alone_are_left_alone():
    """A data set without a file has no pages to give back."""
    import datasets

    dataset = datasets.Dataset.from_dict({"number": [1, 2, 3]})
    giving_back(dataset)()
    assert [part["number"].to_pylist() for part in in_turn(dataset, ["number"], 2)] == [[1, 2], [3]]

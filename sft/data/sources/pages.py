"""Stored rows are mapped into memory: what was read stays there until the system wants it, and counts as ours."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_LOOKS_BETWEEN = 32  # tables between two times that pages are given back


def in_turn(dataset: datasets.Dataset, columns: list[str], rows: int) -> Iterator[pa.Table]:
    """Tables of so many rows with these columns, one after the other; the pages behind them are given back."""
    give_back = giving_back(dataset)
    for number, table in enumerate(dataset.select_columns(columns).with_format("arrow").iter(rows), start=1):
        yield table
        if number % _LOOKS_BETWEEN == 0:
            give_back()


def giving_back(dataset: datasets.Dataset) -> Callable[[], None]:
    """A function that gives back the pages of the data set's files, as often as it is called, in this process or one
    forked from it. They are read again when they are wanted. It holds for as long as the data set does."""
    places = _mapped({str(Path(file["filename"]).resolve()) for file in dataset.cache_files})
    if not places:
        return lambda: None
    system = ctypes.CDLL(None, use_errno=True)

    def give_back() -> None:
        for start, end in places:
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    return give_back


def _mapped(paths: set[str]) -> list[tuple[int, int]]:
    """Where in memory these files are mapped to be read alone: there, and nowhere else, nothing is lost with a page."""
    if not paths or sys.platform != "linux":
        return []
    places = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        place, access, *_, path = line.split(maxsplit=5) if line.count("/") else ("", "", "")
        if access.startswith("r--") and os.path.normpath(path) in paths:
            start, _, end = place.partition("-")
            places.append((int(start, 16), int(end, 16)))
    return places

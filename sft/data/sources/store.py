"""Prepared rows on disk: Arrow streams under a content key, written aside, checked before use."""

import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash

from sft.distributed.launch import launched
from sft.storage.seals import xxh3

Write = Callable[[pa.Table], None]
_DAY = 86_400  # seconds


@dataclass(frozen=True)
class StoredRows:
    """A data set on disk and what was counted while it was written."""

    dataset: datasets.Dataset
    counted: dict[str, Counter[str]]


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits that are equal for equal parts (anything json can write)."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def stored(name: str, schema: pa.Schema, fill: Callable[[Write], dict[str, Counter[str]]]) -> StoredRows:
    """The data set called `name`, made by `fill(write)` unless an undamaged one is there.

    `fill` calls `write` with tables of `schema` and returns its counters. Two processes may do this at once: each
    writes its own file and renames it into place, and equal names mean equal content.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "staged_sft"
    path = folder / f"{name}.arrow"
    found = _open(path)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    partial = folder / f"{name}.{uuid.uuid4().hex}.partial"
    notes = partial.with_suffix(".json")
    try:
        counted = _write(partial, schema, fill)
        facts = {"size": partial.stat().st_size, "digest": xxh3(partial), "counted": counted}
        notes.write_text(json.dumps(facts), encoding="utf-8")
        partial.replace(path)
        notes.replace(_notes_of(path))
    finally:
        partial.unlink(missing_ok=True)
        notes.unlink(missing_ok=True)
    return StoredRows(datasets.Dataset.from_file(str(path)), counted)


def _clear_leftovers(folder: Path) -> None:
    """Files that a process killed more than a day ago was writing."""
    for path in folder.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def _write(path: Path, schema: pa.Schema, fill: Callable[[Write], dict[str, Counter[str]]]) -> dict[str, Counter[str]]:
    with path.open("wb") as file, pa.ipc.new_stream(file, schema) as stream:
        counted = fill(stream.write_table)
        file.flush()
    return counted


def _notes_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _open(path: Path) -> StoredRows | None:
    """None when there is nothing, or something damaged: it is then made again."""
    try:
        facts = json.loads(_notes_of(path).read_text(encoding="utf-8"))
        whole = path.stat().st_size == facts["size"]
        # The others come after the first process of their machine, which has just read all of it.
        whole = whole and (not launched().first_of_machine or xxh3(path) == facts["digest"])
        counted = {name: Counter(counts) for name, counts in facts["counted"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return StoredRows(datasets.Dataset.from_file(str(path)), counted) if whole else None

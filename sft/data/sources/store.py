"""Prepared rows on disk: Arrow streams under a content key, written aside, checked before use."""

import contextlib
import json
import os
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
from sft.storage.json_files import write_json
from sft.storage.seals import xxh3

Write = Callable[[pa.Table], None]
_DAY = 86_400  # seconds
# Smaller files are hashed sooner than looked up.
_WORTH_REMEMBERING = 1 << 20
# A change this soon after another may leave a file's times as they are: a tick of the kernel's clock, and room.
_TICK = 100_000_000  # nanoseconds
_BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class StoredRows:
    """A data set on disk, its file, and what was counted while it was written."""

    dataset: datasets.Dataset
    path: Path
    counted: dict[str, Counter[str]]


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits that are equal for equal parts (anything json can write)."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def cache_folder() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "staged_sft"


def digest_of(path: Path) -> str:
    """xxh3 of the file; of a large one as remembered, for as long as inode, size and times are those of the file that
    was read (as git knows unchanged files; ctime can't be set back)."""
    with path.open("rb") as stream:  # on NFS opening is what asks for the times anew
        before = os.fstat(stream.fileno())
        if before.st_size < _WORTH_REMEMBERING:
            return xxh3(path)
        note = cache_folder() / "digests" / f"{key_of(str(path.resolve()))}.json"
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["file"] == _signature(before):
                return str(known["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = xxh3(path)
        after = os.fstat(stream.fileno())
    settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _TICK
    if settled and _signature(before) == _signature(after):
        with contextlib.suppress(OSError):  # a cache that is read only is read
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"file": _signature(after), "digest": digest})
    return digest


def _signature(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def clean_mark(path: Path) -> tuple[Path, str] | None:
    """The file that says that the rows stored at `path` passed the audit, and what it says then."""
    try:
        facts = json.loads(_notes_of(path).read_text(encoding="utf-8"))
        return path.with_suffix(".audited"), str(facts["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stored(name: str, schema: pa.Schema, fill: Callable[[Write], dict[str, Counter[str]]]) -> StoredRows:
    """The data set called `name`, made by `fill(write)` unless an undamaged one is there.

    `fill` calls `write` with tables of `schema` and returns its counters. Two processes may do this at once: each
    writes its own file and renames it into place, and equal names mean equal content.
    """
    folder = cache_folder()
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
    return StoredRows(datasets.Dataset.from_file(str(path)), path, counted)


def _clear_leftovers(folder: Path) -> None:
    """Files that a process killed more than a day ago was writing."""
    for path in folder.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def _write(path: Path, schema: pa.Schema, fill: Callable[[Write], dict[str, Counter[str]]]) -> dict[str, Counter[str]]:
    """As few batches as reading needs: whoever opens the file goes through all of them, again with every view of it."""
    waiting: list[pa.Table] = []
    size = 0
    with path.open("wb") as file, pa.ipc.new_stream(file, schema) as stream:

        def write_out() -> None:
            nonlocal size
            if waiting:
                stream.write_table(pa.concat_tables(waiting).combine_chunks())
            waiting.clear()
            size = 0

        def write(table: pa.Table) -> None:
            nonlocal size
            waiting.append(table)
            size += table.nbytes
            if size >= _BATCH_BYTES:
                write_out()

        counted = fill(write)
        write_out()
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
        whole = whole and (not launched().first_of_machine or digest_of(path) == facts["digest"])
        counted = {name: Counter(counts) for name, counts in facts["counted"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return StoredRows(datasets.Dataset.from_file(str(path)), path, counted) if whole else None

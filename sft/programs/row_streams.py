"""Rows of JSON and JSONL files, read as training reads them and written one at a time."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft.data.sources.readers import SourceError, read_file
from sft.errors import Problems
from sft.programs.command_line import reworded
from sft.storage.atomic import sync

Row = dict[str, Any]
FILE_TYPES = (".json", ".jsonl")


def read_rows(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """The objects of a JSON list or a JSONL file, in order; only the text of a list is held, never all rows.

    `encoding` None is UTF-8, with or without a BOM.

    Raises:
        Problems: the file is missing, of another encoding, broken (file and line are named) or not a list of objects.
    """
    if path.suffix.lower() not in FILE_TYPES:
        raise Problems([f"{path}: a .json or .jsonl file is needed"])
    with reworded('give the source "encoding": ', "add --encoding "):
        try:
            yield from read_file(path, encoding, frozenset())
        except SourceError as error:
            raise Problems([str(error)]) from error


@contextlib.contextmanager
def written_rows(path: Path) -> Iterator[Callable[[Row], None]]:
    """Yield a function that adds a row to `path`: a JSON list, or JSONL by the name's ending.

    The file appears under its name when the block ends well; on an error nothing is left of it.

    Raises:
        Problems: the file exists already.
    """
    if path.exists():
        raise Problems([f"{path}: exists already and is not overwritten; remove it or name another --output"])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    opening, between, closing = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            separators = iter([opening])

            def add(row: Row) -> None:
                stream.write(next(separators, between) + json.dumps(row, ensure_ascii=False))

            yield add
            stream.write(next(separators, "") + closing)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)

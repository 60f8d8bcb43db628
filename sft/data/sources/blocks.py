"""A source's rows in parts that can be read one without the other, by several processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sft.data.sources.files import SourceError, kind_of_file
from sft.data.sources.readers import ROWS_AT_ONCE, TextFile, begins_a_list, json_lines, refuse_others, wrong_encoding

Row = dict[str, Any]
_BYTES_AT_ONCE = 1 << 18  # of lines: a thousand short rows


class Block(NamedTuple):
    """Whole lines of a file: its bytes from `start` to `end`."""

    path: Path
    start: int
    end: int


Part = Block | Sequence[Row]
"""Rows to be read, or rows that were."""


def rows_of(part: Part) -> Iterable[Row]:
    """The rows of a part. Raises SourceError."""
    return _read(part) if isinstance(part, Block) else part


def parted(rows: Iterable[Row]) -> Iterator[Part]:
    """Rows that only one process can read, as parts."""
    rows = iter(rows)
    while part := list(islice(rows, ROWS_AT_ONCE)):
        yield part


def blocks_of(files: Sequence[Path], encoding: str | None) -> list[Part] | None:
    """Files of lines as blocks; None where some file cannot be read in blocks, or not at all."""
    if encoding is not None or any(kind_of_file(file) not in ((".jsonl", None), (".ndjson", None)) for file in files):
        return None
    try:
        return None if any(map(_is_another, files)) else list(chain.from_iterable(map(_blocks, files)))
    except (OSError, UnicodeError, SourceError):
        return None  # whoever reads it from its beginning says why


def _is_another(path: Path) -> bool:
    refuse_others(path, ".jsonl", None)
    return begins_a_list(TextFile(path, "utf-8-sig"))


def _blocks(path: Path) -> Iterator[Block]:
    size, borders = path.stat().st_size, [0]
    with path.open("rb") as file:
        while borders[-1] < size:
            file.seek(borders[-1] + _BYTES_AT_ONCE)
            file.readline()
            borders.append(min(file.tell(), size))
    return (Block(path, *pair) for pair in pairwise(borders))


def _read(block: Block) -> list[Row]:
    path, start, end = block
    file = TextFile(path, "utf-8-sig")
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            # Only the beginning of a file may have a mark of its byte order.
            lines = [
                line.decode("utf-8" if number or start else "utf-8-sig")
                for number, line in enumerate(stream.read(end - start).split(b"\n"))
            ]
        try:
            return list(json_lines(file, lines))
        except SourceError:
            return list(json_lines(file, lines, 1 + _lines_before(path, start)))  # with the number of the line
    except UnicodeError as error:
        raise SourceError(wrong_encoding(file)) from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error


def _lines_before(path: Path, place: int) -> int:
    with path.open("rb") as stream:
        sizes = (min(1 << 20, place - start) for start in range(0, place, 1 << 20))
        return sum(stream.read(size).count(b"\n") for size in sizes)

"""Rows of large JSON and JSONL files, read and written one at a time: memory stays that of the largest row.

A `.json` file is one list of objects, a `.jsonl` file one object per line. Which of the two a file is gets read off
its first character, since both are found under either name.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NoReturn

from sft.data.sources.readers import likely_encoding
from sft.errors import Problems
from sft.storage.atomic import sync

Row = dict[str, Any]
CHUNK = 1 << 20  # characters read at a time
LARGEST_ROW = 1 << 28  # characters; an unfinished row beyond it is a broken file, not a large row
_TAIL = 16  # an error this near the end of what was read may be half a literal or half an escape


def read_rows(path: Path, encoding: str = "utf-8-sig") -> Iterator[Row]:
    """The objects of a JSON list or a JSONL file, in order.

    Raises:
        Problems: the file is missing, of another encoding, broken (file and line are named) or not a list of objects.
    """
    try:
        with path.open(encoding=encoding) as stream:
            first = _first_character(stream)
            yield from _list_items(stream, path) if first == "[" else _lines(stream, path)
    except UnicodeDecodeError as error:
        known, remedy = encoding.removesuffix("-sig"), likely_encoding(path) or "NAME"
        text = f"{path}: is not {known} text ({error.reason}); add --encoding {remedy} if that is how it was written"
        raise Problems([text]) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Problems([f"{path}: {error.strerror}; a .json or .jsonl file is needed"]) from error


def _first_character(stream: IO[str]) -> str:
    """The first character that is no blank; the stream is set back to it, since only that many were read."""
    while (character := stream.read(1)).isspace():
        continue
    stream.seek(0)
    return character


def _lines(stream: IO[str], path: Path) -> Iterator[Row]:
    rows = (_parsed_line(line, path=path, number=n) for n, line in enumerate(stream, start=1) if line.strip())
    start = list(islice(rows, 2))
    if len(start) == 1 and path.suffix == ".json":
        raise Problems([f"{path}: one JSON object where a list of rows belongs; put the rows in [ ... ]"])
    yield from chain(start, rows)


def _parsed_line(line: str, *, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        if number == 1 and line.strip() == "{":
            raise Problems([f"{path}: a JSON object where a list of rows belongs; put the rows in [ ... ]"]) from error
        raise Problems([f"{path} line {number}: not readable as JSON ({error})"]) from error
    if not isinstance(row, dict):
        raise Problems([f"{path} line {number}: a row must be an object, this is {type(row).__name__}"])
    return row


class _Window:
    """The part of a file that is in memory, and the line it starts on."""

    def __init__(self, stream: IO[str], path: Path) -> None:
        self.stream, self.path = stream, path
        self.text, self.place, self.line = "", 0, 1

    def more(self) -> bool:
        """Drop what was used, read on; False at the end of the file."""
        self.line += self.text.count("\n", 0, self.place)
        rest = self.text[self.place :]
        added = self.stream.read(max(CHUNK, len(rest)))
        self.text, self.place = rest + added, 0
        return bool(added)

    def peek(self) -> str:
        """The next character that is no blank, unused; "" at the end of the file."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def broken(self, what: str) -> NoReturn:
        raise Problems([f"{self.path} line {self.line + self.text.count(chr(10), 0, self.place)}: {what}"])


def _list_items(stream: IO[str], path: Path) -> Iterator[Row]:
    window = _Window(stream, path)
    window.peek()
    window.place += 1
    if window.peek() == "]":
        return
    while True:
        yield _item(window)
        mark = window.peek()
        if mark not in ("]", ","):
            window.broken("the list ends in the middle" if mark == "" else f"{mark!r} where a comma or ] belongs")
        window.place += 1
        if mark == "]":
            break
    if window.peek():
        window.broken("text after the end of the list")


def _item(window: _Window) -> Row:
    mark = window.peek()
    if mark != "{":
        window.broken("the list ends in the middle" if mark == "" else "a row must be an object")
    decoder = json.JSONDecoder()
    while True:
        try:
            row, window.place = decoder.raw_decode(window.text, window.place)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - _TAIL
            too_large = len(window.text) - window.place > LARGEST_ROW
            if not unfinished or too_large or not window.more():
                window.broken(f"not readable as JSON ({error.msg})")
        except RecursionError:
            window.broken("nested too deeply")
        else:
            return row


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

"""JSON documents and files of JSON lines, written whole and read though a kill may have cut them."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.storage.atomic import _write_all, write_text


class DamagedFile(ValueError):
    """A file that exists and can't be what was written; the message names it."""


def plain(value: Any, text: Callable[[str], str] | None = None) -> Any:
    """The value as JSON has it: NaN and infinity become null, paths text, numpy and torch scalars numbers, sets sorted
    lists. With `text`, strings and whatever else has one (enumerations, types) become what it makes of theirs."""
    if isinstance(value, dict):
        return {str(key): plain(each, text) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(each, text) for each in value)
    if isinstance(value, list | tuple):
        return [plain(each, text) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return plain(value.item(), text)
    if text and not isinstance(value, int | None):
        return text(str(value))
    return str(value) if isinstance(value, Path) else value


def json_text(payload: Any, *, indent: int | None = 2) -> str:
    """JSON without escapes for letters and without the NaN that other readers refuse."""
    return json.dumps(plain(payload), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, payload: Any) -> None:
    """Replace the file by a JSON document in one step (utf-8, indented; NaN and infinity become null)."""
    write_text(path, json_text(payload) + "\n")


def read_json(path: Path) -> Any:
    """The document in the file. Raises FileNotFoundError, or DamagedFile naming the file and the reason."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{path}: not readable as JSON ({error})") from error


def append_line(path: Path, line: str) -> None:
    """Add one line, handed to the system at once; a line that does not fit on the disk leaves no part of itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        try:
            _write_all(descriptor, b"\n" * torn + line.rstrip("\n").encode("utf-8") + b"\n")
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read_records(path: Path, notices: list[str] | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; none when it is absent. Half a line, left by a kill, is no record; with
    `notices` such lines are counted there."""
    records, broken = [], 0
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            record = json.loads(line.decode("utf-8", errors="replace")) if line.strip() else None
        except ValueError:
            record, broken = None, broken + 1
        if isinstance(record, dict):
            records.append(record)
    if broken and notices is not None:
        notices.append(f"{path.name}: {broken} unreadable line{'s' if broken > 1 else ''} left out")
    return records


Facts = dict[str, Any]


def read_object(path: Path, notices: list[str]) -> Facts:
    """The JSON object in a file; empty when there is none, and a notice when it is damaged."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except DamagedFile as error:
        notices.append(f"{path.name} could not be read: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def is_number(value: Any) -> bool:
    """A finite int or float; not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

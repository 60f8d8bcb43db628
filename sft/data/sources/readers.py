"""Files -> rows, one at a time, with errors that name the file, the line and the remedy."""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet

from sft.data.sources.files import SourceError, kind_of_file
from sft.data.sources.shapes import MEDIA
from sft.data.sources.turns import is_repr

__all__ = ["ROWS_AT_ONCE", "SourceError", "read_file", "tables_to_rows"]

_BLANK = re.compile(r"[ \t\r\n]*")
ROWS_AT_ONCE = 1000  # rows of a table in memory
_NOTHING: tuple[Any, ...] = (None, "", [], {})


def read_file(path: Path, encoding: str | None, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Rows of a file of one of the types known, packed or not. `encoding` None is UTF-8 with or without a BOM.

    Raises:
        SourceError: the file cannot be read to its end. Rows before the fault have been yielded by then.
    """
    kind, packed = kind_of_file(path)
    try:
        refuse_others(path, kind, packed)
        if kind == ".parquet":
            yield from _read_parquet(path, wanted)
        else:
            yield from _TEXT_READERS[kind](TextFile(path, encoding or "utf-8-sig", packed))
    except UnicodeError as error:
        raise SourceError(wrong_encoding(TextFile(path, encoding or "utf-8", packed))) from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error


# What files of other kinds begin with, and what to do about it; spreadsheets are zip archives as well.
_OTHERS = {
    b"\x1f\x8b": "packed by gzip; name it {name}.gz",
    b"\x28\xb5\x2f\xfd": "packed by zstd; name it {name}.zst",
    b"PAR1": "a Parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"<!doctype": "a web page and not the data; download the file itself",
    b"<html": "a web page and not the data; download the file itself",
}


def refuse_others(path: Path, kind: str, packed: str | None) -> None:
    """Raises SourceError where the first bytes say that the file is something else than its name does."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version ") and b"git-lfs" in start:
        raise SourceError(f"{path}: a Git LFS pointer and not the data; run git lfs pull in that folder")
    page = start.lstrip().lower()
    found = next((text for mark, text in _OTHERS.items() if start.startswith(mark) or page.startswith(mark)), None)
    if found and not packed and kind != ".parquet":
        raise SourceError(f"{path}: {found.format(name=path.name)}")


class TextFile(NamedTuple):
    """A file of text, how it is encoded and how it is packed."""

    path: Path
    encoding: str
    packed: str | None = None

    def __str__(self) -> str:
        return str(self.path)

    def binary(self) -> Any:
        """The bytes it unpacks to, as a stream. Reading raises OSError where the file is cut or damaged."""
        return pa.input_stream(str(self.path), compression=self.packed) if self.packed else self.path.open("rb")

    def open(self, newline: str = "\n") -> TextIO:
        """Its text, as a stream."""
        return io.TextIOWrapper(self.binary(), self.encoding, newline=newline)


def tables_to_rows(tables: Iterator[Any], wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Rows of Arrow tables or batches with the columns that are wanted; of pictures and sounds, whether there is one.

    Nulls that Arrow filled into tools and calls are left out. Of every other column the first value is shown in one
    row, so that what nobody reads can be named.
    """
    shown: set[str] = set()
    for table in tables:
        names = [name for name in table.schema.names if name in wanted and name not in MEDIA]
        rows = table.select(names).to_pylist() if names else [{} for _ in range(table.num_rows)]
        for name in names:
            if _may_be_filled(table.schema.field(name).type):
                for row in rows:
                    row[name] = _unfilled(row[name])
        for name in MEDIA.intersection(table.schema.names):
            for row, value in zip(rows, table.column(name), strict=True):
                row[name] = value.is_valid and (len(value) > 0 if isinstance(value, pa.ListScalar) else True)
        for name in table.schema.names if rows else ():
            if name not in wanted and name not in shown:
                rows[0][name] = _first_value(table.column(name))
                shown.update([name] if rows[0][name] is not None else [])
        yield from rows


def _may_be_filled(kind: Any) -> bool:
    """Whether a type has objects inside objects, such as tools and the arguments of calls."""
    text = str(kind)
    return text.count("struct<") > 1 or "map<" in text


def _unfilled(value: Any) -> Any:
    """Without the nulls of keys that other rows have: a column of Arrow gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: _unfilled(inner) for key, inner in value.items() if inner is not None}
    return [_unfilled(inner) for inner in value] if isinstance(value, list) else value


def _first_value(column: Any) -> Any:
    """The first value that is there and not empty; None as well for what is no text and may be large."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return None
    return next((found for value in column if (found := value.as_py()) not in _NOTHING), None)


def _read_jsonl(file: TextFile) -> Iterator[dict[str, Any]]:
    if begins_a_list(file):
        yield from _read_json(file)  # a list of rows under the other name
        return
    with file.open() as lines:
        yield from json_lines(file, lines)


def begins_a_list(file: TextFile) -> bool:
    """Whether the first character that is no blank is a bracket."""
    with file.open() as text:
        while (character := text.read(1)).isspace():
            continue
    return character == "["


def json_lines(path: TextFile, lines: TextIO | list[str], first: int = 1) -> Iterator[dict[str, Any]]:
    """The rows of lines, of which the first is the `first` of its file. Raises SourceError."""
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}, line {number}: {_fault(error)}") from error
        except RecursionError as error:
            raise SourceError(f"{path}, line {number}: nested too deeply") from error
        yield _object(row, path, f"line {number}")


def _fault(error: json.JSONDecodeError) -> str:
    """What is broken at that place, in words."""
    if error.doc.startswith(("//", "/*", "#"), error.pos):
        return f"a comment (column {error.colno}), which JSON does not have; remove it"
    broken = f"broken JSON ({error.msg}, column {error.colno})"
    if is_repr(error.doc):
        return f"{broken}: it is Python's repr; write it with json.dumps"
    if error.msg == "Extra data" and error.doc.startswith(",", error.pos):
        return f"{broken}; lines of rows have no commas between them: remove it, or put [ and ] around all"
    if error.doc.strip() == "{":
        return f"{broken}; a row of .jsonl stands on one line"
    return broken


def _object(row: Any, path: TextFile, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"{path}, {place}: a row is an object with columns, this is {type(row).__name__}")
    return row


def _read_json(path: TextFile) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        text = file.read()
    start = _after_blank(text, 0)
    if text[start : start + 1] == "[":
        yield from _json_array(path, text, start + 1)
    elif len(text) == start:
        return
    elif (value := _one_value(text, start)) is not None:
        raise SourceError(f"{path}: one JSON value where a list of rows belongs: [{{...}}, {{...}}]{_place(value)}")
    else:
        yield from json_lines(path, text.split("\n"))


def _one_value(text: str, start: int) -> Any:
    """What the text is as a whole; None where it is several values or none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError:
        return None
    return value if _after_blank(text, end) == len(text) else None


def _place(value: Any) -> str:
    """Where in a value the rows seem to be, for people."""
    if not isinstance(value, dict):
        return ""
    lists = [key for key, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    if lists:
        return f'; the list under "{lists[0]}" may be it'
    columns = len(value) > 1 and all(isinstance(inner, list | dict) for inner in value.values())
    return '; these are columns: pandas writes rows with to_json(orient="records")' if columns else ""


def _after_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _json_array(path: TextFile, text: str, position: int) -> Iterator[dict[str, Any]]:
    """Elements one by one, so that only the text is held, not every row."""
    decode = json.JSONDecoder().raw_decode
    position = _after_blank(text, position)
    number = 0
    while text[position : position + 1] != "]":
        try:
            row, position = decode(text, position)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}, line {error.lineno}: {_fault(error)}") from error
        except RecursionError as error:
            line = text.count("\n", 0, position) + 1
            raise SourceError(f"{path}, line {line}: nested too deeply") from error
        number += 1
        yield _object(row, path, f"row {number}")
        position = _after_comma(path, text, position)
    if (end := _after_blank(text, position + 1)) < len(text):
        line = text.count("\n", 0, end) + 1
        raise SourceError(f"{path}, line {line}: broken JSON (text after the end of the list)")


def _after_comma(path: TextFile, text: str, position: int) -> int:
    position = _after_blank(text, position)
    following = text[position : position + 1]
    if following == ",":
        return _after_blank(text, position + 1)
    if following != "]":
        line = text.count("\n", 0, position) + 1
        raise SourceError(f"{path}, line {line}: broken JSON (a comma or the end of the list belongs here)")
    return position


def _read_csv(path: TextFile, delimiter: str = ",") -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
    with path.open(newline="") as file:
        first = file.readline()
    _refuse_other_delimiter(path, first, delimiter)
    with path.open(newline="") as file:
        reader = csv.DictReader(file, strict=True, delimiter=delimiter)
        try:
            reader.fieldnames = _column_names(path, reader.fieldnames or [])
            for row in reader:
                if None in row:
                    columns = len(reader.fieldnames or [])
                    raise SourceError(f"{path}, line {reader.line_num}: more fields than the {columns} columns")
                yield row
        except csv.Error as error:
            raise SourceError(f"{path}, line {reader.reader.line_num}: broken CSV ({error})") from error


def _column_names(path: TextFile, found: Sequence[str]) -> list[str]:
    """The names in the first line. Raises SourceError where one stands there twice: only the last would be read."""
    names = [name.strip() for name in found]
    if twice := sorted({name for name in names if names.count(name) > 1 and name}):
        raise SourceError(f"{path}: the column {', '.join(twice)} stands there twice; rename or remove one")
    return names


_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def _refuse_other_delimiter(path: TextFile, first: str, delimiter: str) -> None:
    """Raises SourceError where the line of names has another mark between them, more often than the expected."""
    other = max(_DELIMITERS, key=first.count)
    if first.count(other) > first.count(delimiter):
        remedy = "; or name it .tsv" if other == "\t" else "; or name it .csv" if other == "," else ""
        raise SourceError(
            f"{path}: its columns stand between {_DELIMITERS[other]}; put {_DELIMITERS[delimiter]} there{remedy}"
        )


def _read_tsv(path: TextFile) -> Iterator[dict[str, Any]]:
    yield from _read_csv(path, "\t")


def _read_parquet(path: Path, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from tables_to_rows(file.iter_batches(batch_size=ROWS_AT_ONCE), wanted)
    except pa.ArrowException as error:
        raise SourceError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def wrong_encoding(file: TextFile) -> str:
    """What to say of a file that is not in its encoding."""
    try:
        with file.binary() as stream:
            content = stream.read()
    except OSError as error:
        return f"{file}: {error}"  # it is damaged besides: that is the cause
    try:
        content.decode(file.encoding)
        place = "some of its text"
    except UnicodeError as error:
        place = f"byte {getattr(error, 'start', 0)}"
    remedy = _likely_encoding(file) or "its name"
    return (
        f'{file}: {place} is not {file.encoding}; give the source "encoding": "{remedy}" if that is how it was written'
    )


_TEXT_READERS: dict[str, Callable[[TextFile], Iterator[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}


# Tried in this order; the first that reads the whole file is suggested.
_LIKELY = ("utf-8-sig", "cp932", "euc_jp", "gb18030", "cp1252")
_CHARACTERS = 1 << 20  # read at once while an encoding is tried


def _likely_encoding(file: TextFile) -> str | None:
    """The first usual encoding that reads the file to its end, in constant memory; None when none does."""
    with file.binary() as stream:
        marked = stream.read(2) in (b"\xff\xfe", b"\xfe\xff")
    names = ("utf-16", *_LIKELY) if marked else _LIKELY
    return next((name for name in names if _reads(file._replace(encoding=name))), None)


def _reads(file: TextFile) -> bool:
    try:
        with file.open() as text:
            while text.read(_CHARACTERS):
                continue
    except UnicodeError:
        return False
    return True

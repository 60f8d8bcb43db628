"""Which column of a source is which: the shape of its rows, what a row lacks, what nobody reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.sources.files import SourceError
from sft.data.sources.readers import ROWS_AT_ONCE
from sft.data.sources.shapes import CHOOSING, MEDIA, SHAPES, Shape, shape_of
from sft.data.sources.turns import TURN_KEYS
from sft.errors import Problems

if TYPE_CHECKING:
    from sft.settings import Source

Row = dict[str, Any]
# Beside a `text` column these say that the text is a question and not a whole row to be trained.
_ANSWERS = frozenset(
    "output response completion answer answers label labels label_text target targets summary reply chosen".split()
)
# What is lost by length or for want of an answer needs no row to be understood, and is counted under one name.
_PLAIN = frozenset({"empty answer", "no answer", "over-long", "fully masked", "duplicate"})
_PREFERENCES = frozenset({"chosen", "rejected"})
_FLAG_NAME = re.compile("train|loss|mask|weight", re.IGNORECASE)
_ASKED_AND_SAID = (
    ("prompt", "question", "query", "problem", "instruction", "input", "source"),
    ("completion", "answer", "response", "output", "solution", "answers", "target", "reply", "chosen"),
)
_WITH_TURNS = ("messages", "conversations", "prompt", "completion")


@dataclass
class Tally:
    """How many rows had something, by what it was, and the number of the first row that had it."""

    rows: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, number: int) -> None:
        """One more row, the `number`th of its source."""
        self.rows[what] += 1
        self.first.setdefault(what, number)

    def update(self, other: Tally, before: int = 0) -> None:
        """Take in the rows of a later part of the source, whose numbers leave out `before` rows."""
        self.rows += other.rows
        self.first = {what: number + before for what, number in other.first.items()} | self.first

    def placed(self, of: str = "") -> dict[str, int]:
        """The counts, with the first row beside what tells too little without it; `of` names the source there."""
        return {
            what if what in _PLAIN or what not in self.first else f"{what} (row {self.first[what]}{of})": count
            for what, count in self.rows.items()
        }


class Columns:
    """The columns of one source. `unread` are those with text, and keys of turns with text, that nothing reads."""

    def __init__(self, source: Source) -> None:
        self.source, self.mapped = source, source.columns or {}
        self.unread: set[str] = set()
        self.number = 0  # rows seen
        self.usual: Shape | None = None
        self._shapes: dict[tuple[str, ...], Shape | None] = {}
        self._left: dict[tuple[str, ...], list[str]] = {}
        self._unseen = set(self.mapped.values())
        self._first: Row = {}

    def rows(self, raw_rows: Iterable[Row], dropped: Tally) -> Iterator[tuple[int, Row, Shape]]:
        """Every row with its number from 1, under our names for its columns, and its shape. Rows that lack a column the
        others have are counted in `dropped`.

        Raises:
            SourceError: no row has a known shape, or no row a column that was mapped.
            Problems: the columns can be read in several ways, or a mapped column is not read.
        """
        waiting: list[tuple[int, tuple[str, ...]]] = []
        self.number = number = 0
        for number, raw in enumerate(raw_rows, start=1):
            row = self._renamed(raw)
            columns = tuple(row)
            shape = self._shapes[columns] if columns in self._shapes else self._new_shape(columns, raw)
            if number == ROWS_AT_ONCE:
                self._require_shape()
            if shape is not None:
                self._look_for_unread(row, columns, shape)
                yield number, row, shape
            elif self.usual is None:
                waiting.append((number, columns))
            else:
                dropped.add(self._lacks(columns), number)
        self.number = number
        if number:
            self._require_shape()
        for place, columns in waiting:
            dropped.add(self._lacks(columns), place)

    def _renamed(self, row: Row) -> Row:
        """`columns` is {our name: theirs}; the person's choice wins over a column that already has our name."""
        if not self.mapped:
            return row
        taken = {ours: row[theirs] for ours, theirs in self.mapped.items() if theirs in row}
        return {**{name: value for name, value in row.items() if name not in self.mapped.values()}, **taken}

    def _new_shape(self, columns: tuple[str, ...], raw: Row) -> Shape | None:
        self._first = self._first or raw
        self._unseen -= raw.keys()
        shape = shape_of(columns, self.mapped)
        if shape is not None and shape.name == "text":
            shape = None if self.usual not in (None, shape) else self._plain_text(columns, shape)
        if shape is not None and self.usual is None:
            self._require_use(shape)
            self.usual = shape
        self._shapes[columns] = shape
        if shape is not None:
            self._left[columns] = [name for name in columns if name not in shape.columns | CHOOSING | MEDIA]
        return shape

    def _plain_text(self, columns: tuple[str, ...], shape: Shape) -> Shape:
        """The shape of rows that are text alone. Raises Problems where a column beside it looks like an answer."""
        beside = sorted(_ANSWERS.intersection(columns))
        if beside and "text" not in self.mapped:
            asked = f'"columns": {{"prompt": "text", "completion": "{beside[0]}"}}'
            raise Problems([
                f'{self.source.id}: the column text stands beside {", ".join(beside)}; say in SFT_DATASET_MIX whether'
                f' it asks for that ({asked}) or is trained whole ("columns": {{"text": "text"}})'
            ])  # fmt: skip
        return shape

    def _require_use(self, shape: Shape) -> None:
        unused = sorted(set(self.mapped) - shape.columns - CHOOSING)
        if unused:
            read = ", ".join(sorted(shape.columns | CHOOSING))
            raise Problems([
                f'{self.source.id}: "columns" maps {", ".join(unused)}, which rows of {shape.name} do not have;'
                f" leave it out, or map one of {read}"
            ])  # fmt: skip

    def _require_shape(self) -> None:
        there = ", ".join(map(str, self._first))
        if self._unseen:
            raise SourceError(f'"columns" names {", ".join(sorted(self._unseen))}, but the columns are {there}')
        if self.usual is None:
            known = "; ".join(shape.name for shape in SHAPES)
            raise SourceError(
                f"its columns are {there}, which is none of the known shapes ({known}); "
                f'say which column is which with "columns": {_likely(self._first)}{self._hint()}'
            )

    def _hint(self) -> str:
        if self._first.keys() >= _PREFERENCES:
            column = "messages" if isinstance(self._first["chosen"], list) else "completion"
            return (
                f'; chosen and rejected are preferences: "columns": {{"{column}": "chosen"}} trains the chosen answers'
            )
        if {".csv", ".tsv"}.intersection(Path(self.source.id.lower()).suffixes):
            return "; the first line of the file must name the columns"
        return ""

    def _lacks(self, columns: tuple[str, ...]) -> str:
        """What the usual shape needs and these columns don't have."""
        assert self.usual is not None
        missing = sorted(self.mapped.get(name, name) for name in self.usual.required.difference(columns))
        return f"no {' and no '.join(map(repr, missing))}".replace("'", '"') if missing else "other columns"

    def _look_for_unread(self, row: Row, columns: tuple[str, ...], shape: Shape) -> None:
        left = self._left[columns]
        if left:
            found = [n for n in left if n in self.unread or (n and (_has_text(row[n]) or _is_flag(n, row[n])))]
            self.unread.update(found)
            self._left[columns] = [name for name in left if name not in found]
        for column in _WITH_TURNS:
            if column in shape.required and isinstance(row[column], list):
                self.unread.update(f"{column}.{key}" for turn in row[column] for key in _unread_keys(turn))


def _likely(row: Row) -> str:
    """A mapping for columns of known names in capitals, or of names that others use for question and answer."""
    named = {str(name).strip().lower(): name for name in row}
    shape = shape_of(named)
    if shape is not None:
        return json.dumps({ours: named[ours] for ours in sorted(shape.columns & named.keys())}, ensure_ascii=False)
    if turns := [name for name, value in row.items() if isinstance(value, list) and value and _is_turn(value[0])]:
        return json.dumps({"messages": turns[0]}, ensure_ascii=False)
    found = [next((named[name] for name in names if name in named), "...") for names in _ASKED_AND_SAID]
    return json.dumps(dict(zip(("prompt", "completion"), found, strict=True)), ensure_ascii=False)


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value.keys() & {"role", "from"})


def _unread_keys(turn: Any) -> Iterator[str]:
    if isinstance(turn, Mapping) and len(turn) > 2:
        yield from (key for key in turn if key not in TURN_KEYS and (_has_text(turn[key]) or _is_flag(key, turn[key])))


def _is_flag(key: Any, value: Any) -> bool:
    """Whether a key may say that a turn, or a column that a row, is not to be trained."""
    return isinstance(value, bool) or (value is not None and bool(_FLAG_NAME.search(str(key))))


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(_has_text, value.values()))
    return isinstance(value, list) and any(map(_has_text, value))


def reason_of(dropped: Exception, row: Row) -> str:
    """The reason a row is counted under, with what its columns tell besides."""
    if str(dropped) == "no answer" and row.keys() >= _PREFERENCES:
        return "no answer but chosen and rejected, which are preferences and not trained on"
    return str(dropped)

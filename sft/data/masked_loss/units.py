"""Units of an answer: each occurrence of an edge, with the characters of the edge's child. Text only, any tokenizer."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from sft.data.masked_loss.json_scan import canonical, scan
from sft.scoring.edges import ARROW
from sft.scoring.payload import payload_spans

_LONGEST_LABEL = 80  # characters of a title or value shown to people


class Unit(NamedTuple):
    """One occurrence: the edge's identity (JSON text, see `label`) and the child's characters in the answer."""

    edge: str
    start: int
    end: int


def render_paths(paths: Iterable[Sequence[str]]) -> str:
    """The answer of an ontology row (document 003): a line `A -> B -> C` with a newline per path not empty."""
    return "".join(" -> ".join(path) + "\n" for path in paths if path)


def answer_units(
    answer: str,
    unit: Literal["path_edge", "json_edge"],
    *,
    payload_start: int = 0,
    paths: Iterable[Sequence[str]] | None = None,
) -> list[Unit] | None:
    """The units of an answer by the value of SFT_MASKED_LOSS_UNIT; None where `json_edge` finds no JSON payload.

    `paths` are an ontology row's own; they count where the answer is their rendering, give or take white space around.
    """
    if unit == "json_edge":
        return json_edges(answer, payload_start)
    rendered, units = path_edges_from_paths(paths or ())
    if not units or rendered.strip() != answer.strip():
        return path_edges(answer)
    shift = _indent(answer) - _indent(rendered)
    return [Unit(edge, start + shift, end + shift) for edge, start, end in units]


def path_edges(answer: str) -> list[Unit]:
    """The units of an answer written as lines `A -> B -> C`: each word but the first is a child of the word before it.

    An arrow is `->` with white space or a line end on both sides. Lines without one hold no unit.
    """
    units: list[Unit] = []
    start = 0
    for line in answer.split("\n"):
        arrows = [match.span() for match in ARROW.finditer(line)]
        if arrows:
            borders = [0, *(edge for arrow in arrows for edge in arrow), len(line)]
            spans = zip(borders[::2], borders[1::2], strict=True)
            units += _path_units(answer, [(start + left, start + right) for left, right in spans])
        start += len(line) + 1
    return units


def path_edges_from_paths(paths: Iterable[Sequence[str]]) -> tuple[str, list[Unit]]:
    """The rendered answer and its units: titles with arrows or newlines in them keep their borders here."""
    paths = [path for path in paths if path]
    answer = render_paths(paths)
    units: list[Unit] = []
    start = 0
    for path in paths:
        words = []
        for title in path:
            words.append((start, start + len(title)))
            start += len(title) + len(" -> ")
        start += len("\n") - len(" -> ")
        units += _path_units(answer, words)
    return answer, units


def json_edges(answer: str, payload_start: int = 0) -> list[Unit] | None:
    """The units of the JSON payload from character `payload_start` on (where the output marker ended, 0 without one).

    A key is a child of its object's key path, a scalar one of its own key path; strings count without their quotes.
    Returns None where no JSON object or list is found: such a row is trained unmasked and counted by the caller.
    """
    for start, end in payload_spans(answer, payload_start):
        leaves = scan(answer, start, end)
        if leaves is not None:
            return [Unit(f'["{kind}", [{path}], {name}]', left, right) for kind, path, name, left, right in leaves]
    return None


def readable_edge(edge: str) -> str:
    """An edge for people: `disease -> skin disease`, `address.city` for a key, `address.city: Osaka` for a value."""
    kind, parent, child = json.loads(edge)
    if kind == "path":
        return f"{_shown(parent)} -> {_shown(child)}"
    if kind == "key":
        return _key_path([*parent, child])
    return f"{_key_path(parent)}: {_shown(child) if isinstance(child, str) else json.dumps(child)}"


def _key_path(path: list[Any]) -> str:
    """`items[].name`; names with dots, brackets or line breaks in them stand in quotes."""
    shown = ""
    for element in path:
        if element == []:
            shown += "[]"
        else:
            name = "…" if isinstance(element, dict) else _shown(element)
            name = json.dumps(name, ensure_ascii=False) if re.search(r"[.\[\]:]", name) else name
            shown += f".{name}" if shown else name
    return shown


def _shown(text: str) -> str:
    text = text if text.isprintable() else json.dumps(text, ensure_ascii=False)
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _path_units(answer: str, words: list[tuple[int, int]]) -> list[Unit]:
    """Units of one path from the words' spans; white space around a title is no part of it."""
    units = []
    parent = None
    for start, end in words:
        word = answer[start:end]
        child = word.strip()
        start += _indent(word)
        if parent is not None:
            units.append(Unit(f'["path", {canonical(parent)}, {canonical(child)}]', start, start + len(child)))
        parent = child
    return units


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())

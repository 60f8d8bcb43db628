"""The figure StructEval-T itself gives an answer, to the digit, with the quirks of the benchmark's own program.

Source of the rules: rendering and evaluation of the non-renderable tasks in https://github.com/TIGER-AI-Lab/StructEval.
What they make of an answer: escapes are decoded everywhere (which garbles text that is not ASCII), the first code fence
anywhere wins, prose is YAML, any text is CSV, and TOML is read by the `toml` package, which knows TOML 0.5. Only texts
beyond the limits of sft.scoring.formats differ: they have no figure above 0.
"""

import codecs
import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import toml

from sft.scoring.formats import (
    MAX_DEPTH,
    MAX_PAYLOAD,
    PARSER_ERRORS,
    PlainYamlLoader,
    TooLarge,
    check_size,
    load_xml,
    load_yaml,
)
from sft.scoring.payload import MAX_ANSWER

_MARKED = re.compile(r"<\|BEGIN_CODE\|>[ \t]*\n?(.*?)(?:<\|END_CODE\|>|$)", re.DOTALL | re.IGNORECASE)
_LONGEST_YAML = 20_000  # characters; PyYAML in pure Python needs 0.5 s for them
_PATH_TOKEN = re.compile(r"\[[^\]]*\]|\[.*|(?:`[^`]*`?|[^.`\[])+")


def structeval_score(answer: str, output_format: str, paths: Sequence[str]) -> float | None:
    """round(0.2 * renders + 0.8 * share of the key paths that exist, 2), for at least one path; within [0, 1]. None for
    a format that the benchmark does not have."""
    if output_format not in _LOADERS:
        return None
    code = extract_code(answer) if len(answer) <= MAX_ANSWER else None
    if code is None or len(code) > MAX_PAYLOAD:
        return 0.0
    try:
        value = _LOADERS[output_format](code)
        check_size(value)
    except (*PARSER_ERRORS, RecursionError):
        return 0.0
    if not value:
        return 0.0
    found = sum(path_exists(value, path) for path in paths)
    return round(0.2 + 0.8 * (found / len(paths)), 2)


def extract_code(answer: str) -> str | None:
    """What the benchmark saves as the answer's file and reads back; None where saving fails."""
    text = answer.replace("&lt;", "<").replace("&gt;", ">").replace("<think>\n\n</think>\n\n", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes that mean nothing
            text = codecs.decode(text, "unicode_escape")
    except UnicodeError:
        pass
    marked, fence = _MARKED.search(text), text.find("```")
    opened = text.find("\n", fence) if fence >= 0 else -1  # of the first fence that a line ends after
    if marked and not marked[1] and (opened < 0 or marked.start() < fence):
        return None  # nothing between the marks: the program raises
    code = text[opened:].partition("```")[0] if opened >= 0 else marked[1] if marked else text
    code = code.strip()
    try:
        code.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return code.replace("\r\n", "\n").replace("\r", "\n")


def _load_yaml(code: str) -> Any:
    if len(code) > _LONGEST_YAML:
        raise TooLarge(f"longer than {_LONGEST_YAML:,} characters")
    return load_yaml(code, PlainYamlLoader)


def _load_toml(code: str) -> dict[str, Any]:
    depth = deepest = 0  # the package copies a list once for every list around it
    for bracket in re.findall(r"[\[\]{}]", code):
        depth = max(depth + (1 if bracket in "[{" else -1), 0)
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise TooLarge(f"nested deeper than {MAX_DEPTH} levels")
    return toml.loads(code)


def _load_csv(code: str) -> dict[str, Any]:
    """A table is never empty; rows are filled up to the header, as csv.DictReader does it."""
    reader = csv.DictReader(io.StringIO(code, newline=""))
    return {"csv_headers": list(reader.fieldnames or ()), "csv_rows": list(reader)}


# The benchmark's formats: what sft.scoring.formats has besides has no figure here.
_LOADERS: dict[str, Callable[[str], Any]] = {
    "json": json.loads,
    "yaml": _load_yaml,
    "toml": _load_toml,
    "xml": partial(load_xml, doctype=True),
    "csv": _load_csv,
}


def path_exists(value: Any, path: str) -> bool:
    """StructEval's path grammar: dots, `[n]`, `*` for any list element, back-ticks quote a key, `csv::Header`, and
    `@attr` falls back to `attr`. A malformed path exists nowhere (StructEval raises)."""
    nodes = [value]
    for token in _path_tokens(path):
        nodes = [child for node in nodes for child in _step(node, token)]
    return bool(nodes)


def _path_tokens(path: str) -> list[str]:
    if path.startswith("csv::"):
        return [path]
    tokens = (token if token.startswith("[") else token.replace("`", "") for token in _PATH_TOKEN.findall(path))
    return [token for token in tokens if token]


def _step(node: Any, token: str) -> Iterator[Any]:
    """The children of a node that a token names: none, one, or with `*` all elements of a list."""
    if token == "*":
        yield from node if isinstance(node, list) else ()
    elif token.startswith("["):
        if isinstance(node, list) and (index := _index(token)) is not None and 0 <= index < len(node):
            yield node[index]
    elif isinstance(node, dict):
        if token.startswith("csv::") and "csv_headers" in node:
            yield from [True] * (token.removeprefix("csv::") in node["csv_headers"])
        elif token in node:
            yield node[token]
        elif token.startswith("@") and token.removeprefix("@") in node:
            yield node[token.removeprefix("@")]


def _index(token: str) -> int | None:
    try:
        return int(token[1:-1]) if token.endswith("]") else None
    except ValueError:
        return None

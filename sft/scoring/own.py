"""What a person brings to judge answers by: a function in a Python file (SFT_GEN_EVAL=metric.py:function) and a
JSON Schema (SFT_JSON_SCHEMA, through the jsonschema package)."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.scoring.formats import read
from sft.scoring.metrics import NAMES
from sft.scoring.payload import find_payload, whole

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

PREFIX = "gen_"
SCHEMA_METRIC = "gen_schema_rate"
_LONGEST = 200  # characters of a schema's error: it quotes the value that is wrong


class MeasureError(Exception):
    """The file or the function can't be used; the message says why."""


class Own(NamedTuple):
    """`lower`: the names, with gen_, of the numbers for which less is better."""

    function: Callable[[list[str], list[dict[str, Any]]], Any]
    file: Path
    lower: frozenset[str]


class Measured(NamedTuple):
    """Numbers by name, and what was wrong with the rest."""

    metrics: dict[str, float]
    complaints: list[str]


def parts_of(kind: str) -> tuple[Path, str] | None:
    """File and function of a measure of one's own; None for a kind that is built in."""
    file, colon, function = kind.rpartition(":")
    return (Path(file), function) if colon and file and function else None


def load_own(kind: str) -> Own | None:
    """The measure; None where the kind is built in. The file is run once as long as it does not change.

    Raises:
        MeasureError: it can't be read or run, or has no such function.
    """
    if (found := parts_of(kind)) is None:
        return None
    try:
        changed = found[0].stat().st_mtime_ns
    except OSError as error:
        raise MeasureError(f"{found[0]} can't be read ({error.strerror}); correct the path") from error
    return _load(*found, changed)


@lru_cache(maxsize=16)
def _load(file: Path, name: str, changed: int) -> Own:
    specification = importlib.util.spec_from_file_location(f"own_measure_{file.stem}", file)
    if specification is None or specification.loader is None:
        raise MeasureError(f"{file} is no Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses and the like look themselves up there
    if str(file.parent.resolve()) not in sys.path:
        sys.path.append(str(file.parent.resolve()))  # what it imports from beside itself
    _, failure = _attempt(file, specification.loader.exec_module, module)
    if failure:
        raise MeasureError(f"{file} can't be run: {failure}")
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, each in vars(module).items() if callable(each) and not n.startswith("_")]
        there = f"it has {', '.join(own)}" if own else "it has none"
        raise MeasureError(f"{file} has no function {name}; {there}")
    named = getattr(function, "lower_is_better", ())
    lower = frozenset(metric_name(str(each)) for each in ([named] if isinstance(named, str) else named))
    if taken := sorted(lower.intersection(NAMES)):
        raise MeasureError(f"lower_is_better names {taken[0]}, for which more is better everywhere; call it otherwise")
    return Own(function, file, lower)


def metric_name(name: str) -> str:
    """gen_<name>, with characters that trackers refuse as underscores."""
    plain = "".join(each if each.isalnum() or each in "_-./" else "_" for each in name.removeprefix(PREFIX))
    return f"{PREFIX}{plain}"


def lower_is_better(kind: str) -> frozenset[str] | None:
    """The names of a measure's own numbers for which less is better; None where the kind is built in."""
    own = load_own(kind)
    return own and own.lower


def measure(own: Own, answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Measured:
    """What the function says of the answers. Whatever it does, this raises nothing.

    It gets copies: a list of texts, and one dict per answer with `task`, `prompt` (messages) and `reference`.
    """
    given = [copy.deepcopy(dict(row)) for row in rows]
    result, failure = _attempt(own.file, own.function, list(answers), given)
    if failure:
        return Measured({}, [failure + _failing_row(own, answers, rows, failure)])
    name = getattr(own.function, "__name__", "score")
    numbers = result if isinstance(result, Mapping) else {name: result}
    metrics, complaints = {}, []
    for key, value in numbers.items():
        number = _number(value)
        if number is None:
            complaints.append(f"{key} is {type(value).__name__} {str(value)[:40]!r}, which is no number")
        elif not math.isfinite(number):
            complaints.append(f"{key} is {number}")
        else:
            metrics[metric_name(str(key))] = number
    return Measured(metrics, complaints or ([] if numbers else ["it gave no numbers"]))


def _number(value: Any) -> float | None:
    """Also of numpy and torch; a text is no number, whatever stands in it."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _failing_row(own: Own, answers: Sequence[str], rows: Sequence[Mapping[str, Any]], failure: str) -> str:
    """` (row 3: how its answer begins)`: the first that fails alone in the same way; "" where none does."""
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True), 1):
        if _attempt(own.file, own.function, [answer], [copy.deepcopy(dict(row))])[1] == failure:
            return f" (row {number}: {' '.join(answer.split())[:60]!r})"
    return ""


def _attempt(file: Path, call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What the call gives, or what went wrong with the line of the file it went wrong in. A person's code may raise
    anything, and may want to exit: neither ends a run."""
    try:
        return call(*arguments), ""
    except (Exception, SystemExit) as error:
        text = next(iter(str(error).splitlines()), "")
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(file)]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = f" in line {line}" if line else ""
        return None, f"{type(error).__name__}{where}{f': {text}' if text else ''}"


def load_schema(path: Path) -> Validator:
    """What answers are held to.

    Raises:
        ValueError: the file can't be read or holds no schema; says what is wrong, and a remedy.
    """
    try:
        return _validator(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise ValueError(f"can't be read ({error.strerror}); name a file with a JSON Schema") from None


@lru_cache(maxsize=4)
def _validator(path: Path, changed: int) -> Validator:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    try:
        schema = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({str(error).splitlines()[0]}); name a file with a JSON Schema") from None
    if not isinstance(schema, dict | bool):
        raise ValueError(f"is no schema but a {type(schema).__name__}; a JSON Schema is an object")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"is no schema: {_in_words(error.json_path, error.message)}; correct it") from None
    return kind(schema, registry=Registry())  # without one a $ref to the network would be fetched


def first_error(validator: Validator, answer: str, markers: Sequence[str]) -> str | None:
    """What is wrong with an answer's payload first, with its place; None where it holds to the schema."""
    from referencing.exceptions import Unresolvable

    readings = [(text, read(text, "json")) for text in (whole(answer).text, find_payload(answer, markers).text)]
    held = next((each for text, each in readings if each.value is not None or text.strip() == "null"), None)
    if held is None:
        return f"does not parse as JSON: {readings[-1][1].note}"
    try:
        errors = sorted(validator.iter_errors(held.value), key=lambda error: [str(p) for p in error.absolute_path])
    except Unresolvable as error:
        return f"the schema's $ref {error.ref} leads nowhere"
    except RecursionError:
        return "the schema or the answer is nested too deeply"
    return _in_words(errors[0].json_path, errors[0].message) if errors else None


def _in_words(place: str, message: str) -> str:
    text = f"{place}: {' '.join(message.split())}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"

"""Answers held to a JSON Schema (SFT_JSON_SCHEMA), with the jsonschema package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sft.scoring.formats import read
from sft.scoring.payload import find_payload, whole

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

METRIC = "gen_schema_rate"
_LONGEST = 200  # characters of an error: it quotes the value that is wrong


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

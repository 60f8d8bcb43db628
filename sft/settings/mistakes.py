"""Settings from texts, with every mistake in words: "NAME=value: what is wrong; remedy (place)"."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from sft.settings.env_file import Given, Location, Problem, attribute_of, closest, name_of, printable, shown
from sft.settings.rules import Conflict, conflicts
from sft.settings.values import NotJson, one_of

Model = TypeVar("Model", bound=BaseModel)

_NOWHERE = Location(3, 0, "not set")
_WANTED = {"base_model": "hub id or model folder", "out_lora_dir": "path of the results, without _stageN"}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_NUMBER = "write one such as 0.1 or 1e-4"
_WORDS = {
    "missing": "is missing; add it",
    "int_parsing": "is not a whole number; write digits only",
    "int_from_float": "is not a whole number; write digits only",
    "int_parsing_size": "is too large; give a smaller number",
    "int_type": "is not a whole number; write digits without quotes",
    "float_parsing": f"is not a number; {_NUMBER}",
    "float_type": "is not a number; write it without quotes",
    "finite_number": f"is not a finite number; {_NUMBER}",
    "string_type": "is not a text; put it in double quotes",
    "string_too_short": "is empty; write it out, or leave it out",
    "string_unicode": "contains broken characters; save it as UTF-8",
    "dict_type": 'is no JSON object; write {"ours": "theirs"}',
    "model_type": 'is no JSON object; write {"id": "..."}',
    "model_attributes_type": 'is no JSON object; write {"id": "..."}',
}
"""Kind of pydantic error -> what is wrong and the remedy."""


def validate(
    model: type[Model], fixed: Mapping[str, Any], *, texts: Mapping[str, str], given: Given, context: Mapping[str, Any]
) -> tuple[Model, list[Problem]]:
    """The settings and what is wrong with them.

    Texts that fail stand aside for a second pass, so that the rules joining settings see all the others.
    """
    failed: set[str] = set()
    problems: list[Problem] = []
    try:
        settings = model.model_validate({**fixed, **texts}, context=dict(context))
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        failed = {str(mistake["loc"][0]) for mistake in mistakes}
        problems = [problem for mistake in mistakes for problem in _mistake_problems(model, mistake, given)]
        sound = {attribute: text for attribute, text in texts.items() if attribute not in failed}
        stand_ins = dict.fromkeys(failed & _WANTED.keys(), "stand-in")
        settings = model.model_validate({**fixed, **sound, **stand_ins}, context=dict(context))
    failed |= {attribute_of(name) for name in given.unreadable}
    for conflict in conflicts(settings):
        if not (failed & {attribute_of(name) for name in conflict.names} or (conflict.absence and given.is_missing)):
            problems.append(_conflict_problem(conflict, settings, given))
    return settings, problems


def _mistake_problems(model: type[Model], mistake: Mapping[str, Any], given: Given) -> list[Problem]:
    """One problem, or none where a setting is missing because its line or its file cannot be read."""
    attribute = str(mistake["loc"][0])
    name = name_of(attribute)
    place = given.places.get(name, _NOWHERE)
    if mistake["type"] == "missing" and len(mistake["loc"]) == 1:
        if given.is_missing or name in given.unreadable:
            return []
        text = f"{name}=: is not set; write {name}=<{_WANTED[attribute]}>"
        return [Problem(place, f"{text} in {given.file_name}")]
    annotation = model.model_fields[attribute].annotation
    text = _explain(mistake, name=name, annotation=annotation, place=place, value=given.values.get(name, ""))
    return [Problem(place, text)]


def _conflict_problem(conflict: Conflict, settings: BaseModel, given: Given) -> Problem:
    name = conflict.names[0]
    place = given.places.get(name, _NOWHERE)
    value = given.values.get(name) or getattr(settings, attribute_of(name)) or ""
    return Problem(place, f"{shown(name, value)}: {conflict.text} ({place})")


def _explain(mistake: Mapping[str, Any], *, name: str, annotation: Any, place: Location, value: str) -> str:
    kind, context = mistake["type"], mistake.get("ctx", {})
    if isinstance(context.get("error"), NotJson):
        return _explain_json(context["error"], name=name, place=place)
    words = _words(kind, context, annotation=annotation, loc=mistake["loc"], value=mistake["input"])
    within = _within(mistake["loc"][1:], kind, mistake["input"])
    return f"{f'{name} {within}' if within else shown(name, value)}: {words or mistake['msg']} ({place})"


def _explain_json(error: NotJson, *, name: str, place: Location) -> str:
    remedy = f"write {name} as JSON, single quotes outside, double quotes inside"
    where = f"{place.origin} line {place.line + error.line - 1}" if place.line else place.origin
    return f"[WARNING] Failed to parse {name.removeprefix('SFT_')}: {error.reason}; {remedy} ({where}){error.pointer}"


def _within(loc: tuple[Any, ...], kind: str, value: object) -> str:
    """Which entry and key of a JSON value a mistake is about, with the value."""
    if not loc:
        return ""
    entry = f"entry {loc[0] + 1}" if isinstance(loc[0], int) else f'"{printable(loc[0])}"'
    key = "".join(f' "{printable(part)}"' for part in loc[1:] if part != "[key]")
    written = printable(json.dumps(value, ensure_ascii=False, default=str))[:60]
    return entry + key + ("" if kind in ("missing", "extra_forbidden") else f"={written}")


def _words(kind: str, context: Mapping[str, Any], *, annotation: Any, loc: tuple[Any, ...], value: object) -> str:
    """What is wrong and the remedy; "" for a kind of error that has no words here."""
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return one_of(value, literals(annotation))
    if kind == "extra_forbidden":
        known = tuple(get_args(annotation)[0].model_fields)
        near = closest(str(loc[-1]), known)
        return f"is an unknown key; {f'did you mean {near}?' if near else 'known are ' + ', '.join(known)}"
    if kind in _BOUNDS:
        asked, bound = _BOUNDS[kind]
        limit = context[bound]
        return f"is out of range; give {asked} {int(limit) if limit == int(limit) else limit}"
    return _WORDS.get(kind, "")


def literals(annotation: Any) -> tuple[str, ...]:
    """The choices of a `Literal`, also of one that may be None; () for any other type."""
    parts = () if annotation is None or isinstance(annotation, type) else get_args(annotation)
    if parts and all(isinstance(part, str) for part in parts):
        return parts
    return next((found for part in parts if (found := literals(part))), ())

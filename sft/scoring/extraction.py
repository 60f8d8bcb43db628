"""Scores of extraction answers: document 001's metrics, for its task or for any flat JSON answer.

Document 001's answers are `{"persons": [...], "occured_locations": [...], "police_departments": [...]}`; the offenders
among the persons are flattened to eight texts, which are compared. Any other flat schema is a list of field names, the
first of which plays the part of the offender's name: is there one, and are the names right?
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sft.scoring.formats import check_size
from sft.scoring.metrics import EXTRACTION_FIELDS
from sft.scoring.payload import MAX_ANSWER, without_thinking

# Flat field -> key of a person. "occured" is spelt as in document 001.
_PERSON_KEYS = {
    "person_name": "name",
    "person_age_at_published": "age",
    "person_position_name": "position",
    "person_belongs_company": "affiliation",
    "person_address": "address",
    "person_violated_law": "act",
}
_LIST_KEYS = ("occured_locations", "police_departments")


def parse_object(answer: str) -> dict[str, Any] | None:
    """The JSON object from the first `{` to the last `}` after `</think>`, or None."""
    if len(answer) > MAX_ANSWER:
        return None
    text = without_thinking(answer)
    begin, end = text.find("{"), text.rfind("}")
    if end < begin or begin < 0:
        return None
    try:
        value = json.loads(text[begin : end + 1])
        check_size(value)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def flatten_persons(answer: Mapping[str, Any]) -> dict[str, str]:
    """Document 001's eight texts: offenders' values joined by "/", places and departments by ",", all empty without an
    offender."""
    persons = answer.get("persons")
    offenders = [
        person
        for person in (persons if isinstance(persons, list) else [])
        if isinstance(person, dict) and person.get("is_offender") is True
    ]
    fields = {field: "/".join(_text(person.get(key)) for person in offenders) for field, key in _PERSON_KEYS.items()}
    for key in _LIST_KEYS:
        places = answer.get(key)
        fields[key] = ",".join(map(_text, places)) if offenders and isinstance(places, list) else ""
    return fields


class _Schema(NamedTuple):
    fields: tuple[str, ...]  # what is compared
    name_field: str  # what presence and names are read from
    flatten: Callable[[Mapping[str, Any]], dict[str, str]]
    accepts: Callable[[Mapping[str, Any]], bool]


def score_rows(
    pairs: Sequence[tuple[str, str]], *, fields: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Score (answer, reference) pairs; `fields` names some of document 001's fields, or those of another flat schema.

    Returns one dict a pair (`score`: share of equal fields; None where the reference does not parse, which leaves the
    pair out of every metric) and the metrics of all pairs, {} when no reference parses.
    """
    names = tuple(fields) or EXTRACTION_FIELDS
    persons = set(names) <= set(EXTRACTION_FIELDS)
    schema = _persons_schema(names) if persons else _flat_schema(names)
    rows = [_score_row(parse_object(answer), parse_object(reference), schema) for answer, reference in pairs]
    judged = [row for row in rows if row["score"] is not None]
    metrics = _metrics(judged, schema.fields) if judged else {}
    public = ("score", "parses", "schema_ok", "matched_fields", "note")
    return [{key: row[key] for key in public} for row in rows], metrics


def _persons_schema(names: tuple[str, ...]) -> _Schema:
    lists = ("persons", *_LIST_KEYS)
    return _Schema(
        names,
        "person_name",
        flatten_persons,
        lambda answer: all(isinstance(answer.get(key), list) for key in lists),
    )


def _flat_schema(names: tuple[str, ...]) -> _Schema:
    return _Schema(
        names,
        names[0],
        lambda answer: {name: _text(answer.get(name)) for name in names},
        lambda answer: all(name in answer for name in names),
    )


def _score_row(given: dict[str, Any] | None, gold: dict[str, Any] | None, schema: _Schema) -> dict[str, Any]:
    gold_fields = schema.flatten(gold) if gold is not None else {}
    given_fields = schema.flatten(given) if given is not None else {}
    matched = [name for name in schema.fields if given is not None and given_fields[name] == gold_fields.get(name)]
    return {
        "score": len(matched) / len(schema.fields) if gold is not None else None,
        "parses": given is not None,
        "schema_ok": given is not None and schema.accepts(given),
        "matched_fields": matched,
        "note": "the reference is not a JSON object" if gold is None else "no JSON object" if given is None else "",
        "given_name": given_fields.get(schema.name_field, ""),
        "gold_name": gold_fields.get(schema.name_field, ""),
    }


def _metrics(rows: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> dict[str, float]:
    """Document 001's metrics over rows whose reference parses (at least one)."""
    total = len(rows)
    metrics = {
        "gen_samples": float(total),
        "gen_json_parse_rate": sum(row["parses"] for row in rows) / total,
        "gen_schema_ok_rate": sum(row["schema_ok"] for row in rows) / total,
        **_presence_metrics(rows),
        "gen_offender_name_set_f1": _name_set_f1(rows),
        "gen_all_fields_exact_match_rate": sum(len(row["matched_fields"]) == len(names) for row in rows) / total,
        "gen_avg_pred_offender_count": sum(len(_names(row["given_name"])) for row in rows) / total,
        "gen_avg_gold_offender_count": sum(len(_names(row["gold_name"])) for row in rows) / total,
    }
    for name in names:
        metrics[f"gen_field_exact_match_rate/{name}"] = sum(name in row["matched_fields"] for row in rows) / total
    return metrics


def _presence_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    outcomes = [(bool(row["given_name"]), bool(row["gold_name"])) for row in rows]
    both, given_only = outcomes.count((True, True)), outcomes.count((True, False))
    gold_only, neither = outcomes.count((False, True)), outcomes.count((False, False))
    return {
        "gen_offender_presence_precision": ratio(both, both + given_only),
        "gen_offender_presence_recall": ratio(both, both + gold_only),
        "gen_offender_presence_f1": f1(both, given_only, gold_only),
        "gen_fp_rate_on_negative": ratio(given_only, given_only + neither),
    }


def _name_set_f1(rows: Sequence[Mapping[str, Any]]) -> float:
    sets = [(set(_names(row["given_name"])), set(_names(row["gold_name"]))) for row in rows]
    found = sum(len(given & gold) for given, gold in sets)
    return f1(found, sum(len(given - gold) for given, gold in sets), sum(len(gold - given) for given, gold in sets))


def _names(joined: str) -> list[str]:
    return [name.strip() for name in joined.split("/") if name.strip()]


def _text(value: Any) -> str:
    """A value as the text that is compared; lists of another schema are joined like names."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "/".join(map(_text, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    return str(value).strip()


def ratio(part: float, whole: float) -> float:
    """part / whole, or 0 when there is no whole."""
    return part / whole if whole else 0.0


def f1(true_positives: int, false_positives: int, false_negatives: int) -> float:
    """The harmonic mean of precision and recall."""
    return ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives)

"""Extraction metrics of document 001 equal those computed by hand."""

import json

import pytest

from sft.scoring.extraction import flatten_persons, parse_object, score_rows
from sft.scoring.metrics import EXTRACTION_FIELDS
from sft.scoring.score import score


def offender(name="", **values):
    return {"name": name, "is_real": True, "is_offender": True, **values}


def answer(*persons, places=(), police=()):
    document = {"persons": list(persons), "occured_locations": list(places), "police_departments": list(police)}
    return json.dumps(document, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ('{"a": 1}', {"a": 1}),
        ('<think>{"no": 0}</think> はい、{"a": {"b": "山"}} です。', {"a": {"b": "山"}}),
        ("[1]", None),
        ("{", None),
        ("} {", None),
        ('{"a": 1} and {"b": 2}', None),
        ("", None),
    ],
)
def test_the_object_between_the_outer_braces(text, parsed):
    """From the first `{` to the last `}` after `</think>`; anything but one JSON object is None."""
    assert parse_object(text) == parsed


def test_persons_become_eight_texts():
    """Offenders only, joined by slashes; places and departments by commas; values stripped, null empty."""
    document = json.loads(
        answer(
            offender("山田 ", age=34, position=None, affiliation="A社", address=" 東京都", act="窃盗"),
            {"name": "佐藤", "is_offender": False, "age": 20},
            {"name": "鈴木", "is_offender": "true"},
            offender("田中", age="51", act=""),
            places=["東京", " 大阪 "],
            police=["警視庁"],
        )
    )
    assert flatten_persons(document) == {
        "person_name": "山田/田中",
        "person_age_at_published": "34/51",
        "person_position_name": "/",
        "person_belongs_company": "A社/",
        "person_address": "東京都/",
        "person_violated_law": "窃盗/",
        "occured_locations": "東京,大阪",
        "police_departments": "警視庁",
    }
    nobody = {"persons": [{"name": "佐藤", "is_offender": False}], "occured_locations": ["東京"]}
    assert set(flatten_persons(nobody).values()) == {""}


def test_metrics_of_document_001():
    """Six rows: an offender in both twice, one invented, two missed, nobody in one, one unreadable answer."""
    empty = answer()
    pairs = [
        (
            answer(offender("山田", age=30), offender("田中"), places=["東京"]),
            answer(offender("山田", age=30), places=["東京"]),
        ),
        (answer(offender("佐藤", age=1)), answer(offender("佐藤", age=2))),
        (answer(offender("鈴木")), empty),
        ('{"persons": []}', answer(offender("高橋"), offender("伊藤"))),
        (empty, empty),
        ("わかりません", empty),
        (empty, "no gold"),
    ]
    rows, metrics = score_rows(pairs)
    assert metrics == {
        "gen_samples": 6.0,
        "gen_json_parse_rate": 5 / 6,
        "gen_schema_ok_rate": 4 / 6,
        # present in both: 2; only in the answer: 1; only in the reference: 1; in neither: 2
        "gen_offender_presence_precision": 2 / 3,
        "gen_offender_presence_recall": 2 / 3,
        "gen_offender_presence_f1": 2 / 3,
        "gen_fp_rate_on_negative": 1 / 3,
        # names right: 2; invented: 田中, 鈴木; missed: 高橋, 伊藤
        "gen_offender_name_set_f1": 0.5,
        "gen_all_fields_exact_match_rate": 1 / 6,
        "gen_avg_pred_offender_count": 4 / 6,
        "gen_avg_gold_offender_count": 4 / 6,
        "gen_field_exact_match_rate/person_name": 2 / 6,
        "gen_field_exact_match_rate/person_age_at_published": 2 / 6,
        "gen_field_exact_match_rate/person_position_name": 3 / 6,
        "gen_field_exact_match_rate/person_belongs_company": 3 / 6,
        "gen_field_exact_match_rate/person_address": 3 / 6,
        "gen_field_exact_match_rate/person_violated_law": 3 / 6,
        "gen_field_exact_match_rate/occured_locations": 5 / 6,
        "gen_field_exact_match_rate/police_departments": 5 / 6,
    }
    assert [row["score"] for row in rows] == [2 / 8, 7 / 8, 7 / 8, 2 / 8, 1.0, 0.0, None]
    assert rows[-1]["note"] == "the reference is not a JSON object"


def test_undefined_rates_are_zero():
    """Without any offender, precision, recall and F1 are 0; without rows there are no metrics."""
    metrics = score_rows([(answer(), answer())])[1]
    undefined = ("gen_offender_presence_precision", "gen_offender_presence_recall", "gen_offender_name_set_f1")
    assert [metrics[name] for name in (*undefined, "gen_fp_rate_on_negative")] == [0.0] * 4
    assert score_rows([]) == ([], {})
    assert score_rows([("{}", "gone")])[1] == {}


def test_any_flat_schema():
    """The first field plays the name's part; lists are joined, null is empty; the schema is all fields."""
    pairs = [
        ('{"person": ["A", "B"], "place": null}', '{"person": ["A", "C"], "place": ""}'),
        ('{"person": "D"}', '{"person": "D", "place": "X"}'),
        ('{"person": null, "place": {"b": 1, "a": 2}}', '{"person": "", "place": {"a": 2, "b": 1}}'),
    ]
    rows, metrics = score_rows(pairs, fields=("person", "place"))
    assert [row["score"] for row in rows] == [0.5, 0.5, 1.0]
    assert metrics["gen_schema_ok_rate"] == 2 / 3
    assert metrics["gen_offender_presence_f1"] == 1.0
    assert metrics["gen_offender_name_set_f1"] == pytest.approx(2 / 3)
    assert metrics["gen_field_exact_match_rate/person"] == 2 / 3
    assert metrics["gen_all_fields_exact_match_rate"] == 1 / 3
    assert "gen_field_exact_match_rate/person_name" not in metrics


def test_some_of_document_001_s_fields():
    """A shorter list of its fields compares those, with the same reading of persons; all of them is the default."""
    pairs = [(answer(offender("山田", age=1)), answer(offender("山田", age=2)))]
    assert score_rows(pairs, fields=["person_name"])[0][0]["score"] == 1.0
    assert score_rows(pairs, fields=EXTRACTION_FIELDS) == score_rows(pairs)


def test_through_the_common_entry():
    """`gen_score` is the mean share of equal fields, also per task; an unreadable reference is out of it."""
    rows = [
        {"task": "news", "answer": answer(), "reference": answer()},
        {"task": "news", "answer": "", "reference": answer()},
        {"task": "other", "answer": answer(), "reference": ""},
    ]
    metrics = score("extraction", rows)[1]
    assert (metrics["gen_score"], metrics["gen_score/news"], metrics["gen_samples"]) == (0.5, 0.5, 2.0)
    assert "gen_score/other" not in metrics

"""Our own judgement of answers: what is an answer at all, and what is wrong with it, by name."""

import pytest

from sft.scoring.faults import FAULTS, counted
from sft.scoring.formats import other_format
from sft.scoring.score import score
from sft.scoring.structured import aggregate, lint, score_answer

ORDER = "order: 5\nResult:\n  ok: true"


@pytest.mark.parametrize(
    ("answer", "reference", "output_format", "score", "exact"),
    [
        (ORDER, ORDER, "yaml", 1.0, True),
        (f"```yaml\n{ORDER}\n```", ORDER, "yaml", 1.0, True),
        ("totally: wrong\nnothing: here\nResult:\n   ok: true", ORDER, "yaml", 0.73, False),
        ("Final Answer: 42\nunit: m", "Final Answer: 42\nunit: m", "yaml", 1.0, True),
        ("<r>\nResult: 5\n<a/></r>", "<r>\nResult: 5\n<a/></r>", "xml", 1.0, True),
        ('t = """\nAnswer: 4\n"""\nn = 1', 't = """\nAnswer: 4\n"""\nn = 1', "toml", 1.0, True),
        (f"I think so.\n\nOutput:\n{ORDER}", f"Approach:\n1. copy\n\nOutput:\n{ORDER}", "yaml", 1.0, True),
    ],
)
def test_what_parses_whole_is_the_payload(answer, reference, output_format, score, exact):
    """An output marker within a payload cuts nothing, in answers and in references; one before it still ends it."""
    result = score_answer(answer, output_format, reference=reference)
    assert (result.score, result.exact) == (score, exact)


@pytest.mark.parametrize(
    "answer",
    ['{"a": 1}', '```json\n{"a": 1}\n```', '{"a": 1,}', "{'a': 1}", '["a", "b"]', '--- {"a": 1}', '[{"a": 1}]'],
)
def test_json_is_no_answer_to_a_yaml_task(answer):
    """YAML's parser takes it, as the benchmark's does; here it scores nothing and says so."""
    result = score_answer(answer, "yaml", paths=["a"])
    assert (result.parses, result.in_format, result.score, result.key_rate) == (True, False, 0.0, 0.0)
    assert result.note == "JSON, not YAML" and "other format" in result.faults
    metrics = aggregate([("text_to_yaml", "yaml", result), ("text_to_yaml", "yaml", score_answer("a: 1", "yaml"))])
    assert (metrics["gen_format_rate"], metrics["gen_parse_rate"], metrics["gen_score"]) == (0.5, 1.0, 0.5)


def test_json_answers_a_yaml_task_whose_reference_is_json():
    """Where the data itself are written so, the form is what was asked for."""
    assert score_answer('{"a": 1}', "yaml", reference='{"a": 1}').score == 1.0


@pytest.mark.parametrize(
    ("payload", "asked", "found"),
    [
        ("a: 1\nb: [1, 2]", "yaml", None),
        ("{a: 1}", "yaml", None),
        ("a: 1\nb: 2", "json", "yaml"),
        ("a = 1", "yaml", "toml"),
        ("<a>1</a>", "toml", "xml"),
        ('{"a": 1, "b": 2}', "csv", "json"),
        ("a,b\n1,2", "csv", None),
        ("a,b", "csv", None),
        ("a,b\n1,2\n3,4", "toml", "csv"),
        ("{'a': 1}", "json", None),
        ("Sure, why not", "json", None),
    ],
)
def test_the_format_an_answer_is_in(payload, asked, found):
    """Named only where another format's parser takes it strictly; broken JSON is not YAML, nor is prose CSV."""
    assert other_format(payload, asked) == found


GOLD = '{"id": 7, "tags": ["a"], "ok": true}'


@pytest.mark.parametrize(
    ("answer", "faults"),
    [
        (GOLD, ()),
        ("", ("empty",)),
        ("<think>hm</think>\n", ("empty",)),
        (f"```json\n{GOLD}\n```", ("fence",)),
        (f"Here:\n```json\n{GOLD}\n```\nDone.", ("fence", "preface", "text after")),
        (f"Output:\n{GOLD}", ("preface",)),
        ('{"id": 7, "tags": ["a",], "ok": true}', ("trailing comma",)),
        ('{"id": 7, "tags": ["a"], "note": "x, ]",}', ("trailing comma",)),
        ('{"id": 7, "tags": ["a"', ("syntax",)),
        ("id: 7\nok: true", ("other format",)),
        ('{"id": 7, "tag": ["a"], "ok": true}', ("wrong key",)),
        ('{"id": "7", "tags": ["a"], "ok": true}', ("wrong type",)),
        ('{"id": 8, "tags": ["a"], "ok": 1}', ("wrong type", "wrong value")),
        ('{"id": 7, "tags": "a", "ok": true}', ("wrong key", "wrong type")),
        ('{"id": 7, "tags": ["a"], "ok": true, "more": 0}', ("extra key",)),
    ],
)
def test_faults_by_name(answer, faults):
    """Each with the words of FAULTS; a right answer has none."""
    assert score_answer(answer, "json", reference=GOLD).faults == faults
    assert set(faults) <= set(FAULTS)


def test_what_the_reference_does_too_is_no_fault():
    """Data that reason before an output marker teach to; so only what the answer adds is named."""
    reference = f"Approach: copy\nOutput:\n{GOLD}"
    assert score_answer(f"Approach: copy it\nOutput:\n{GOLD}", "json", reference=reference).faults == ()


def test_an_answer_cut_off_at_the_limit():
    """Said beside what the cut did to it."""
    assert score_answer('{"id": 7, "ta', "json", reference=GOLD, cut=True).faults == ("cut off", "syntax")
    assert score_answer("", "json", cut=True).faults == ("empty", "cut off")


def test_a_header_alone_is_csv():
    """Contract: two columns or more and rows of the header's width, of which there may be none."""
    assert score_answer("id,name", "csv", paths=["csv::name"]).score == 1.0
    assert score_answer("id,name", "csv", reference="id,name").exact is True
    assert score_answer("id,name\n1,2", "csv", reference="id,name").exact is False
    assert score_answer("id", "csv", paths=["csv::id"]).score == 0.0


def test_counts_follow_the_order_of_the_list():
    """{} where nothing is wrong."""
    assert list(counted([("fence", "syntax"), ("empty",), ("fence",)]).items()) == [
        ("empty", 1),
        ("fence", 2),
        ("syntax", 1),
    ]
    assert counted([(), ()]) == {}


def test_faults_of_extraction_answers():
    """The same words; a field that differs is a wrong value, a schema not kept a wrong key."""
    good = '{"name": "A", "place": "B"}'
    answers = [good, '{"name": "A", "place": "C"}', '{"name": "A"}', '{"name": "A",}', f"```json\n{good}\n```", ""]
    rows = [{"task": "", "answer": answer, "reference": good} for answer in answers]
    scores, _ = score("extraction", rows, fields=["name", "place"])
    assert [row["faults"] for row in scores] == [
        (),
        ("wrong value",),
        ("wrong key",),
        ("trailing comma",),
        ("fence",),
        ("empty",),
    ]


def test_training_answers_are_held_to_the_same():
    """Reasoning before a marker is taught on purpose; rows whose task names no format are not looked at."""
    found = lint(
        [
            ("text_to_json", "Approach: copy\nOutput:\n" + GOLD),
            ("text_to_json", f"```json\n{GOLD}\n```"),
            ("text_to_toml", "a = "),
            ("text_to_json", '{"a": 1,}'),
            ("text_to_yaml", GOLD),
            ("chat", "Hello"),
        ]
    )
    assert (found.answers, found.faults) == (5, {"fence": 1, "other format": 1, "trailing comma": 1, "syntax": 1})
    assert found.sentence() == (
        "Of 5 answers in a named format 2 don't parse as their own format, 1 are in another format, 1 have a fence"
    )
    assert lint([("text_to_json", GOLD)]).sentence() == ""

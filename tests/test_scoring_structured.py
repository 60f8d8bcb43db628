"""Scores of structured answers equal those computed by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sft.scoring.formats import read
from sft.scoring.score import score
from sft.scoring.structeval import path_exists
from sft.scoring.structured import aggregate, score_answer, target_format

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("payload", "output_format", "value"),
    [
        ('{"名前": "山田", "n": 1.5}', "json", {"名前": "山田", "n": 1.5}),
        ('{"a": 1, "a": 2}', "json", {"a": 2}),
        ("名前: 山田\nlist:\n- 1\n- 2\n", "yaml", {"名前": "山田", "list": [1, 2]}),
        ("a: &x [1]\nb: *x\n", "yaml", {"a": [1], "b": [1]}),
        ("a: 1\na: 2\n", "yaml", {"a": 2}),
        ('[店]\n"名" = "é"\n', "toml", None),
        ('["店"]\n"名" = "é"\nn = 0x10\n', "toml", {"店": {"名": "é", "n": 16}}),
        ('<?xml version="1.0" encoding="Shift_JIS"?>\n<r><名>山</名></r>', "xml", {"r": {"名": "山"}}),
        (
            '<r id="7" x:y="z" xmlns:x="u"><i>1</i><i/> t <j k="v">w</j><!-- c --></r>',
            "xml",
            {
                "r": {
                    "@id": "7",
                    "@x:y": "z",
                    "@xmlns:x": "u",
                    "i": ["1", None],
                    "j": {"@k": "v", "#text": "w"},
                    "#text": "t",
                }
            },
        ),
        ("<r><![CDATA[a < b]]></r>", "xml", {"r": "a < b"}),
        ("<r/>", "xml", {"r": None}),
        (
            '名,b\n"い,ろ","1\n2"\n\nは,3\n',
            "csv",
            {"csv_headers": ["名", "b"], "csv_rows": [{"名": "い,ろ", "b": "1\n2"}, {"名": "は", "b": "3"}]},
        ),
    ],
)
def test_formats_are_read_by_their_own_rules(payload, output_format, value):
    """Non-ASCII text survives; XML becomes what the xmltodict package makes of it."""
    reading = read(payload, output_format)
    assert (reading.value, reading.strict) == (value, value is not None)


@pytest.mark.parametrize(
    ("payload", "output_format", "note"),
    [
        ("This is prose.", "yaml", "a single value, not a YAML structure"),
        ("- [", "yaml", "not YAML: while parsing a flow node did not find expected node content"),
        ("a: 1\n---\nb: 2", "yaml", "not YAML: expected a single document"),
        ("a: !!python/object/apply:os.system [ls]", "yaml", "not YAML: could not determine a constructor for the tag"),
        ("7", "json", "a single value, not a JSON structure"),
        ('{"a": NaN}', "json", "NaN is not JSON"),
        ("[-Infinity, NaN]", "json", "-Infinity is not JSON"),
        ("{}", "json", "an empty structure"),
        ("# nothing", "toml", "an empty structure"),
        ("a = 1\na = 2", "toml", "not TOML: Cannot overwrite a value"),
        ('<r a="1" a="2"/>', "xml", "not XML: <unknown>:1:9: duplicate attribute"),
        ("<r>&nbsp;</r>", "xml", "not XML: <unknown>:1:3: undefined entity"),
        ('<!DOCTYPE r SYSTEM "file:///etc/passwd"><r/>', "xml", "not XML: DTDForbidden"),
        ("a\n1\n2", "csv", "CSV of a single column"),
        ("a,b\n1,2,3", "csv", "CSV rows of unequal width"),
        ('a,b\n"1,2', "csv", "CSV rows of unequal width"),
        ('a,b\n1,"2', "csv", "not CSV: unexpected end of data"),
        (" \n\t", "csv", "empty"),
    ],
)
def test_what_does_not_parse_says_why(payload, output_format, note):
    """Prose is not YAML, one column is not CSV, NaN is not JSON, and a document type is not read."""
    reading = read(payload, output_format)
    assert not reading.strict
    assert reading.note.startswith(note)


DOCUMENT = {
    "user": {"name": "x", "a.b": 1, "none": None, "id": 3},
    "items": [{"k": 1}, {"z": [0]}],
    "grid": [[1], [2, 3]],
}


@pytest.mark.parametrize(
    ("path", "exists"),
    [
        ("user.name", True),
        ("user", True),
        ("user.none", True),
        ("user.age", False),
        ("user.`a.b`", True),
        ("`user`.`a.b`", True),
        ("user.a.b", False),
        ("items[0].k", True),
        ("items[1].k", False),
        ("items[2]", False),
        ("items[-1]", False),
        ("items.*.z", True),
        ("items.*.z[0]", True),
        ("items.*.y", False),
        ("grid[1][1]", True),
        ("grid.*.*", True),
        ("grid[0][1]", False),
        ("user.*", False),
        ("user.@id", True),
        ("user.@name.first", False),
        ("items.k", False),
        ("items[0", False),
        ("items[x]", False),
        ("", True),
    ],
)
def test_path_grammar_of_structeval(path, exists):
    """Dots, indices, wildcards for list elements only, back-ticks around keys, and the fallback of `@attribute`."""
    assert path_exists(DOCUMENT, path) is exists


def test_csv_and_xml_paths():
    """`csv::` names a header; in XML `@id` is the attribute itself and repeated elements are a list."""
    table = read("名 前,b.c\n1,2", "csv").value
    assert (
        path_exists(table, "csv::名 前") and path_exists(table, "csv::b.c") and path_exists(table, "csv_rows[0].名 前")
    )
    assert not path_exists(table, "csv::c") and not path_exists(table, "名 前")
    tree = read('<shop><item id="1"/><item id="2"><name>n</name></item></shop>', "xml").value
    assert path_exists(tree, "shop.item[1].name") and path_exists(tree, "shop.item.*.@id")
    assert not path_exists(tree, "shop.item.name")


def test_scores_with_key_paths():
    """0.2 for parsing and 0.8 for the share of paths, rounded to two places for each answer: 1 of 3 paths is 0.47."""
    result = score_answer('```json\n{"a": {"b": 1}}\n```', "json", paths=["a.b", "a.c", "d"])
    assert result == (True, False, 1 / 3, None, None, 0.47, 0.47, "", True, ("fence", "wrong key"))
    assert score_answer('{"a": {"b": 1}}', "json", paths=["a.b"])[:6] == (True, True, 1.0, None, None, 1.0)
    assert score_answer("{'a': 1}", "json", paths=["a"])[:7] == (False, False, 0.0, None, None, 0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "output_format", "paths", "structeval"),
    [
        ("Just prose.", "yaml", ["a"], 0.2),
        ("name\nx\n", "csv", ["csv::name"], 1.0),
        ("No table here", "csv", ["csv::name"], 0.2),
        ('{"a": NaN}', "json", ["a", "b"], 0.6),
        ("{}", "json", ["a"], 0.0),
    ],
)
def test_structeval_s_own_figure_stands_beside_the_strict_one(answer, output_format, paths, structeval):
    """The benchmark takes prose for YAML and any text for CSV; the strict score is 0, its own figure is kept beside."""
    result = score_answer(answer, output_format, paths=paths)
    assert (result.parses, result.key_rate, result.score, result.structeval) == (False, 0.0, 0.0, structeval)


REFERENCE = 'Approach: copy\nOutput:\n{"id": 7, "tags": ["a", "b"], "size": {"w": 1.0, "h": null}, "ok": true}'


@pytest.mark.parametrize(
    ("answer", "key_rate", "value_rate", "exact", "total"),
    [
        # Eight nodes: id, tags, tags[0], tags[1], size, size.w, size.h, ok; six leaves.
        ('{"ok": true, "size": {"h": null, "w": 1}, "tags": ["a", "b"], "id": 7}', 1.0, 1.0, True, 1.0),
        ('{"id": 7, "tags": ["b", "a"], "size": {"w": 1, "h": null}, "ok": true}', 1.0, 4 / 6, False, 1.0),
        ('{"id": "7", "tags": ["a", "b"], "size": {"w": 1, "h": 0}, "ok": 1}', 1.0, 3 / 6, False, 1.0),
        ('{"id": 7, "tags": ["a"], "size": 3}', 4 / 8, 2 / 6, False, 0.6),
        ('{"id": 7, "tags": ["a", "b", "c"], "size": {"w": 1, "h": null}, "ok": true}', 1.0, 1.0, False, 1.0),
        ("[]", 0.0, 0.0, False, 0.0),
        ("[1]", 0.0, 0.0, False, 0.2),
        ('{"id": 7', 0.0, 0.0, False, 0.0),
    ],
)
def test_scores_against_a_reference(answer, key_rate, value_rate, exact, total):
    """Key paths come from the reference; values count with their types; the order of lists counts, of keys not."""
    result = score_answer(answer, "json", reference=REFERENCE)
    assert (result.key_rate, result.value_rate, result.exact, result.score) == (key_rate, value_rate, exact, total)


def test_references_in_xml_csv_and_toml():
    """Texts are compared in XML and CSV, cells by their headers whatever the order of columns; NaN equals NaN."""
    xml = score_answer(
        "<r><a>1</a><b>2</b></r>", "xml", reference='<?xml version="1.0"?>\n<r>\n <a> 1 </a><b>3</b></r>'
    )
    assert (xml.key_rate, xml.value_rate, xml.exact) == (1.0, 0.5, False)
    table = score_answer("b,a\n2,1\n", "csv", reference="a,b\n1,2\n")
    assert (table.key_rate, table.value_rate, table.exact) == (1.0, 1.0, True)
    short = score_answer("a,b\n1,2\n", "csv", reference="a,b\n1,2\n3,4\n")
    assert (short.key_rate, short.value_rate, short.exact, short.score) == (0.5, 0.5, False, 0.6)
    assert score_answer("x = nan\nd = 2026-01-01", "toml", reference="x = nan\nd = 2026-01-01").exact is True


def test_a_reference_that_does_not_parse_leaves_parsing_to_judge():
    """Without paths the score is then parsing alone; with paths they count, and values are not judged."""
    result = score_answer('{"a": 1}', "json", reference="{oops")
    assert result[:6] == (True, True, None, None, None, 1.0)
    assert result.note.startswith("the reference does not parse: not JSON")
    assert score_answer("{", "json", reference="{oops").score == 0.0
    assert score_answer('{"a": 1}', "json", reference="{oops", paths=["a", "b"]).score == 0.6


@pytest.mark.parametrize(
    ("task_key", "output_format"),
    [
        ("text_to_toml", "toml"),
        ("Text to JSON", "json"),
        ("csv_to_yml", "yaml"),
        ("XML", "xml"),
        ("json_notes", None),
        ("", None),
    ],
)
def test_target_format(task_key, output_format):
    """The last word of a task key is its format, if it is one."""
    assert target_format(task_key) == output_format


def test_aggregate_is_the_mean_over_what_was_judged():
    """Overall, per format and per task; a figure no row could be judged by is absent, and no rows give no metrics."""
    good = score_answer('{"a": 1}', "json", paths=["a"])
    half = score_answer('{"a": 1}', "json", paths=["a", "b"])
    plain = score_answer("a = 1", "toml")
    metrics = aggregate(
        [("text_to_json", "json", good), ("csv_to_json", "json", half), ("text_to_toml", "toml", plain)]
    )
    assert metrics["gen_parse_rate"] == 1.0
    assert metrics["gen_key_rate"] == 0.75
    assert metrics["gen_score"] == pytest.approx((1.0 + 0.6 + 1.0) / 3)
    assert metrics["gen_score/json"] == 0.8
    assert metrics["gen_score/text_to_json"] == 1.0
    assert metrics["gen_score/csv_to_json"] == 0.6
    assert "gen_key_rate/toml" not in metrics and "gen_value_rate" not in metrics
    assert aggregate([]) == {}


def test_one_entry_for_every_kind():
    """Rows come back in order; what a kind does not judge has score None and no part in the metrics."""
    rows = [
        {"task": "text_to_json", "answer": '{"a": 2}', "reference": '{"a": 1}'},
        {"task": "", "answer": "r -> a", "reference": "r -> a\nr -> b\n"},
        {"task": "chat", "answer": "Hi", "reference": "Hello"},
    ]
    scores, metrics = score("structured", rows)
    assert [result["score"] for result in scores] == [1.0, pytest.approx(2 / 3), None]
    assert metrics["gen_score"] == pytest.approx((1 + 2 / 3) / 2)
    assert (metrics["gen_score/json"], metrics["gen_samples"]) == (1.0, 2.0)
    assert (metrics["gen_value_rate"], metrics["gen_edge_recall"]) == (0.0, 0.5)
    assert score("samples", rows) == ([{"score": None}] * 3, {})
    assert score("structured", []) == score("extraction", []) == score("none", []) == ([], {})
    with pytest.raises(ValueError, match="'perplexity' is not a kind"):
        score("perplexity", rows)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_references_score_fully_against_themselves():
    """Of 3,933 real answers all parse and equal themselves, except the 64 XML ones known not to be well formed."""
    rows = [json.loads(line) for line in (SHARED / "structured_cot_512_v2.jsonl").read_text("utf-8").splitlines()]
    scored = []
    for row in rows:
        answer, output_format = row["messages"][-1]["content"], row["metadata"]["format"]
        scored.append(("", output_format, score_answer(answer, output_format, reference=answer)))
    metrics = aggregate(scored)
    assert metrics["gen_parse_rate/xml"] == pytest.approx((1076 - 64) / 1076)
    assert [metrics[f"gen_parse_rate/{name}"] for name in ("json", "yaml", "toml", "csv")] == [1.0] * 4
    assert metrics["gen_value_rate"] == metrics["gen_exact_rate"] == metrics["gen_key_rate"] == 1.0
    assert metrics["gen_only_rate"] == 0.0


# Everything that knows formats is imported after the sixth one is there, as if formats.py had it.
SIXTH = """
import configparser, json
from sft.scoring import formats

def read_ini(text):
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return {name: dict(parser[name]) for name in parser.sections()}, ""

formats._READERS["ini"] = read_ini
formats.FORMATS = tuple(formats._READERS)
formats.PARSER_ERRORS += (configparser.Error,)
from sft.data.sources.shapes import task_key
from sft.scoring.structured import score_answer, target_format

asked = [{"role": "user", "content": "Convert this INI to JSON:\\n[a]"}]
score = score_answer("Sure, ```ini\\n[a]\\nb = 1\\n```", target_format("text_to_ini"), paths=["a.b", "a.c"])
print(json.dumps([score.score, score.key_rate, score.structeval, score.faults,
                  task_key({"metadata": {"format": "JSON"}}, asked)]))
"""


def test_a_new_format_needs_nothing_but_its_reader():
    """INI as a sixth: its fence opens within a line, a prompt may name it, and the benchmark, which has only its five,
    gives it no figure. 0.2 for parsing and 0.8 of one path in two."""
    done = subprocess.run([sys.executable, "-c", SIXTH], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0.6, 0.5, None, ["fence", "preface", "wrong key"], "ini_to_json"]

"""No answer, however hostile, crashes a scorer, hangs it, runs anything, or leaves [0, 1]."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.scoring.edges import score_rows as score_edges
from sft.scoring.formats import FORMATS
from sft.scoring.score import score
from sft.scoring.structured import score_answer, target_format

BILLION_LAUGHS_XML = (
    '<!DOCTYPE z [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {after} "{f"&{name};" * 10}">' for name, after in zip("abcdefgh", "bcdefghi", strict=True))
    + "]><z>&i;</z>"
)
YAML_ALIAS_BOMB = 'a: &a ["x"]\n' + "".join(
    f"{after}: &{after} [{', '.join([f'*{name}'] * 9)}]\n" for name, after in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join([f'*{name}'] * 9)}], {name}: 1}}\n"
    for name, after in zip("abcdefgh", "bcdefghi", strict=True)
)

YAML_WIDE_MERGE_BOMB = (
    "a: &a {"
    + ", ".join(f"k{number}: 1" for number in range(9_000))
    + "}\n"
    + "".join(
        f"{after}: &{after}\n  <<: [*{name}, *{name}, *{name}]\n"
        for name, after in zip("abcdef", "bcdefg", strict=True)
    )
)

HOSTILE = {
    "empty": "",
    "white space": " \n\t" * 30_000,
    "truncated": '{"a": [1, {"b": "c',
    "a megabyte of words": "word " * 200_000,
    "five megabytes of JSON": "[" + "1," * 2_500_000 + "1]",
    "10,000 brackets": "[" * 10_000,
    "10,000 closed brackets": "[" * 10_000 + "]" * 10_000,
    "90,000 brackets": "[" * 90_000,
    "90,000 braces": "{" * 90_000,
    "nested objects": '{"a":' * 15_000,
    "nested elements": "<a>" * 30_000,
    "closed elements": "<a>" * 12_000 + "</a>" * 12_000,
    "nested YAML sequences": "- " * 45_000,
    "nested YAML keys": "? " * 45_000,
    "indented YAML": "".join(" " * depth + "a:\n" for depth in range(400)),
    "nested TOML arrays": "a = " + "[" * 90_000,
    "nested TOML tables": "a = " + "{a = " * 15_000,
    "a TOML key of many parts": "a" + ".a" * 45_000 + " = 1",
    "TOML keys of quoted parts": ('"\u2028"' + '."\u2028"' * 480 + " = 1\n") * 50,
    "TOML tables of many parts": "".join(f"[a{number}{'.a' * 480}]\n" for number in range(90)),
    "wide JSON": "[" + "1," * 49_000 + "1]",
    "wide YAML": "[" + "a," * 49_000 + "a]",
    "YAML of question marks": "{" + "?," * 49_000 + "}",
    "many YAML anchors": "- &a b\n" * 14_000,
    "YAML nested shallowly often": "[" + ("[" * 90 + "]" * 90 + ",") * 500 + "]",
    "control characters": "".join(map(chr, range(32))) * 500,
    "NUL in JSON": '{"a\x00": "\x00"}',
    "lone surrogates": '{"a": "\ud800"}',
    "bidirectional marks": '{"\u202ea": "\u2066"}',
    "XML bomb": BILLION_LAUGHS_XML,
    "external entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
    "external document type": '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd"><a/>',
    "parameter entity": '<!DOCTYPE a [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]><a/>',
    "XML include": '<a xmlns:xi="http://www.w3.org/2001/XInclude"><xi:include href="/etc/passwd" parse="text"/></a>',
    "odd XML encoding": '<?xml version="1.0" encoding="no-such"?><a>b</a>',
    "many attributes": "<a " + " ".join(f'a{number}="1"' for number in range(8_000)) + "/>",
    "YAML alias bomb": YAML_ALIAS_BOMB,
    "YAML merge bomb": YAML_MERGE_BOMB,
    "YAML wide merge bomb": YAML_WIDE_MERGE_BOMB,
    "YAML merge bomb by tag": YAML_WIDE_MERGE_BOMB.replace("<<", "!!merge x"),
    "YAML keys of one hash": "".join(f"{number * (2**61 - 1)}: 1\n" for number in range(4_000)),
    "YAML cycle": "&a [*a, *a, {b: *a}]",
    "YAML cycle of keys": "&a {? *a : 1}",
    "YAML set cycle": "&a !!omap [b: *a]",
    "YAML object": "!!python/object/apply:os.mkdir [hostile]",
    "YAML name": "!!python/name:os.system",
    "YAML bad timestamp": "a: !!timestamp nonsense",
    "YAML bad bool": "a: !!bool nonsense",
    "YAML empty int": 'a: !!int ""',
    "YAML bad date": "a: 2026-13-45",
    "YAML early date": "a: 0001-01-01 00:00:00 +23:59",
    "YAML base 60": "a: 1" + ":1" * 45_000,
    "YAML base 60 float": "a: 1" + ":1" * 45_000 + ".5",
    "YAML hexadecimal": "a: 0x" + "F" * 90_000,
    "YAML collection keys": "? [a]\n: b",
    "YAML not a number": "[.nan, .inf]",
    "YAML binary": "a: !!binary " + "A" * 90_000,
    "long integers": "[" + "9" * 90_000 + "]",
    "TOML hexadecimal": "a = 0x" + "F" * 90_000,
    "TOML escapes": 'a = "' + "\\u3042" * 15_000 + '"',
    "huge exponent": '{"a": 1e999999, "b": -1e999999}',
    "NaN": '{"a": NaN, "b": Infinity}',
    "duplicate keys": '{"a": 1, "a": 2, "a": {"a": 3}}',
    "many duplicate keys": "{" + '"a": 1,' * 12_000 + '"a": 1}',
    "commas": "," * 50_000 + "\n" + "," * 49_000,
    "quotes": '"' * 99_999,
    "CSV without end": 'a,b\n"' + "x,\n" * 30_000,
    "back-ticks": "```" * 300_000,
    "fences": "```\n" * 200_000,
    "colons and spaces": ": " * 400_000 + "```",
    "markers": "Output: " * 100_000,
    "words before a marker": "word " * 190_000 + "Output:",
    "code marks": "<|BEGIN_CODE|>" * 60_000,
    "thoughts": "</think>" * 100_000,
    "arrows": " -> " * 200_000,
    "spaces before an arrow": " " * 900_000 + "->",
    "edges": "r -> a -> b\n" * 70_000,
    "braces": "{}" * 400_000,
}
REFERENCES = {
    "json": '{"a": [1, {"b": 2}]}',
    "yaml": "a: [1, {b: 2}]",
    "toml": "a = [1, {b = 2}]",
    "xml": "<a><b>1</b></a>",
    "csv": "a,b\n1,2",
}
PATHS = ["a", "a.*.b", "*.*.*", "a[1].b", "csv::a", "@a.`b.c`", "[0]"]


def check(answer: str) -> None:
    """Every scorer gives scores within [0, 1], each in less than a second of CPU time (the machine may be shared)."""
    for output_format, reference in REFERENCES.items():
        with_paths, seconds = timed(score_answer, answer, output_format, reference=reference, paths=PATHS)
        without, more_seconds = timed(score_answer, answer, output_format, reference=answer)
        assert max(seconds, more_seconds) < 1, (output_format, seconds, more_seconds)
        for result in (with_paths, without):
            rates = (result.score, result.key_rate, result.value_rate, result.structeval)
            assert all(rate is None or 0 <= rate <= 1 for rate in rates)
        assert without.exact in (None, True)
    for fields in ((), ("a", "b")):
        rows = [{"task": "t", "answer": answer, "reference": '{"a": 1, "persons": []}'}]
        (scores, metrics), seconds = timed(score, "extraction", rows, fields=fields)
        assert seconds < 1 and 0 <= scores[0]["score"] <= 1
        assert all(0 <= value <= 1 for name, value in metrics.items() if not name.startswith("gen_avg"))
    (edge_scores, metrics), seconds = timed(score_edges, [(answer, "r -> a\n")])
    assert seconds < 1 and 0 <= edge_scores[0]["score"] <= 1 and 0 <= metrics["gen_path_valid_rate"] <= 1
    score("structured", [{"task": "text_to_json", "answer": answer, "reference": answer}])
    target_format(answer[:1000])


def timed(call, *arguments, **options):
    start = time.process_time()
    return call(*arguments, **options), time.process_time() - start


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_get_a_score(name, tmp_path, monkeypatch):
    """The list of issue 3: a score, never a crash, never more than a second, nothing executed, fetched or written."""
    monkeypatch.chdir(tmp_path)
    check(HOSTILE[name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["XML bomb", "external entity", "external document type", "parameter entity"])
def test_no_document_type_is_read(name):
    """Entities could grow without bound or read files, so that an answer with any is not XML here."""
    assert "DTDForbidden" in score_answer(HOSTILE[name], "xml").note


def test_bombs_are_refused_before_they_grow():
    """Aliases and merge keys are counted before the document is composed."""
    assert score_answer(YAML_ALIAS_BOMB, "yaml").note == "more than 20 aliases"
    assert score_answer(YAML_MERGE_BOMB, "yaml").note == "more than 20 aliases"
    assert score_answer(YAML_WIDE_MERGE_BOMB, "yaml").note == "merge keys that may grow without bound"
    assert score_answer(
        "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "yaml", reference="a: {x: 1, y: 2}\nb: {x: 1, y: 3}"
    ).exact
    assert score_answer("&a [*a, *a]", "yaml").note == "more than 20,000 values"
    assert score_answer("&a [*a]", "yaml").note == "nested deeper than 100 levels"


@pytest.mark.parametrize("output_format", ["json", "yaml"])
def test_depth_is_bounded_for_every_parser_alike(output_format):
    """100 levels are read, 101 are not, however deep the caller's own stack is."""
    assert score_answer("[" * 100 + "1" + "]" * 100, output_format).parses
    assert score_answer("[" * 101 + "1" + "]" * 101, output_format).note == "nested deeper than 100 levels"


# What the five formats and the extraction make something of.
WORDS = [
    *("Output:", "```json", "```", "<|BEGIN_CODE|>", "<|END_CODE|>", "</think>", "->", "\n", "\n  "),
    *("<a>", "</a>", "<!--", "-->", "<![CDATA[", "]]>", "&lt;", "---", "...", "- ", "!!int", "!!set", "!!timestamp"),
    *("&a", "*a", "<<", ":", ",", "?", "{", "}", "[", "]", "[[a]]", "a=", "'x'", '"x"', "a.b.c", "|", ">"),
    *("1", "-1", "0x1", "1:1", ".nan", "NaN", "null", "2026-01-01", "true"),
]
TEXTS = st.one_of(
    st.text(max_size=400),
    st.binary(max_size=400).map(lambda raw: raw.decode("utf-8", errors="replace")),
    st.text(alphabet="{}[]<>/:,.\"'`=-&*!?#|\\ \n\tab1é山", max_size=300),
    st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join),
)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=30,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZ
@given(TEXTS)
def test_any_text_gets_a_score(answer):
    """Texts, decoded bytes, soups of punctuation and of each format's own words."""
    check(answer)


@FUZZ
@given(DOCUMENTS, DOCUMENTS)
def test_any_document_scores_fully_against_itself_and_not_against_another(first, second):
    """A written structure parses and equals itself; against another, `exact` means equal in Python (NaN aside)."""
    answer, other = json.dumps(first), json.dumps(second)
    assert score_answer(answer, "json", reference=answer).score in (0.0, 1.0)
    result = score_answer(answer, "json", reference=other)
    assert 0 <= result.score <= 1
    if "NaN" not in answer + other and "Infinity" not in answer + other and result.exact is not None:
        assert (
            result.exact is (json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)) or first == second
        )


@FUZZ
@given(st.text(alphabet="a.`[]*@:0csv", max_size=20), DOCUMENTS)
def test_any_path_is_judged(path, document):
    """Malformed paths exist nowhere or somewhere, but never raise."""
    assert score_answer(json.dumps(document), "json", paths=[path]).score in (0.0, 0.2, 1.0)
    assert all(score_answer("a", name, paths=[path]).score == 0.0 for name in FORMATS)

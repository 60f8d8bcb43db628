"""The benchmark's own figure, compared with a port of the benchmark that shares nothing with ours but the paths."""

import codecs
import csv
import json
import random
import re
import warnings

import pytest
import toml
import xmltodict
import yaml

from sft.scoring.structeval import structeval_score
from sft.scoring.structured import score_answer

DOCUMENT = {
    "店": {"name": 'Café "A"', "open": True, "rows": [{"id": 1, "名": "山田"}, {"id": 2, "名": "佐藤"}]},
    "ratio": [1.5, 2.25],
    "path": "C:\\new\ttable",
    "date": "2026-01-02",
}
PATHS = ["店.name", "店.rows[1].id", "店.rows.*.`名`", "ratio[0]", "path", "gone.x", "店.@name", "*"]
TABLE = 'id, 名前,note\n1,山田,"a,b"\n2,佐藤,"say ""hi"""\n'
CSV_PATHS = ["csv::id", "csv::名前", "csv:: 名前", "csv::note", "csv::gone", "csv_rows[0].id", "csv_rows.*.note"]


def published(answer, output_format, paths):
    """What the program published with the benchmark does with one answer, step by step, through its own packages."""
    text = answer.replace("&lt;", "<").replace("&gt;", ">").replace("<think>\n\n</think>\n\n", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = codecs.decode(text, "unicode_escape")
    except Exception:
        pass
    marks = r"<\|BEGIN_CODE\|\>[ \t]*\n?(?P<first>.*?)(?:<\|END_CODE\|\>|$)"
    fence = r"```(?:" + output_format + r"|[^\n]*)[ \t]*\n(?P<second>.*?)(?:```|$)"
    if found := re.search(f"(?:{marks})|(?:{fence})", text, re.DOTALL | re.IGNORECASE):
        code = found["first"] or found["second"]
        if code is None:
            return 0.0
    else:
        code = text
    if found := re.search(fence, text, re.DOTALL | re.IGNORECASE):
        code = found["second"]
    code = code.strip()
    try:
        code = code.encode("utf-8").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        value = {
            "json": json.loads,
            "yaml": yaml.safe_load,
            "toml": toml.loads,
            "xml": xmltodict.parse,
            "csv": lambda text: (lambda reader: {"csv_headers": reader.fieldnames, "csv_rows": list(reader)})(
                csv.DictReader(text.splitlines(keepends=True))
            ),
        }[output_format](code)
    except Exception:
        return 0.0
    return round(0.2 + 0.8 * sum(walk(value, tokens(path)) for path in paths) / len(paths), 2) if value else 0.0


def tokens(path):
    if path.startswith("csv::"):
        return [path]
    quoted, parts, current, place = False, [], "", 0
    while place < len(path):
        mark = path[place]
        if mark == "`":
            quoted = not quoted
        elif mark in ".[" and not quoted:
            parts, current = [*parts, current], ""
            if mark == "[":
                end = path.index("]", place)
                parts.append(path[place : end + 1])
                place = end
        else:
            current += mark
        place += 1
    return [part for part in [*parts, current] if part]


def walk(node, rest):
    if not rest:
        return True
    token, *rest = rest
    if token.startswith("csv::") and isinstance(node, dict) and "csv_headers" in node:
        return token[5:] in (node["csv_headers"] or []) and not rest
    if token == "*":
        return isinstance(node, list) and any(walk(item, rest) for item in node)
    if token.startswith("[") and token.endswith("]"):
        index = int(token[1:-1])
        return isinstance(node, list) and 0 <= index < len(node) and walk(node[index], rest)
    if isinstance(node, dict):
        for name in (token, token[1:] if token.startswith("@") else token):
            if name in node:
                return walk(node[name], rest)
    return False


def written(output_format):
    return {
        "json": json.dumps(DOCUMENT, ensure_ascii=False, indent=1),
        "yaml": yaml.safe_dump(DOCUMENT, allow_unicode=True, sort_keys=False),
        "toml": toml.dumps(DOCUMENT),
        "xml": xmltodict.unparse(
            {"店": {**DOCUMENT["店"], "@kind": "ab", "path": "x", "ratio": ["1", "2"]}}, pretty=True
        ),
        "csv": TABLE,
    }[output_format]


WRAPPERS = [
    "{}", "{}", "```FMT\n{}\n```", "Here is `x` ```FMT\n{}```", "1. ```FMT\n{}\n```\nBye", "**FMT**```FMT\n{}",
    "<|BEGIN_CODE|>\n{}\n<|END_CODE|>", "<|begin_code|>{}", "<|BEGIN_CODE|>```\n{}```<|END_CODE|>",
    "<|BEGIN_CODE|><|END_CODE|>{}",
    "Output:\n{}", "Approach:\n1. think\n\nOutput:\n{}", "<think>\n\n</think>\n\n{}", "<think>hm</think>{}",
    "Sure, here:\n{}",
    "{}\n```\nnotes\n```", " \n{}\n ", "\ufeff{}", "{}\\", "````FMT\n{}\n````", "```\n```{}",
]  # fmt: skip
CHANGES = [
    lambda text, draw: text,
    lambda text, draw: text,
    lambda text, draw: text[: draw.randrange(len(text) + 1)],
    lambda text, draw: text.replace("<", "&lt;").replace(">", "&gt;"),
    lambda text, draw: text.replace("\n", "\r\n"),
    lambda text, draw: text.replace("\n", "\\n"),
    lambda text, draw: text.replace("1.5", "1"),
    lambda text, draw: text.replace("}", ",}", 1),
    lambda text, draw: text.replace("山", "\\u5c71").replace("é", "\\xe9"),
    lambda text, draw: (lambda place: text[:place] + draw.choice("\"'{}[]:,<>=\\\n #`") + text[place:])(
        draw.randrange(len(text) + 1)
    ),
    lambda text, draw: "<!DOCTYPE a>\n" + text,
    lambda text, draw: text.encode("ascii", "ignore").decode(),
    lambda text, draw: written(draw.choice(["json", "yaml", "toml", "xml", "csv"])),
    lambda text, draw: "",
    lambda text, draw: "just a sentence, nothing else",
    lambda text, draw: text.encode("ascii", "backslashreplace").decode().replace("\\u", "\\\\u"),
]


def generated(draw, number):
    """(answer, format, paths): every other one with plain ASCII keys, which the program doesn't garble."""
    output_format = ("json", "yaml", "toml", "xml", "csv")[number % 5]
    wrapper = draw.choice(WRAPPERS).replace("FMT", output_format)
    answer = wrapper.replace("{}", draw.choice(CHANGES)(written(output_format), draw), 1)
    paths = CSV_PATHS if output_format == "csv" else PATHS
    plain = {"店": "shop", "名": "label", "前": "", '\\"': "", "\\\\new\\ttable": "", "\\new\ttable": "", "\\new": ""}
    for odd, even in plain.items() if number % 2 == 0 else ():
        answer, paths = answer.replace(odd, even), [path.replace(odd, even) for path in paths]
    return answer, output_format, paths


def test_a_thousand_answers_have_the_figure_of_the_published_program():
    """Bare, fenced, marked, prefaced, cut, escaped, mixed up: all 1,000 figures are equal, to the digit."""
    draw, figures = random.Random(14), set()
    for number in range(1000):
        answer, output_format, paths = generated(draw, number)
        expected = published(answer, output_format, paths)
        assert structeval_score(answer, output_format, paths) == expected, (output_format, answer)
        figures.add((output_format, expected))
    assert len(figures) > 20


@pytest.mark.parametrize(
    ("answer", "output_format", "paths", "figure"),
    [
        ('Output:\n{"a": 1, "b": 2}', "json", ["a", "b"], 0.0),
        ('<think>x</think>{"a": 1}', "json", ["a"], 0.0),
        ('1. ```json\n{"a": 1}\n```', "json", ["a", "b"], 0.6),
        ("<!DOCTYPE r><r><a>1</a></r>", "xml", ["r.a", "r.b"], 0.6),
        ("a,b\n1\n", "csv", ["csv::a", "csv::b"], 1.0),
        (" Name, Age\n1,2", "csv", ["csv::Name", "csv::Age"], 0.6),
        ("", "csv", ["csv::a"], 0.2),
        ("a = [1, 2.5]", "toml", ["a"], 0.0),
        ('{"店": 1}', "json", ["店"], 0.2),
        ('{"a": "x\\ny"}', "json", ["a"], 0.0),
    ],
)
def test_its_quirks_by_hand(answer, output_format, paths, figure):
    """Markers are unknown to it, a fence opens anywhere, rows may be short, and text that is not ASCII is garbled."""
    assert structeval_score(answer, output_format, paths) == figure
    assert score_answer(answer, output_format, paths=paths).structeval == figure

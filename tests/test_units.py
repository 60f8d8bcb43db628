"""Units of answers: edges of ontology paths and of JSON payloads with the characters of their children."""

import json

import pytest

from sft.data.masked_loss.units import (
    Unit,
    answer_units,
    json_edges,
    path_edges,
    path_edges_from_paths,
    readable_edge,
    render_paths,
)


def children(answer: str, units: list[Unit]) -> list[str]:
    return [answer[unit.start : unit.end] for unit in units]


# ---- units of path answers


def test_every_word_after_the_first_is_a_child_with_its_characters():
    """Root, arrows and newlines are in no unit; spaces around a title are trimmed; lines without an arrow hold none."""
    answer = "disease -> skin disease -> acne\nroot only\n\ndisease ->   syndrome  \r\n"
    assert path_edges(answer) == [
        Unit('["path", "disease", "skin disease"]', 11, 23),
        Unit('["path", "skin disease", "acne"]', 27, 31),
        Unit('["path", "disease", "syndrome"]', 56, 64),
    ]
    assert children(answer, path_edges(answer)) == ["skin disease", "acne", "syndrome"]


def test_an_arrow_inside_a_word_is_no_border():
    """Only an arrow that stands alone divides words, so `p->q` is a title."""
    assert children("a -> p->q -> b", path_edges("a -> p->q -> b")) == ["p->q", "b"]


def test_structured_paths_keep_titles_with_arrows_and_newlines_whole():
    """From the text `x -> y` is two words; from the paths it is one title, and so is a title with a newline."""
    answer, units = path_edges_from_paths([["root", "x -> y", "two\nlines"], ["root", "z"]])
    assert answer == "root -> x -> y -> two\nlines\nroot -> z\n"
    assert children(answer, units) == ["x -> y", "two\nlines", "z"]
    assert [readable_edge(unit.edge) for unit in units] == ["root -> x -> y", 'x -> y -> "two\\nlines"', "root -> z"]


def test_odd_paths_count_as_they_are():
    """No path, an empty one (no line either) and a one-element one give no unit; duplicates and cycles count each time;
    a child without characters counts with an empty span."""
    assert path_edges_from_paths([]) == ("", [])
    assert path_edges_from_paths([[], ["root"]]) == ("root\n", [])
    _, cyclic = path_edges_from_paths([["a", "b", "a", "b"], ["a", "b"]])
    assert [readable_edge(unit.edge) for unit in cyclic] == ["a -> b", "b -> a", "a -> b", "a -> b"]
    answer, blank = path_edges_from_paths([["a", " ", "b"]])
    assert (answer, blank) == ("a ->   -> b\n", [Unit('["path", "a", ""]', 6, 6), Unit('["path", "", "b"]', 10, 11)])


@pytest.mark.parametrize("paths", [[["a", "b c", "d"], ["a"], ["a", "é語"]], [["x"] * 10_001], [["a", "b"]] * 10_000])
def test_rendered_text_and_structured_paths_give_the_same_units(paths):
    """Where no title holds an arrow or a newline the two readers agree, ten thousand edges included."""
    answer, units = path_edges_from_paths(paths)
    assert answer == render_paths(paths)
    assert path_edges(answer) == units
    assert len(units) == sum(len(path) - 1 for path in paths)


def test_edge_identity_is_injective():
    """Titles, keys and values made of the signs the identity is written with never fall together, paths nor JSON."""
    names = ["a", "b", "a -> b", 'a", "b', '"', "\\", "\\u0041", "A", "[]", "a.b", "", "\ud800", "\\ud800"]
    meant: dict[str, tuple] = {}
    for first in names:
        for second in names:
            units = path_edges_from_paths([[first, second]])[1] + json_edges(json.dumps({first: second}))
            units += json_edges(json.dumps([{first: [second]}]))
            edges = [("path", first, second), ("key", first), ("value", first, second)]
            edges += [("key in list", first), ("value in lists", first, second)]
            assert [meant.setdefault(unit.edge, edge) for unit, edge in zip(units, edges, strict=True)] == edges
    assert len(meant) == 3 * 13 * 13 + 2 * 13
    assert all(edge.encode() for edge in meant)


def test_own_paths_count_while_the_answer_is_their_rendering():
    """Stripped or indented by a chat template they still fit; an edited answer is read as text; none are needed."""
    paths = [["root", "x -> y"], ["root", "z"]]
    for answer in ("root -> x -> y\nroot -> z\n", "root -> x -> y\nroot -> z", "\n root -> x -> y\nroot -> z"):
        assert children(answer, answer_units(answer, "path_edge", paths=paths)) == ["x -> y", "z"]
        assert children(answer, answer_units(answer, "path_edge")) == ["x", "y", "z"]
    assert children("root -> z", answer_units("root -> z", "path_edge", paths=paths)) == ["z"]
    assert answer_units("root", "path_edge", paths=[["root"]]) == []


def test_the_unit_setting_chooses_the_reader():
    """`json_edge` reads from the payload's start and answers None where there is no JSON."""
    answer = "Output:\n[true]"
    assert children(answer, answer_units(answer, "json_edge", payload_start=7)) == ["true"]
    assert answer_units(answer, "json_edge") is None
    assert answer_units(answer, "path_edge") == []


# ---- units of JSON answers


def test_keys_and_scalars_are_children_of_their_key_path():
    """Strings count without quotes, numbers and literals whole, brackets and commas never; list places are no part."""
    answer = '{"id": 7, "tags": ["x", "x\\u0041"], "at": {"city": "Osaka", "ok": true, "no": null, "n": -1.5e3}}'
    units = json_edges(answer)
    assert [(readable_edge(unit.edge), answer[unit.start : unit.end]) for unit in units] == [
        ("id", "id"),
        ("id: 7", "7"),
        ("tags", "tags"),
        ("tags[]: x", "x"),
        ("tags[]: xA", "x\\u0041"),
        ("at", "at"),
        ("at.city", "city"),
        ("at.city: Osaka", "Osaka"),
        ("at.ok", "ok"),
        ("at.ok: true", "true"),
        ("at.no", "no"),
        ("at.no: null", "null"),
        ("at.n", "n"),
        ("at.n: -1500.0", "-1.5e3"),
    ]
    assert units[7].edge == '["value", ["at", "city"], "Osaka"]'


def test_number_and_string_of_the_same_characters_are_two_edges():
    """`7` and `"7"`, `1` and `1.0` are different answers, an escaped and a plain letter the same one."""
    edges = [unit.edge for unit in json_edges('[7, "7", 1, 1.0, "A", "\\u0041"]')]
    assert len(set(edges)) == 5
    assert edges[4] == edges[5]


@pytest.mark.parametrize(
    ("answer", "payload_start", "expected"),
    [
        ("Approach: {x}\nOutput:\n[1]\n", 22, ["1"]),
        ("Sure!\n```json\n[1]\n```\nDone.", 0, ["1"]),
        ("<|BEGIN_CODE|>[1]<|END_CODE|> bye", 0, ["1"]),
        ("<|BEGIN_CODE|>[1]", 0, ["1"]),
        ("<think>[2]</think>\n[1]", 0, ["1"]),
        ('Output: ```json\n["a ``` b"]\n```', 0, ["a ``` b"]),
        ("```\n[1]```", 0, ["1"]),
        ('["a ```b\\n``` c"]', 0, ["a ```b\\n``` c"]),
        ("Approach: {x}\nOutput:\n[1]\n", 0, None),
    ],
)
def test_the_payload_is_found(answer, payload_start, expected):
    """Code marks, then a fence, then all after the marker; without a JSON payload the row has no units at all."""
    units = json_edges(answer, payload_start)
    assert units is None if expected is None else children(answer, units) == expected


# One text per line; what a line cannot hold is added below.
NOT_JSON = """42
"text"
{
[1
[1,]
{"a"}
{"a":1,}
{"a":}
{1:2}
[1 2]
[01]
[NaN]
[1]]
["\\x"]
['a']
[1] and more
{]
[}
{"a":1]
[:]
[,]
{"a" 1}
[tru]"""


@pytest.mark.parametrize("answer", [*NOT_JSON.split("\n"), "", " ", '["\n"]', "[" * 10_000])
def test_what_is_no_json_object_or_list_has_no_units(answer):
    """The row is trained unmasked and counted, never guessed at; the standard parser refuses the same texts."""
    assert json_edges(answer) is None


@pytest.mark.parametrize("answer", ["{}", "[]", "[[], {}]", " [ ]\n", '{"a": {}}', "[0, -0.0, 1E+2, false]"])
def test_what_the_standard_parser_reads_is_read(answer):
    """Empty brackets and every number form are valid; they give one unit for each key and each scalar."""
    parsed = json.loads(answer)
    expected = len(parsed) if answer.startswith(("[0", '{"a"')) else 0
    assert len(json_edges(answer)) == expected


def test_deep_nesting_costs_no_recursion_and_no_square():
    """Ten thousand open objects: one unit per key, and long key paths are named by a digest of bounded length."""
    answer = '{"a":' * 10_000 + "1" + "}" * 10_000
    units = json_edges(answer)
    assert len(units) == 10_001
    assert len({unit.edge for unit in units}) == 10_001
    assert max(len(unit.edge) for unit in units) < 600
    assert readable_edge(units[-1].edge).startswith("….a")

"""The payload of an answer is found where the contract looks for it."""

import pytest

from sft.scoring.payload import extract_payload


@pytest.mark.parametrize(
    ("answer", "payload"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('Here it is:\n<|BEGIN_CODE|>\n{"a": 1}\n<|END_CODE|>\nDone.', '{"a": 1}'),
        ("<|BEGIN_CODE|>a: 1", "a: 1"),
        ("<|BEGIN_CODE|>\n```json\n[1]\n```\n<|END_CODE|>", "[1]"),
        ('Output:\n{"b": 2}\n<|BEGIN_CODE|>[1]<|END_CODE|>', "[1]"),
        ('Sure.\n```json\n{"a": 1}\n```\nBye.', '{"a": 1}'),
        ("```\n[1]", "[1]"),
        ("```json\n[1]```", "[1]"),
        ("Output: ```yaml\na: 1\n```", "a: 1"),
        ("Output:\n[2]\n```\n[1]\n```", "[1]"),
        ('```json\n{"readme": "```py x```"}\n```', '{"readme": "```py x```"}'),
        ('{"code": "```sh\\nls```",\n "b": 1}', '{"code": "```sh\\nls```",\n "b": 1}'),
        ("Approach:\n1. Think\n\nOutput:\n{}", "{}"),
        ('So the final Output: {"a": 1}', '{"a": 1}'),
        ('{"text": "The Answer: 42"}', '{"text": "The Answer: 42"}'),
        ('title = "My Final: take"', 'title = "My Final: take"'),
        ("Output:\n  a: 1\n  b: 2\n", "  a: 1\n  b: 2"),
        ("<think>\n```json\n[0]\n```\n</think>\n\n[1]", "[1]"),
        ("", ""),
    ],
)
def test_payload_is_found_in_the_order_of_the_contract(answer, payload):
    """Code marks win over a fence, a fence over an output marker, a marker over the whole text."""
    assert extract_payload(answer) == payload


def test_other_markers_replace_the_usual_ones():
    """A marker is a plain text, whatever a regular expression would make of it."""
    assert extract_payload("Work: 3+4\n#### [7]", ["####"]) == "[7]"
    assert extract_payload("Output:\n[7]", [".*"]) == "Output:\n[7]"
    assert extract_payload("Output:\n[7]", []) == "Output:\n[7]"

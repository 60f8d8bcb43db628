"""Turns: what a row has beside roles and texts, and that rows without any are as they were."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft.data.sources.load import load_source
from sft.data.sources.shapes import content_hash
from sft.data.sources.turns import Dropped, packed, read_tools, read_turns, unpacked
from sft.settings import Source

LOOK_UP = {"type": "function", "function": {"name": "look_up", "arguments": {"item": 3}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def assistant(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **keys}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (assistant(tool_calls=[LOOK_UP | {"id": "c0"}]), assistant(tool_calls=[LOOK_UP | {"id": "c0"}])),
        (assistant(content=None, tool_calls=[LOOK_UP["function"]]), assistant(tool_calls=[LOOK_UP])),
        (assistant(tool_calls=json.dumps([LOOK_UP])), assistant(tool_calls=[LOOK_UP])),
        (
            assistant(tool_calls=[{"function": {"name": "look_up", "arguments": '{"item": 3}'}}]),
            assistant(tool_calls=[LOOK_UP]),
        ),
        (assistant(function_call={"name": "look_up", "arguments": '{"item": 3}'}), assistant(tool_calls=[LOOK_UP])),
        (assistant(content="a", tool_calls=None, name=None), assistant(content="a")),
        (assistant(content="a", reasoning_content="r"), assistant(content="a", reasoning_content="r")),
        (assistant(content="a", thinking="r"), assistant(content="a", reasoning_content="r")),
        (assistant(content="a", reasoning_content=" \n", reasoning="r"), assistant(content="a", reasoning_content="r")),
        (assistant(content="a", train=False), assistant(content="a", trained=False)),
        (assistant(content="a", weight=0), assistant(content="a", trained=False)),
        (assistant(content="a", loss="false"), assistant(content="a", trained=False)),
        (assistant(content="a", loss=None, weight=1, train=True), assistant(content="a")),
        (
            {"role": "tool", "content": {"code": 7}, "tool_call_id": "c0", "name": "look_up"},
            {"role": "tool", "content": '{"code": 7}', "tool_call_id": "c0", "name": "look_up"},
        ),
        ({"role": "user", "content": "q", "train": False}, {"role": "user", "content": "q"}),
        (
            {"from": "function_call", "value": '{"name": "look_up", "arguments": {"item": 3}}'},
            assistant(tool_calls=[LOOK_UP]),
        ),
        (
            {
                "from": "function_call",
                "value": '<think>\nr\n</think>\n\n[{"name": "look_up", "arguments": {"item": 3}}]',
            },
            assistant(content="<think>\nr\n</think>", tool_calls=[LOOK_UP]),
        ),
        ({"from": "observation", "value": "7"}, {"role": "tool", "content": "7"}),
    ],
)
def test_what_a_turn_has_beside_its_text_is_kept(turn: dict[str, Any], expected: dict[str, Any]):
    """OpenAI's form, what other sets write in its place, and back through the row's JSON text."""
    (message,) = read_turns([turn])
    assert message == expected
    bare = [{"role": message["role"], "content": message["content"]}]
    extras = packed([message], [])
    assert (extras is None) == (bare == [message])
    assert extras is None or unpacked(bare, extras) == ([message], [])


def test_calls_made_at_once_are_one_turn():
    """ShareGPT's form has a turn for each call; their answers stay apart."""
    call = {"from": "function_call", "value": '{"name": "look_up", "arguments": {"item": 3}}'}
    answer = {"from": "observation", "value": "7"}
    turns = read_turns([call, call, answer, answer, call])
    assert [len(turn.get("tool_calls", [])) for turn in turns] == [2, 0, 0, 1]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (assistant(tool_calls="look_up(3)"), "tool calls that are no JSON"),
        (assistant(tool_calls=["look_up(3)"]), "tool calls that are no JSON"),
        (assistant(tool_calls=7), "tool calls that are no list"),
        (assistant(tool_calls=[7]), "a tool call without a name"),
        (assistant(tool_calls=[{"function": {"arguments": {}}}]), "a tool call without a name"),
        (assistant(tool_calls=[{"name": "f", "arguments": "{"}]), "a tool call whose arguments are no JSON"),
        (assistant(tool_calls=[{"name": "f", "arguments": "9" * 5000}]), "a tool call whose arguments are no JSON"),
        (assistant(tool_calls=[{"name": "f", "arguments": "[" * 10**5}]), "a tool call whose arguments are no JSON"),
        (assistant(tool_calls=[{"name": "f", "arguments": [1]}]), "a tool call whose arguments are no JSON object"),
        ({"from": "function_call", "value": "look_up"}, "tool calls that are no JSON"),
        ({"from": "function_call", "value": "[]"}, "empty answer"),
        (assistant(content="a", thinking=["r"]), '"thinking" of a turn is no text'),
        (assistant(content="a", train="maybe"), '"train" of a turn is neither true nor false'),
        (assistant(content="a", weight=[0]), '"weight" of a turn is neither true nor false'),
        ({"role": "tool", "content": float("nan")}, "the content of a turn is NaN"),
        ({"role": "tool", "content": None}, "the content of a turn is missing"),
        ({"role": "user", "content": [{"data": "q"}]}, "the content of a turn has a part without a type"),
        (assistant(tool_calls="[{'name': 'f'}]"), "tool calls that are no JSON but Python's repr: use json.dumps"),
        (
            assistant(tool_calls=[{"name": "f", "arguments": "{'x': 1}"}]),
            "a tool call whose arguments are no JSON but Python's repr: use json.dumps",
        ),
        (assistant(content="a", loss_weight=0.5), '"loss_weight" of a turn is neither 0 nor 1: .*'),
        (
            assistant(content=[{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"}]),
            'the content of a turn has a part of type "reasoning", which is no text',
        ),
        (assistant(content=[{"type": "text", "value": 7}]), "the content of a turn has a text part whose text is a .*"),
    ],
)
def test_a_turn_that_cannot_be_read_drops_its_row(turn: dict[str, Any], reason: str):
    """The reason names what is wrong."""
    with pytest.raises(Dropped, match=f"^{reason}$"):
        read_turns([turn])


def test_tools_are_a_list_or_its_text():
    """Bare functions (ShareGPT sets) get OpenAI's form; nothing is nothing."""
    assert read_tools([TOOL]) == read_tools(json.dumps([TOOL])) == read_tools([json.dumps(TOOL["function"])]) == [TOOL]
    assert read_tools(None) == read_tools(" ") == read_tools([]) == []
    for value in ("tools", {"name": "f"}, 7, [7]):
        with pytest.raises(Dropped, match="tools that are no"):
            read_tools(value)


def test_the_functions_of_openais_older_form_are_tools(tmp_path: Path):
    """As function_call is a call; a `tools` column goes before."""
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "q"}, assistant(function_call=LOOK_UP["function"])]
    path.write_text(json.dumps({"messages": turns, "functions": [TOOL["function"]]}), encoding="utf-8")
    rows = load_source(Source(id=str(path)))
    assert unpacked(rows.dataset["messages"][0], rows.dataset["extras"][0])[1] == [TOOL]
    assert rows.unread == ()


def test_rows_keep_their_tools_and_say_where_they_stood(tmp_path: Path):
    """One text column holds what few rows have; rows without it hash as they always did."""
    path = tmp_path / "rows.jsonl"
    plain = [{"role": "user", "content": "q"}, assistant(content="a")]
    calling = [plain[0], assistant(tool_calls=[LOOK_UP]), {"role": "tool", "content": "7"}, plain[1]]
    rows = [{"messages": plain}, {"messages": []}, {"messages": calling, "tools": [TOOL]}, {"messages": plain[:1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = load_source(Source(id=str(path))).dataset
    assert dataset["number"][:] == [1, 3]
    assert dataset["extras"][0] is None
    assert unpacked(dataset["messages"][1], dataset["extras"][1]) == (calling, [TOOL])
    assert dataset["content_hash"][0] == content_hash(plain) == 15744731819630226105
    assert dataset["content_hash"][1] != content_hash(calling)


def test_a_conversation_whose_every_answer_is_marked_as_context_is_dropped(tmp_path: Path):
    """There is nothing to learn from it."""
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "q"}, assistant(content="a", train=False)]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    rows = load_source(Source(id=str(path)))
    assert rows.dropped == {"no answer that is to be trained": 1}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "assistant", "tool_calls": [LOOK_UP]}, assistant(tool_calls=[LOOK_UP])),
        ({"role": "assistant", "function_call": LOOK_UP["function"]}, assistant(tool_calls=[LOOK_UP])),
        ({"from": "Function_Call ", "value": json.dumps(LOOK_UP["function"])}, assistant(tool_calls=[LOOK_UP])),
        ({"from": "function_call", "value": LOOK_UP["function"]}, assistant(tool_calls=[LOOK_UP])),
        ({"from": "function_call", "value": [LOOK_UP]}, assistant(tool_calls=[LOOK_UP])),
        ({"role": None, "content": None, "from": "gpt", "value": "a"}, assistant(content="a")),
        (assistant(content="a", weight="0"), assistant(content="a", trained=False)),
        (assistant(content="a", training=False), assistant(content="a", trained=False)),
        (assistant(content="a", loss_weight=0.0), assistant(content="a", trained=False)),
        (assistant(content="a", train="no"), assistant(content="a", trained=False)),
        ({"from": "tool_calls", "value": json.dumps([LOOK_UP])}, assistant(tool_calls=[LOOK_UP])),
        ({"from": "Function-Call", "value": json.dumps(LOOK_UP)}, assistant(tool_calls=[LOOK_UP])),
        ({"from": "function_response", "value": "7"}, {"role": "tool", "content": "7"}),
        ({"role": "tool-result", "content": 7}, {"role": "tool", "content": "7"}),
        ({"role": "tool", "content": [1, {"a": None}]}, {"role": "tool", "content": '[1, {"a": null}]'}),
        ({"role": "tool", "content": []}, {"role": "tool", "content": "[]"}),
        ({"role": "tool", "content": False}, {"role": "tool", "content": "false"}),
        ({"role": "tool", "content": [{"type": "text", "text": "7"}]}, {"role": "tool", "content": "7"}),
        ({"role": "user", "content": [{"text": "q"}]}, {"role": "user", "content": "q"}),
        (assistant(content="a", loss_weight=1.0), assistant(content="a")),
        (assistant(content=[{"type": "text", "value": "a"}, {"type": "text", "text": "b"}]), assistant(content="ab")),
        (assistant(content=[{"type": "text", "text": None, "value": "a"}]), assistant(content="a")),
        (assistant(content=[{"type": "output_text", "text": "a"}]), assistant(content="a")),
    ],
)
def test_a_call_or_a_flag_counts_however_it_is_written(turn: dict[str, Any], expected: dict[str, Any]):
    """A turn of a call alone, other cases, objects for text, the nulls of a table that holds two spellings."""
    assert read_turns([turn]) == [expected]


def test_keys_that_may_be_flags_and_are_not_read_are_named(tmp_path: Path):
    """Their turns are trained: nobody should believe they are not."""
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "q"}, assistant(content="a", train_on=False, loss_scale=0, number=3)]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    rows = load_source(Source(id=str(path)))
    assert rows.unread == ("messages.loss_scale", "messages.train_on")


def test_keys_of_other_rows_are_no_nulls_of_a_call(tmp_path: Path):
    """Arrow gives every object of a column the keys of all: neither tools nor calls get them."""
    path = tmp_path / "rows.parquet"
    calls = [{"item": 3}, {"city": "Rome"}]
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}, assistant(tool_calls=[_calling(call)])],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": call}}}],
        }
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    dataset = load_source(Source(id=str(path))).dataset
    found = [unpacked(*pair) for pair in zip(dataset["messages"], dataset["extras"], strict=True)]
    assert [messages[1]["tool_calls"] for messages, _ in found] == [[_calling(call)] for call in calls]
    assert [tools for _, tools in found] == [row["tools"] for row in rows]


def _calling(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look_up", "arguments": arguments}}

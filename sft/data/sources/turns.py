"""One turn of a row, as people write it: role, text, tool calls, reasoning, whether it is trained. Pure Python."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# {"role", "content"} and, where the row has them, "tool_calls" and "tool_call_id" (OpenAI's form, arguments parsed),
# "name", "reasoning_content" and "trained" (False: an assistant turn that is context).
Message = dict[str, Any]
Tools = list[dict[str, Any]]

# A row that is trained whole, without a chat template, is one message with this role.
TEXT_ROLE = "text"

_ROLES = {
    "assistant": "assistant", "model": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "ai": "assistant", "chatbot": "assistant", "llm": "assistant",
    "user": "user", "human": "user", "prompter": "user",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool",
    "tool_response": "tool", "tool_result": "tool", "function_response": "tool", "function_result": "tool",
}  # fmt: skip
# Roles of a turn that is nothing but a call: its text is the call, or a list of calls, as JSON.
_CALL_ROLES = ("function_call", "tool_call", "function_calls", "tool_calls")
# Types of content parts that are text: OpenAI's two interfaces, under "text", and LLaMA-Factory's, under "value".
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_FLAGS = ("train", "training", "trained", "weight", "loss_weight", "loss")
_WEIGHTS = ("weight", "loss_weight")
_SAID = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
# Every key of a turn that is read here.
TURN_KEYS = frozenset(
    {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", *_REASONING, *_FLAGS}
)


# Characters of what stands in a row that a reason shows.
_SHOWN = 40
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "missing"), (bool, "true or false"), ((int, float), "a number"), (str, "text"), (list, "a list"),
    (Mapping, "an object"),
)  # fmt: skip


class Dropped(Exception):
    """This row cannot be trained on; the message is the reason it is counted under."""


def read_turns(value: Any, what: str = "messages") -> list[Message]:
    """A list of turns, OpenAI's or ShareGPT's, as messages. Raises Dropped with the reason when one cannot be read;
    `what` is the column it stands in."""
    turns = list_of(value, what)
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise Dropped(f"a turn of {what} is {kind_of(turn)}, no object with role and content")
    messages: list[Message] = []
    calling = False
    for turn in turns:
        message, called = _read(turn), calling
        calling = _is_call(turn)
        if calling and called:  # calls made at once stand in a turn each
            messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
    return messages


def turn_of(role: Any, content: Any, what: str = "the content of a turn") -> Message:
    """A message with this text. Raises Dropped when role or text is none; `what` is the text in a reason."""
    if not isinstance(role, str):
        raise Dropped(f"the role of a turn is {kind_of(role)}")
    if (known := _ROLES.get(_plain(role))) is None:
        raise Dropped(f"unknown role {json.dumps(role[:_SHOWN], ensure_ascii=False)}")
    return {"role": known, "content": answer_of(content, what) if known == "assistant" else text_of(content, what)}


def read_tools(value: Any) -> Tools:
    """A `tools` column, a list or its JSON text, in OpenAI's form. Raises Dropped when it is neither."""
    tools = _json(value, "tools that are no JSON")
    if not isinstance(tools or [], list):
        raise Dropped("tools that are no list")
    return [_tool(tool) for tool in tools or []]


def packed(messages: Sequence[Message], tools: Sequence[Any]) -> str | None:
    """What a row has beside roles and texts, as JSON text; None for nearly all rows, which have nothing."""
    turns = {
        str(k): {name: value for name, value in message.items() if name not in ("role", "content")}
        for k, message in enumerate(messages)
        if len(message) > 2
    }
    if not turns and not tools:
        return None
    try:
        return json.dumps({"turns": turns, "tools": list(tools)}, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError) as error:  # nested too deeply, or dates and bytes of a Parquet file
        raise Dropped("tools or tool calls that JSON cannot hold") from error


def unpacked(messages: Sequence[Message], extras: str) -> tuple[list[Message], Tools]:
    """The messages as `read_turns` gave them, and the row's tools."""
    found = json.loads(extras)
    turns = found["turns"]
    return [message | turns.get(str(k), {}) for k, message in enumerate(messages)], found["tools"]


def text_of(value: Any, what: str) -> str:
    """Text, or a list of text parts. Raises Dropped that says what of the row is something else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        return "".join(_part_text(part, what) for part in value)
    raise Dropped(f"{what} is {kind_of(value)}")


def answer_of(value: Any, what: str) -> str:
    """The text of an answer, which must be there."""
    if value is None:
        raise Dropped("empty answer")
    return text_of(value, what)


def list_of(value: Any, what: str) -> list[Any]:
    """A list, also when a table without nesting (CSV) holds it as JSON text."""
    value = _json(value, f"{what} is text that is no JSON")
    if value is None:
        return []
    if not isinstance(value, list):
        raise Dropped(f"{what} is {kind_of(value)} and no list")
    return value


def is_repr(text: str) -> bool:
    """Whether text looks like what Python shows of lists and objects, with single quotes."""
    return text.lstrip().startswith(("[{'", "['", "[[", "{'")) and "'" in text


def is_empty(message: Message) -> bool:
    """Whether an answer says nothing: neither a text, behind its think block, nor a call."""
    text = message["content"].strip()
    only_thoughts = text.endswith("</think>") and text.startswith("<think>") and text.count("<think>") == 1
    return (not text or only_thoughts) and "tool_calls" not in message


def kind_of(value: Any) -> str:
    """What a value is that should have been something else, for people."""
    if isinstance(value, float) and value != value:
        return "NaN"
    for kinds, name in _KINDS:
        if isinstance(value, kinds):
            return name
    return f"of type {type(value).__name__}"


def _json(value: Any, reason: str) -> Any:
    """What a value is or, as text of a table without nesting, says; None where it is blank."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:  # ValueError: also whole numbers of more than 4,300 digits
        raise Dropped(f"{reason} but Python's repr: use json.dumps" if is_repr(value) else reason) from error


def _part_text(part: Mapping[str, Any], what: str) -> str:
    """The text of a part; a part that is an image, a sound or anything else is named by its type."""
    kind = part.get("type")
    if kind is None and "text" not in part:
        raise Dropped(f"{what} has a part without a type")
    if kind not in (None, *_TEXT_PARTS):
        raise Dropped(
            f"{what} has a part of type {json.dumps(str(kind)[:_SHOWN], ensure_ascii=False)}, which is no text"
        )
    text = _either(part, "text", "value")
    if not isinstance(text, str):
        raise Dropped(f"{what} has a text part whose text is {kind_of(text)}")
    return text


def _either(turn: Mapping[str, Any], key: str, other: str) -> Any:
    """What a turn has under OpenAI's or ShareGPT's name; a table that holds both kinds has null under the other."""
    return turn.get(other) if turn.get(key) is None else turn[key]


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text" if "text" in part else None) in _TEXT_PARTS


def _plain(role: Any) -> str:
    """A role as the tables here have it: "Function-Call " is function_call."""
    return str(role).strip().lower().replace("-", "_")


def _role(turn: Mapping[str, Any]) -> Any:
    return _either(turn, "role", "from")


def _is_call(turn: Mapping[str, Any]) -> bool:
    return _plain(_role(turn)) in _CALL_ROLES


def _read(turn: Mapping[str, Any]) -> Message:
    role, content = _role(turn), _either(turn, "content", "value")
    if _is_call(turn):
        return _call_alone(content) | _flagged(turn)
    calls = _calls(turn.get("tool_calls") or turn.get("function_call"))
    if content is None and calls:
        content = ""
    elif _ROLES.get(_plain(role)) == "tool" and _is_value(content):
        content = json.dumps(content, ensure_ascii=False)  # a tool's answer that was not written down as text
    message = turn_of(role, content)
    if len(turn) == 2 and not calls:
        return message
    if message["role"] == "assistant":
        message |= ({"tool_calls": calls} if calls else {}) | _reasoning(turn) | _flagged(turn)
    return message | {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}


def _is_value(content: Any) -> bool:
    """Whether a tool's answer is a value of JSON, neither text nor the parts of one; NaN is none."""
    if isinstance(content, list):
        return not content or not all(map(_is_text_part, content))
    return content is not None and not isinstance(content, str) and content == content


def _call_alone(content: Any) -> Message:
    """A turn that is a call, or text that is one after the thoughts some sets write before it."""
    thoughts = ""
    if isinstance(content, Mapping) or (isinstance(content, list) and not all(map(_is_text_part, content))):
        return {"role": "assistant", "content": thoughts, "tool_calls": _calls(content)}
    text = answer_of(content, "the content of a turn")
    if text.lstrip().startswith("<think>") and "</think>" in text:
        thoughts, end, text = text.partition("</think>")
        thoughts += end
    calls = _calls(_json(text, "tool calls that are no JSON"))
    if not calls:
        raise Dropped("empty answer")
    return {"role": "assistant", "content": thoughts, "tool_calls": calls}


def _calls(value: Any) -> Tools:
    """Tool calls in OpenAI's form, from that form, bare {"name", "arguments"}, or the JSON text of either."""
    value = _json(value, "tool calls that are no JSON")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value or [], list):
        raise Dropped("tool calls that are no list")
    return [_call(call) for call in value or []]


def _call(call: Any) -> dict[str, Any]:
    call = _json(call, "tool calls that are no JSON")
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Dropped("a tool call without a name")
    given = function.get("arguments") or function.get("parameters")
    arguments = _json(given, "a tool call whose arguments are no JSON") or {}
    if not isinstance(arguments, Mapping):
        raise Dropped("a tool call whose arguments are no JSON object")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **named, "function": {"name": function["name"], "arguments": arguments}}


def _tool(tool: Any) -> dict[str, Any]:
    tool = _json(tool, "tools that are no JSON")
    if not isinstance(tool, Mapping):
        raise Dropped("tools that are no list of objects")
    return dict(tool) if "function" in tool or "name" not in tool else {"type": "function", "function": dict(tool)}


def _reasoning(turn: Mapping[str, Any]) -> Message:
    """What the assistant thought before it answered, under whichever key the row has it."""
    for key in _REASONING:
        if turn.get(key) is not None and not isinstance(turn[key], str):
            raise Dropped(f'"{key}" of a turn is no text')
        if (turn.get(key) or "").strip():
            return {"reasoning_content": turn[key]}
    return {}


def _flagged(turn: Mapping[str, Any]) -> Message:
    """{"trained": False} for a turn that its own flag makes context."""
    for key in _FLAGS:
        value = turn.get(key)
        value = _SAID.get(value.strip().lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool | int | float | None):
            raise Dropped(f'"{key}" of a turn is neither true nor false')
        if key in _WEIGHTS and value not in (None, 0, 1):
            raise Dropped(f'"{key}" of a turn is neither 0 nor 1: a turn is trained or it is context')
        if value is not None and not value:
            return {"trained": False}
    return {}

"""Row shapes: what a person's rows look like, turned into messages. Pure Python on one row at a time."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import xxhash

from sft.data.masked_loss.units import render_paths

Row = Mapping[str, Any]
Message = dict[str, str]

# A row that is trained whole, without a chat template, is one message with this role.
TEXT_ROLE = "text"

_ROLES = {
    "assistant": "assistant", "model": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "user": "user", "human": "user", "prompter": "user",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip

_FORMAT_NAME = re.compile(r"\b(json|yaml|toml|xml|csv)\b", re.IGNORECASE)


class Dropped(Exception):
    """This row cannot be trained on; the message is the reason it is counted under."""


class Shape(NamedTuple):
    """One way of writing rows down: the columns it is recognised by, the ones it may also have, and its reader."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    read: Callable[[Row], list[Message]]


def shape_of(columns: Collection[str], mapped: Collection[str] = ()) -> Shape | None:
    """The shape these columns have, None if none is known. Shapes that use a column the person `mapped` come first."""
    fitting = [shape for shape in SHAPES if shape.required <= set(columns)]
    chosen = [shape for shape in fitting if (shape.required | shape.optional) & set(mapped)]
    return next(iter(chosen or fitting), None)


def known_columns() -> frozenset[str]:
    """Every column any shape, the task key or the upsampling rules may read."""
    used = (shape.required | shape.optional for shape in SHAPES)
    return frozenset({"metadata", "subcategory", "pack"}).union(*used)


def read_messages(row: Row, shape: Shape) -> list[Message]:
    """The row as messages that end with a non-empty answer. Raises Dropped with the reason when it cannot be."""
    messages = shape.read(row)
    last = messages[-1] if messages else None
    if last is None or last["role"] not in ("assistant", TEXT_ROLE):
        raise Dropped("no answer")
    if not last["content"].strip():
        raise Dropped("empty answer")
    return messages


def paths_of(row: Row, shape: Shape) -> list[list[str]] | None:
    """The paths of an ontology row, whose titles may hold arrows and line breaks; None for other shapes."""
    return _paths(row) if shape.read is _from_paths else None


def content_hash(messages: list[Message]) -> int:
    """64 bits that are equal for equal messages. Raises Dropped for text that is not valid Unicode."""
    try:
        return xxhash.xxh3_64_intdigest("\x1e".join(f"{m['role']}\x1f{m['content']}" for m in messages).encode())
    except UnicodeEncodeError as error:  # half of a surrogate pair, as "\ud83d" alone in a JSON file
        raise Dropped("unreadable") from error


def task_key(row: Row, messages: list[Message]) -> str:
    """`subcategory`, else `<source format>_to_<target format>` from metadata and the prompt's first line, else ""."""
    if isinstance(row.get("subcategory"), str):
        return str(row["subcategory"])
    metadata = _metadata(row.get("metadata"))
    target = str(metadata.get("format") or "").lower()
    if not target:
        return ""
    if metadata.get("type") == "generation":
        return f"text_to_{target}"
    named = (name.lower() for name in _FORMAT_NAME.findall(_first_line_of_prompt(messages)))
    source = next((name for name in named if name != target), "text")
    return f"{source}_to_{target}"


def _metadata(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return {}
    return value if isinstance(value, Mapping) else {}


def _first_line_of_prompt(messages: list[Message]) -> str:
    prompts = [message["content"] for message in messages if message["role"] == "user"]
    return prompts[-1].lstrip().partition("\n")[0] if prompts else ""


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        return "".join(part["text"] for part in value)
    raise Dropped("unreadable")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _optional_text(value: Any) -> str:
    return "" if value is None else _text(value)


def _answer(value: Any) -> str:
    if value is None:
        raise Dropped("empty answer")
    return _text(value)


def _list(value: Any) -> list[Any]:
    """A list, also when a table without nesting (CSV) holds it as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Dropped("unreadable") from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise Dropped("unreadable")
    return value


def _turn(role: Any, content: Any) -> Message:
    if not isinstance(role, str):
        raise Dropped("unreadable")
    role = _ROLES.get(role.lower(), role)
    return {"role": role, "content": _answer(content) if role == "assistant" else _text(content)}


def _turns(value: Any) -> list[Message]:
    turns = _list(value)
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise Dropped("unreadable")
    return [_turn(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]


def _system(row: Row) -> list[Message]:
    system = _optional_text(row.get("system"))
    return [_turn("system", system)] if system.strip() else []


def _from_messages(row: Row) -> list[Message]:
    return _turns(row["messages"])


def _from_conversations(row: Row) -> list[Message]:
    return _system(row) + _turns(row["conversations"])


def _from_instruction(row: Row) -> list[Message]:
    history = []
    for pair in _list(row.get("history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Dropped("unreadable")
        history += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    parts = (_text(row["instruction"]), _optional_text(row.get("input")))
    prompt = "\n\n".join(part for part in parts if part.strip())
    answer = row["output"] if "output" in row else row["response"]
    return [*_system(row), *history, _turn("user", prompt), _turn("assistant", answer)]


def _from_prompt(row: Row) -> list[Message]:
    turns = []
    for role, column in (("user", "prompt"), ("assistant", "completion")):
        value = row[column]
        turns += _turns(value) if isinstance(value, list) else [_turn(role, value)]
    return turns


def _from_paths(row: Row) -> list[Message]:
    """Document 003: title and abstract ask, the answer is one `A -> B -> C` line per path, each ended by a newline."""
    prompt = f"Title: {_text(row['title'])}\n{_optional_text(row['abstract'])}"
    return [_turn("user", prompt), _turn("assistant", render_paths(_paths(row)))]


def _paths(row: Row) -> list[list[str]]:
    return [[_text(name) for name in _list(path)] for path in _list(row["paths"])]


def _from_text(row: Row) -> list[Message]:
    return [{"role": TEXT_ROLE, "content": _answer(row["text"])}]


def _shape(name: str, read: Callable[[Row], list[Message]], required: str, optional: str = "") -> Shape:
    return Shape(name, frozenset(required.split()), frozenset(optional.split()), read)


# In order of preference where a row has the columns of several.
SHAPES = (
    _shape("messages", _from_messages, "messages"),
    _shape("conversations", _from_conversations, "conversations", "system"),
    _shape("instruction/input/output", _from_instruction, "instruction output", "input history system"),
    _shape("instruction/input/response", _from_instruction, "instruction response", "input history system"),
    _shape("prompt/completion", _from_prompt, "prompt completion"),
    _shape("title/abstract/paths", _from_paths, "title abstract paths"),
    _shape("text", _from_text, "text"),
)

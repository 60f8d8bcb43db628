"""Row shapes: what a person's rows look like, turned into messages. Pure Python on one row at a time."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import xxhash

from sft.data.masked_loss.units import render_paths
from sft.data.sources.turns import (
    TEXT_ROLE,
    Dropped,
    Message,
    Tools,
    answer_of,
    list_of,
    read_tools,
    read_turns,
    text_of,
    turn_of,
)

Row = Mapping[str, Any]

_FORMAT_NAME = re.compile(r"\b(json|yaml|toml|xml|csv)\b", re.IGNORECASE)


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
    if not last["content"].strip() and "tool_calls" not in last:
        raise Dropped("empty answer")
    if not any(message.get("trained", message["role"] in ("assistant", TEXT_ROLE)) for message in messages):
        raise Dropped("no answer that is to be trained")
    return messages


def tools_of(row: Row, shape: Shape) -> Tools:
    """The tools the row's conversation may call. Raises Dropped when they cannot be read."""
    return read_tools(row.get("tools")) if "tools" in shape.optional else []


def paths_of(row: Row, shape: Shape) -> list[list[str]] | None:
    """The paths of an ontology row, whose titles may hold arrows and line breaks; None for other shapes."""
    return _paths(row) if shape.read is _from_paths else None


def content_hash(messages: list[Message], extras: str | None = None) -> int:
    """64 bits that are equal for equal messages and `packed` extras. Raises Dropped for text that is no Unicode."""
    texts = [f"{message['role']}\x1f{message['content']}" for message in messages]
    try:
        return xxhash.xxh3_64_intdigest("\x1e".join([*texts, extras] if extras else texts).encode())
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


def _optional_text(value: Any) -> str:
    return "" if value is None else text_of(value)


def _system(row: Row) -> list[Message]:
    system = _optional_text(row.get("system"))
    return [turn_of("system", system)] if system.strip() else []


def _from_messages(row: Row) -> list[Message]:
    return read_turns(row["messages"])


def _from_conversations(row: Row) -> list[Message]:
    return _system(row) + read_turns(row["conversations"])


def _from_instruction(row: Row) -> list[Message]:
    history = []
    for pair in list_of(row.get("history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Dropped("unreadable")
        history += [turn_of("user", pair[0]), turn_of("assistant", pair[1])]
    parts = (text_of(row["instruction"]), _optional_text(row.get("input")))
    prompt = "\n\n".join(part for part in parts if part.strip())
    answer = row["output"] if "output" in row else row["response"]
    return [*_system(row), *history, turn_of("user", prompt), turn_of("assistant", answer)]


def _from_prompt(row: Row) -> list[Message]:
    turns = []
    for role, column in (("user", "prompt"), ("assistant", "completion")):
        value = row[column]
        turns += read_turns(value) if isinstance(value, list) else [turn_of(role, value)]
    return turns


def _from_paths(row: Row) -> list[Message]:
    """Document 003: title and abstract ask, the answer is one `A -> B -> C` line per path, each ended by a newline."""
    prompt = f"Title: {text_of(row['title'])}\n{_optional_text(row['abstract'])}"
    return [turn_of("user", prompt), turn_of("assistant", render_paths(_paths(row)))]


def _paths(row: Row) -> list[list[str]]:
    return [[text_of(name) for name in list_of(path)] for path in list_of(row["paths"])]


def _from_text(row: Row) -> list[Message]:
    return [{"role": TEXT_ROLE, "content": answer_of(row["text"])}]


def _shape(name: str, read: Callable[[Row], list[Message]], required: str, optional: str = "") -> Shape:
    return Shape(name, frozenset(required.split()), frozenset(optional.split()), read)


# In order of preference where a row has the columns of several.
SHAPES = (
    _shape("messages", _from_messages, "messages", "tools"),
    _shape("conversations", _from_conversations, "conversations", "system tools"),
    _shape("instruction/input/output", _from_instruction, "instruction output", "input history system"),
    _shape("instruction/input/response", _from_instruction, "instruction response", "input history system"),
    _shape("prompt/completion", _from_prompt, "prompt completion", "tools"),
    _shape("title/abstract/paths", _from_paths, "title abstract paths"),
    _shape("text", _from_text, "text"),
)

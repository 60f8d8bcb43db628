"""Row shapes: what a person's rows look like, turned into messages. Pure Python on one row at a time."""

import json
import re
from collections import Counter
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
    is_empty,
    kind_of,
    list_of,
    read_tools,
    read_turns,
    text_of,
    turn_of,
)
from sft.scoring.formats import FORMATS

Row = Mapping[str, Any]

_FORMAT_NAME = re.compile(rf"\b({'|'.join(FORMATS)})\b", re.IGNORECASE)


class Shape(NamedTuple):
    """One way of writing rows down: the columns it is recognised by, the ones it may also have, and its reader."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    read: Callable[[Row], list[Message]]

    @property
    def columns(self) -> frozenset[str]:
        """Every column it reads."""
        return self.required | self.optional


def shape_of(columns: Collection[str], mapped: Collection[str] = ()) -> Shape | None:
    """The shape these columns have, None if none is known. Columns the person `mapped` are not passed over."""
    named = set(mapped) - CHOOSING
    fitting = (shape for shape in SHAPES if shape.required <= set(columns))
    return next((shape for shape in fitting if not named or named & shape.columns), None)


def known_columns() -> frozenset[str]:
    """Every column any shape, the task key or the upsampling rules may read."""
    return CHOOSING.union(MEDIA, *(shape.columns for shape in SHAPES))


def read_messages(row: Row, shape: Shape, noted: Counter[str] | None = None) -> list[Message]:
    """The row as messages that end with a non-empty answer. Raises Dropped with the reason when it cannot be.

    `noted` counts rows whose last answer is followed by turns, which are left out.
    """
    for name in MEDIA & row.keys():
        if row[name] and kind_of(row[name]) != "NaN":
            raise Dropped(f'it has "{name}", and only text is trained')
    messages = _with_system(row, shape.read(row)) if row.get("system") else shape.read(row)
    messages, closing = _up_to_answer(messages)
    if closing and noted is not None:
        noted["turns after the last answer left out"] += 1
    last = messages[-1]
    if is_empty(last):
        raise Dropped("empty answer")
    if not any(message.get("trained", message["role"] in ("assistant", TEXT_ROLE)) for message in messages):
        raise Dropped("no answer that is to be trained")
    return messages


def _up_to_answer(messages: list[Message]) -> tuple[list[Message], bool]:
    """The messages without the turns after the last answer, and whether there were any."""
    count = len(messages)
    while count and messages[count - 1]["role"] not in ("assistant", TEXT_ROLE):
        count -= 1
    if not count:
        raise Dropped("no answer")
    return messages[:count], count < len(messages)


def tools_of(row: Row, shape: Shape) -> Tools:
    """The tools the row's conversation may call. Raises Dropped when they cannot be read."""
    return read_tools(row.get("tools") or row.get("functions")) if "tools" in shape.optional else []


def paths_of(row: Row, shape: Shape) -> list[list[str]] | None:
    """The paths of an ontology row, whose titles may hold arrows and line breaks; None for other shapes."""
    return _paths(row) if shape.read is _from_paths else None


def content_hash(messages: list[Message], extras: str | None = None) -> int:
    """64 bits that are equal for equal messages and `packed` extras. Raises Dropped for text that is no Unicode."""
    texts = [f"{message['role']}\x1f{message['content']}" for message in messages]
    try:
        return xxhash.xxh3_64_intdigest("\x1e".join([*texts, extras] if extras else texts).encode())
    except UnicodeEncodeError as error:  # half of a surrogate pair, as "\ud83d" alone in a JSON file
        raise Dropped("half of a character that is no Unicode text") from error


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


def _optional_text(row: Row, column: str) -> str:
    return "" if row.get(column) is None else text_of(row[column], column)


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The `system` column put first, before a system turn that the conversation has itself."""
    system = _optional_text(row, "system")
    if not system.strip() or messages[:1] == [{"role": "system", "content": system}] or _is_plain(messages):
        return messages
    if messages and messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def _is_plain(messages: list[Message]) -> bool:
    return bool(messages) and messages[0]["role"] == TEXT_ROLE


def _from_messages(row: Row) -> list[Message]:
    return read_turns(row["messages"])


def _from_conversations(row: Row) -> list[Message]:
    return read_turns(row["conversations"], "conversations")


def _from_instruction(row: Row) -> list[Message]:
    parts = [text_of(row["instruction"], "instruction"), *(_optional_text(row, name) for name in ("input", "context"))]
    prompt = "\n\n".join(part for part in parts if part.strip())
    answer = "output" if "output" in row else "response"
    return [*_history(row), turn_of("user", prompt), turn_of("assistant", row[answer], answer)]


def _history(row: Row) -> list[Message]:
    """Earlier turns: pairs of question and answer, as lists or as objects, or turns with their roles."""
    turns: list[Message] = []
    for pair in list_of(row.get("history"), "history"):
        if isinstance(pair, Mapping) and pair.keys() & {"role", "from"}:
            turns += read_turns([pair], "history")
            continue
        if isinstance(pair, Mapping):
            pair = [next((pair[key] for key in keys if key in pair), None) for keys in _PAIR_KEYS]
        if not isinstance(pair, list) or len(pair) != 2:
            raise Dropped(f"an entry of history is {kind_of(pair)}, no pair of question and answer")
        turns += [turn_of(role, text, "an entry of history") for role, text in zip(_PAIR, pair, strict=True)]
    return turns


def _from_prompt(row: Row) -> list[Message]:
    turns = []
    for role, column in (("user", "prompt"), ("assistant", "completion")):
        value = row[column]
        turns += read_turns(value, column) if isinstance(value, list) else [turn_of(role, value, column)]
    return turns


def _from_paths(row: Row) -> list[Message]:
    """Document 003: title and abstract ask, the answer is one `A -> B -> C` line per path, each ended by a newline."""
    prompt = f"Title: {text_of(row['title'], 'title')}\n{_optional_text(row, 'abstract')}"
    return [turn_of("user", prompt), turn_of("assistant", render_paths(_paths(row)))]


def _paths(row: Row) -> list[list[str]]:
    paths = list_of(row["paths"], "paths")
    return [[text_of(name, "a name in paths") for name in list_of(path, "a path")] for path in paths]


def _from_text(row: Row) -> list[Message]:
    return [{"role": TEXT_ROLE, "content": answer_of(row["text"], "text")}]


def _shape(name: str, read: Callable[[Row], list[Message]], required: str, optional: str = "") -> Shape:
    return Shape(name, frozenset(required.split()), frozenset(optional.split()), read)


_PAIR = ("user", "assistant")
_PAIR_KEYS = (
    ("user", "human", "prompt", "instruction", "question", "query"),
    ("assistant", "bot", "gpt", "model", "ai", "completion", "output", "response", "answer"),
)
# In order of preference where a row has the columns of several.
SHAPES = (
    _shape("messages", _from_messages, "messages", "system tools functions"),
    _shape("conversations", _from_conversations, "conversations", "system tools functions"),
    _shape("instruction/input/output", _from_instruction, "instruction output", "input context history system"),
    _shape("instruction/input/response", _from_instruction, "instruction response", "input context history system"),
    _shape("prompt/completion", _from_prompt, "prompt completion", "system tools"),
    _shape("title/abstract/paths", _from_paths, "title abstract paths", "system"),
    _shape("text", _from_text, "text"),
)
# Columns that hold no text: a row that has something in one is refused.
MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})
# Read whatever the shape: they choose rows, and are not trained.
CHOOSING = frozenset({"metadata", "subcategory", "pack"})

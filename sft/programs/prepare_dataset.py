"""Public and own data sets -> a folder of `save_to_disk` with messages, text and token counts known beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from sft.data.sources.columns import Columns, Tally, reason_of
from sft.data.sources.load import open_source
from sft.data.sources.readers import ROWS_AT_ONCE, SourceError
from sft.data.sources.shapes import content_hash, read_messages, tools_of
from sft.data.sources.turns import Dropped, Message, packed
from sft.errors import Problems
from sft.programs.command_line import progress, reworded
from sft.settings import Source
from sft.settings.rules import NO_FOLDER, is_missing_folder
from sft.storage.atomic import published_folder
from sft.storage.json_files import json_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_SOURCES = {
    "alpaca": Source(id="tatsu-lab/alpaca"),
    "dolly": Source(id="databricks/databricks-dolly-15k", columns={"input": "context"}),
    "wizardlm": Source(id="WizardLMTeam/WizardLM_evol_instruct_V2_196k"),
}
BINS = 10  # lines of a histogram on a screen


@dataclass
class Prepared:
    """What came of a source: kept rows, lost rows by reason, tokens of every kept row (empty when not counted)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Tally = field(default_factory=Tally)
    lengths: list[int] = field(default_factory=list)


def alpaca_text(messages: Sequence[Message]) -> str:
    """Stanford Alpaca's headings."""
    headings = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n", "text": ""}
    return "\n\n".join(headings.get(message["role"], "") + message["content"] for message in messages)


def chatml_text(messages: Sequence[Message]) -> str:
    """<|im_start|>role ... <|im_end|> around every message."""
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


def llama2_text(messages: Sequence[Message]) -> str:
    """[INST] user [/INST] answer, one <s> ... </s> per exchange; the system text stands in the first prompt."""
    text, system = "", ""
    for message in messages:
        if message["role"] == "system":
            system = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            text, system = f"{text}<s>[INST] {system}{message['content']} [/INST]", ""
        else:
            text += f" {message['content']} </s>"
    return text


TEXTS: dict[str, Callable[[Sequence[Message]], str]] = {
    "alpaca": alpaca_text,
    "chatml": chatml_text,
    "llama2": llama2_text,
}


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises Problems that say whether it is gated, misspelt or out of reach."""
    if is_missing_folder(model):
        raise Problems([f"--model {model}: {NO_FOLDER}"])
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        from sft.models.model import load_problem

        with reworded("SFT_BASE_MODEL=", "--model "):
            (reason,) = load_problem("the tokenizer", model, error).problems
            raise Problems([f"{reason}; or --max-length 0 counts no tokens and needs no tokenizer"]) from error


def prepare_dataset(
    source: Source,
    *,
    text_format: str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    num_samples: int | None = None,
) -> Prepared:
    """The first `num_samples` good rows of the source: no exact duplicates, none over `max_length` tokens of text.

    Raises:
        Problems: the source can't be read, or no row is left.
    """
    prepared = Prepared()
    try:
        distinct = _distinct(source, text_format, prepared.dropped)
        while rows := list(islice(distinct, ROWS_AT_ONCE)):
            _keep(rows, prepared, tokenizer=tokenizer, max_length=max_length)
            progress(f"{source.id}: {len(prepared.rows):,} rows")
            if num_samples and len(prepared.rows) >= num_samples:
                del prepared.rows[num_samples:], prepared.lengths[num_samples:]
                break
    except SourceError as error:
        raise Problems([f"Failed to load {source.id}: {_without_a_mix(error)}"]) from error
    progress(f"{source.id}: {len(prepared.rows):,} rows", last=True)
    if not prepared.rows:
        raise Problems([f"{source.id}: no row is left ({lost(prepared.dropped.placed()) or 'it is empty'})"])
    return prepared


def _without_a_mix(error: SourceError) -> str:
    """The reason with remedies there are here, in place of keys of a mix."""
    here = "rename them, or name the file itself in SFT_DATASET_MIX and say which column"
    return str(error).replace('give the source "encoding": ', "add --encoding ").replace("say which column", here)


def _distinct(source: Source, text_format: str, dropped: Tally) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    _, raw_rows = open_source(source)
    for number, row, shape in Columns(source).rows(raw_rows(), dropped):
        try:
            messages = read_messages(row, shape)
            if packed(messages, tools_of(row, shape)):
                raise Dropped("tools, tool calls, reasoning or flags of turns, which these formats cannot hold")
            digest = content_hash(messages)
        except Dropped as reason:
            dropped.add(reason_of(reason, row), number)
            continue
        if digest in seen:
            dropped.add("duplicate", number)
            continue
        seen.add(digest)
        if text_format == "alpaca":
            messages = _with_input_heading(messages, row)
        yield {"messages": messages, "text": TEXTS[text_format](messages)}


def _with_input_heading(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """Alpaca shows the input of an instruction under a heading of its own; training is to see what `text` shows."""
    if len(messages) != 2 or "instruction" not in row or not str(row.get("input") or "").strip():
        return messages
    return [messages[0] | {"content": f"{row['instruction']}\n\n### Input:\n{row['input']}"}, messages[1]]


def _keep(
    rows: Sequence[dict[str, Any]],
    prepared: Prepared,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
) -> None:
    if tokenizer is None:
        prepared.rows += rows
        return
    for row, ids in zip(rows, tokenizer([row["text"] for row in rows])["input_ids"], strict=True):
        if len(ids) > max_length:
            prepared.dropped.rows["over-long"] += 1
        else:
            prepared.rows.append(row)
            prepared.lengths.append(len(ids))


def save_dataset(prepared: Prepared, target: Path, metadata: Mapping[str, Any]) -> None:
    """Write the rows as the split `train` and metadata.json beside it; the folder appears complete or not at all."""
    lengths = {"histogram": histogram(prepared.lengths)} if prepared.lengths else {}
    counted = {"num_samples": len(prepared.rows), "dropped": prepared.dropped.placed(), **lengths}
    with published_folder(target) as folder:
        train = datasets.Dataset.from_list(prepared.rows)
        datasets.disable_progress_bars()
        datasets.DatasetDict({"train": train}).save_to_disk(str(folder))
        (folder / "metadata.json").write_text(json_text({**metadata, **counted}) + "\n", encoding="utf-8")


def lost(dropped: Mapping[str, int]) -> str:
    """Lost rows by reason, for people: "duplicate 12, over-long 3"."""
    return ", ".join(f"{reason} {number:,}" for reason, number in sorted(dropped.items()))


def histogram(values: Sequence[int]) -> list[tuple[int, int]]:
    """(largest value of the bin, how many) in at most ten bins of equal width from 0 up."""
    width = max(1, -(-max(values) // BINS))
    counts = Counter((value - 1) // width if value else 0 for value in values)
    return [((number + 1) * width, counts[number]) for number in range(max(counts) + 1)]


def bars(counted: Iterable[tuple[int, int]]) -> str:
    """A histogram as lines of text, the longest bar 40 characters."""
    counted = list(counted)
    most = max((number for _, number in counted), default=1) or 1
    return "\n".join(f"  <= {edge:>6,}  {number:>8,}  {'#' * round(40 * number / most)}" for edge, number in counted)

"""The check before training: every row is trained on, to its end, and nowhere in its prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sft.data.labels.rendering import Rendered, is_plain, render
from sft.data.labels.template import TEMPLATE_ERRORS, Chat, ChatTemplate, chats_of, probes, template_of
from sft.data.labels.tokens import encoder
from sft.data.masked_loss.edge_mask import MASKED
from sft.data.sources.load import Rows
from sft.data.sources.pages import in_turn
from sft.data.sources.store import clean_mark
from sft.storage.atomic import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.settings import Settings

VERSION = 1  # raise it when more is asked of rows
_ROWS_AT_ONCE = 1000  # of 2,048 tokens: 16 MB of labels in memory
_ROWS_SHOWN = 5  # enough to see whether they have something in common
_PROMPTS_CHECKED = 100  # spread over the rows; each is rendered once more


def audit(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str]:
    """Problems of labelled rows, each naming the first rows that have it (numbered from 0 among the kept rows).

    Labels are read as they are, not made again: a damaged cache or a template with marks in the wrong place shows.
    Stored rows that passed are not read again while they are the same: their name says with which tokenizer, template
    and settings they were made, all that is asked here.
    """
    mark = clean_mark(rows.labels) if rows.labels else None
    if mark and _says(mark[0], f"{VERSION} {mark[1]}"):
        return []
    problems = _problems(rows, tokenizer, settings)
    if mark and not problems:
        with contextlib.suppress(OSError):
            write_text(mark[0], f"{VERSION} {mark[1]}")
    return problems


def _says(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def _problems(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str]:
    template = template_of(tokenizer, settings.template_options)
    untrained, unended, altered = _scan(rows, _end_tokens(template, tokenizer))
    if settings.overlong == "truncate":
        lengths = rows.dataset["length"]
        unended = [row for row in unended if lengths[row] < settings.max_seq_len]
    faults = {"no trained token": untrained, "labels that are not the row's tokens": altered}
    if not settings.train_on_prompt:
        faults["an end of turn that is not trained"] = unended
        faults["trained tokens in the prompt"] = _trained_prompts(rows, template, tokenizer) if template else []
    problems = [_problem(rows.source.id, fault, numbers) for fault, numbers in faults.items() if numbers]
    if unknown := _unknown(rows, tokenizer.unk_token_id):
        problems.append(
            f"SFT_BASE_MODEL=: {len(unknown)} rows of {rows.source.id} are mostly {tokenizer.unk_token}"
            f" ({_shown(unknown)}): the tokenizer has no tokens for their text; take a base model that was made for it,"
            " or repair its tokenizer"
        )
    return problems


def _problem(name: str, fault: str, numbers: list[int]) -> str:
    return (
        f"SFT_CHAT_TEMPLATE=: {len(numbers)} rows of {name} have {fault} ({_shown(numbers)}); the chat template must"
        " write the end-of-turn token after the answer, inside its generation marks if it has them"
    )


def _shown(numbers: list[int]) -> str:
    return "rows " + ", ".join(map(str, numbers[:_ROWS_SHOWN])) + (", ..." if len(numbers) > _ROWS_SHOWN else "")


def _unknown(rows: Rows, unknown: int | None) -> list[int]:
    """Rows of which more than half the tokens stand for text the tokenizer does not know."""
    found: list[int] = []
    start = 0
    for table in in_turn(rows.dataset, ["input_ids"], _ROWS_AT_ONCE):
        ids = table["input_ids"].combine_chunks()
        counts = np.add.reduceat(np.append(ids.flatten().to_numpy() == unknown, 0), ids.offsets.to_numpy()[:-1])
        found += (np.flatnonzero(counts * 2 > ids.value_lengths().to_numpy()) + start).tolist()
        start += len(table)
    return found


def _scan(rows: Rows, ends: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Rows without a trained token, rows whose last trained token ends no turn, rows with labels of other tokens."""
    faulty: tuple[list[int], list[int], list[int]] = ([], [], [])
    start = 0
    for table in in_turn(rows.dataset, ["input_ids", "labels"], _ROWS_AT_ONCE):
        ids, labels = (np.asarray(table[name].combine_chunks().flatten()) for name in ("input_ids", "labels"))
        lengths = np.asarray(table["labels"].combine_chunks().value_lengths())
        borders = np.concatenate([[0], np.cumsum(lengths)])
        trained = np.flatnonzero(labels != MASKED)
        last = np.searchsorted(trained, borders[1:]) - 1
        none = (last < 0) | (trained[np.maximum(last, 0)] < borders[:-1]) if len(trained) else lengths >= 0
        final = labels[trained[np.maximum(last, 0)]] if len(trained) else np.zeros(len(lengths), np.int32)
        other = np.unique(np.searchsorted(borders, trained[labels[trained] != ids[trained]], side="right") - 1)
        found = (np.flatnonzero(none), np.flatnonzero(~none & ~np.isin(final, ends)), other)
        for numbers, new in zip(faulty, found, strict=True):
            numbers += (new + start).tolist()
        start += len(lengths)
    return faulty


def _end_tokens(template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens a turn may end with: the last ones of the template's turns, and the end of text of plain rows."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if template is not None and template.closing:
        rows = [row for row in render(template, probes(template)) if isinstance(row, Rendered)]
        for row, encoded in zip(rows, encoder(tokenizer)([row.text for row in rows]), strict=True):
            ends += [encoded.ids[encoded.end(end) - 1] for _, end in row.turns]
    return ends


def _trained_prompts(rows: Rows, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of rows spread over the source, those with a trained token before their first answer, found by its prompt."""
    step = max(1, len(rows.dataset) // _PROMPTS_CHECKED)
    numbers = list(range(0, len(rows.dataset), step))
    chosen = rows.dataset.select(numbers).select_columns(["messages", "extras", "labels"]).to_dict()
    prompts = [_prompt(template, chat) for chat in chats_of(chosen["messages"], chosen["extras"])]
    encodings = encoder(tokenizer)([text for text, _ in prompts])
    checked = zip(numbers, prompts, encodings, chosen["labels"], strict=True)
    return [
        number
        for number, (_, length), encoded, labels in checked
        if any(label != MASKED for label in labels[: encoded.end(length)])
    ]


def _prompt(template: ChatTemplate, chat: Chat) -> tuple[str, int]:
    """The whole text and how much of it is the prompt of the first answer; 0 where the template rewrites prompts."""
    messages, tools = chat
    first = next((k for k, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if is_plain(messages) or not first:
        return "", 0
    try:
        (text,), (prompt,) = template.render([chat]), template.render([Chat(messages[:first], tools)], prompt=True)
    except TEMPLATE_ERRORS:
        return "", 0
    return (text, len(prompt)) if text.startswith(prompt) else ("", 0)

"""Rows of messages -> input_ids and labels: made in batches, kept on disk, shown in colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, groupby
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sft.data.labels.masks import label_row, schema, with_labels
from sft.data.labels.rendering import Rendered, render
from sft.data.labels.template import Chat, ChatTemplate, chat_template_for, chats_of, template_of
from sft.data.labels.tokens import Encoded, PromptBorder, encode_up_to, encoder, plain_ends
from sft.data.masked_loss.edge_mask import MASKED
from sft.data.sources.columns import Tally
from sft.data.sources.load import SCHEMA, Rows
from sft.data.sources.pages import giving_back
from sft.data.sources.store import Write, key_of, stored
from sft.data.sources.turns import Dropped, packed
from sft.data.workers import cores, in_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.settings import Settings

__all__ = ["chat_template_for", "label", "preview"]

# Part of every key: raise it when labels come out differently, and old caches are left alone.
VERSION = 6
_ROWS_AT_ONCE = 512  # handed to a process at once
# Below, the tokenizer's own threads are as fast: starting processes takes about as long as they save.
_ROWS_WORTH_PROCESSES = 5000
_CALLS_BETWEEN = 16  # two times that a process gives back the pages it read
# Up to so many, looking words up in one process is as fast as the tokenizer's own threads.
_CORES_LIKE_KNOWN_WORDS = 4
_GREEN, _RESET = "\x1b[32m", "\x1b[0m"


def label(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Rows:
    """Rows with `input_ids`, `labels` (-100 where masked), `length` and `trained` (tokens); under a masked loss also
    `unit_edges`, `unit_starts` and `unit_ends` (token spans, end exclusive).

    Rows that cannot be trained on are dropped and counted. The result is kept on disk, under a key of the rows'
    content, the tokenizer and the settings that matter here.

    Raises:
        Problems: the tokenizer has no usable chat template.
    """
    template = template_of(tokenizer, settings.template_options)
    text = template.text if template else None
    key = key_of("labels", VERSION, rows.fingerprint, text, _tokenizer_key(tokenizer), _settings_key(settings))
    found = stored(f"labels-{key}", schema(settings), partial(_label_all, rows, tokenizer, template, settings))
    return replace(
        rows,
        dataset=found.dataset,
        labels=found.path,
        dropped=rows.dropped + found.counted["dropped"],
        noted=rows.noted + found.counted["noted"],
        first=dict(found.counted["first"]) | rows.first,
    )


def preview(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], *, colour: bool = True) -> str:
    """A row as the model sees it, trained tokens in green (in 「」 without colour)."""
    before, after = (_GREEN, _RESET) if colour else ("「", "」")
    parts = []
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for masked, group in groupby(pairs, key=lambda pair: pair[1] == MASKED):
        text = str(tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False))
        parts.append(text if masked else f"{before}{text}{after}")
    return "".join(parts)


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = [sorted(tokenizer.get_vocab().items()), *plain_ends(tokenizer)]
    return [type(tokenizer).__name__, vocabulary, tokenizer.special_tokens_map]


def _settings_key(settings: Settings) -> list[Any]:
    markers = [settings.output_markers, settings.output_learn_mode] if settings.mask_cot else None
    unit = [settings.masked_loss_unit, settings.output_markers] if settings.masked_loss != "none" else None
    told = [settings.template_options, settings.train_turns]
    return [settings.max_seq_len, settings.overlong == "truncate", settings.train_on_prompt, markers, unit, told]


def _label_all(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, settings: Settings, write: Write
) -> dict[str, Counter[str]]:
    """Label all rows in their order, batch by batch, so that memory does not grow with the rows."""
    total = len(rows.dataset)
    tables, give_back = rows.dataset.with_format("arrow"), giving_back(rows.dataset)
    calls = count(1)
    opening = template.opening if template else ""
    processes = settings.num_proc or (cores() if total >= _ROWS_WORTH_PROCESSES else 1)
    if template is None:
        processes = 1  # that a row needs one is found here, not in another process
    known = processes > 1 or cores() <= _CORES_LIKE_KNOWN_WORDS
    encode, ends = _row_encoder(tokenizer, settings.max_seq_len, opening, known=known), plain_ends(tokenizer)

    def label_from(start: int) -> tuple[pa.Table, Tally, Counter[str]]:
        table = tables[start : start + _ROWS_AT_ONCE]
        table, chats = _chats(table, template)
        rendered = render(template, chats, ends=ends, train=settings.train_turns)
        labelled = _label_batch(table, rendered, encode(rendered), settings)
        if next(calls) % _CALLS_BETWEEN == 0:
            give_back()
        return labelled

    starts = range(0, total, _ROWS_AT_ONCE)
    dropped, noted = Tally(), Counter[str]()
    for labelled, lost, notes in in_order(label_from, starts, processes=min(processes, len(starts))):
        write(labelled)
        dropped.update(lost)
        noted += notes
    return {"dropped": dropped.rows, "first": Counter(dropped.first), "noted": noted}


def _row_encoder(
    tokenizer: PreTrainedTokenizerBase, most: int, opening: str, *, known: bool
) -> Callable[[Sequence[Rendered | Dropped]], list[Encoded]]:
    """A function from rows to their encodings; those of plain text begin as the tokenizer begins texts, the trained
    answers of others, where they stand right behind the prompt's `opening`, as they would be said. Of rows with more
    than `most` tokens only the beginning may be encoded. `known`: words that were met are looked up."""
    alone, plain = (
        partial(encode_up_to, encoder(tokenizer, special=own, known=known), most=most) for own in (False, True)
    )

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    border = PromptBorder(opening, alone, decode)

    def encode(rows: Sequence[Rendered | Dropped]) -> list[Encoded]:
        texts = ["" if isinstance(row, Dropped) else row.text for row in rows]
        borders = [[] if isinstance(row, Dropped) else row.borders(opening) for row in rows]
        if not any(isinstance(row, Rendered) and row.plain for row in rows):
            return border.kept(alone(texts), borders)
        kinds = [isinstance(row, Rendered) and row.plain for row in rows]
        found = {
            kind: iter(each([text for text, its in zip(texts, kinds, strict=True) if its == kind]))
            for kind, each in ((False, alone), (True, plain))
        }
        return border.kept([next(found[kind]) for kind in kinds], borders)

    return encode


def _chats(table: pa.Table, template: ChatTemplate | None) -> tuple[pa.Table, list[Chat]]:
    """The conversations of the table as the template takes them, and the table with them."""
    chats = chats_of(table["messages"].to_pylist(), table["extras"].to_pylist())
    if template is not None and not template.takes_system:
        chats = [Chat(template.fitted(messages), tools) for messages, tools in chats]
        columns = {"messages": [messages for messages, _ in chats], "extras": [packed(*chat) for chat in chats]}
        for name, values in columns.items():
            place = SCHEMA.get_field_index(name)
            table = table.set_column(place, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    return table, chats


def _label_batch(
    table: pa.Table, texts: Sequence[Rendered | Dropped], encodings: Sequence[Encoded], settings: Settings
) -> tuple[pa.Table, Tally, Counter[str]]:
    """The rows of the table that can be trained on, with labels; the others by reason; what happened to those kept."""
    dropped, noted = Tally(), Counter[str]()
    kept, labelled = [], []
    paths = table["paths"].to_pylist() if settings.masked_loss != "none" else [None] * len(table)
    for row, (rendered, encoded) in enumerate(zip(texts, encodings, strict=True)):
        try:
            labelled.append(label_row(rendered, encoded, settings, noted=noted, paths=paths[row]))
            kept.append(row)
        except Dropped as reason:
            dropped.add(str(reason), table["number"][row].as_py())
    return with_labels(table.take(pa.array(kept, pa.int64())), labelled, schema(settings)), dropped, noted

"""Rows of messages -> input_ids and labels: made in batches, kept on disk, shown in colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sft.data.masks import MASKED, label_row, schema, with_labels
from sft.data.rendering import Rendered, render, template_of
from sft.data.shapes import Dropped
from sft.data.sources import Rows
from sft.data.store import Write, key_of, stored
from sft.data.templates import chat_template_for
from sft.data.tokens import Encoded, encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.settings import Settings

__all__ = ["MASKED", "chat_template_for", "label", "preview"]

# Part of every key: raise it when labels come out differently, and old caches are left alone.
VERSION = 1
_ROWS_AT_ONCE = 512
_GREEN, _RESET = "\x1b[32m", "\x1b[0m"


def label(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Rows:
    """Rows with `input_ids`, `labels` (-100 where masked), `length` and `trained` (tokens); under a masked loss also
    `unit_edges`, `unit_starts` and `unit_ends` (token spans, end exclusive).

    Rows that cannot be trained on are dropped and counted. The result is kept on disk, under a key of the rows'
    content, the tokenizer and the settings that matter here.

    Raises:
        Problems: the tokenizer has no usable chat template.
    """
    key = key_of("labels", VERSION, rows.fingerprint, _tokenizer_key(tokenizer), _settings_key(settings))
    found = stored(f"labels-{key}", schema(settings), partial(_label_all, rows, tokenizer, settings))
    return replace(
        rows,
        dataset=found.dataset,
        dropped=rows.dropped + found.counted["dropped"],
        noted=rows.noted + found.counted["noted"],
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
        vocabulary = sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map]


def _settings_key(settings: Settings) -> list[Any]:
    markers = [settings.output_markers, settings.output_learn_mode] if settings.mask_cot else None
    unit = [settings.masked_loss_unit, settings.output_markers] if settings.masked_loss != "none" else None
    return [settings.max_seq_len, settings.overlong == "truncate", settings.train_on_prompt, markers, unit]


def _label_all(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, write: Write
) -> dict[str, Counter[str]]:
    dropped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    for table, texts, encodings in _encoded(rows, tokenizer):
        kept, labelled = [], []
        for row, (rendered, encoded) in enumerate(zip(texts, encodings, strict=True)):
            try:
                labelled.append(label_row(rendered, encoded, settings, noted=noted))
                kept.append(row)
            except Dropped as reason:
                dropped[str(reason)] += 1
        write(with_labels(table.take(kept), labelled, schema(settings)))
    return {"dropped": dropped, "noted": noted}


def _encoded(
    rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[pa.Table, list[Rendered | None], Sequence[Encoded]]]:
    """Batches as table, text and tokens. The next batch is rendered here while another thread tokenises this one."""
    template, encode = template_of(tokenizer), encoder(tokenizer)
    tables = rows.dataset.with_format("arrow").iter(_ROWS_AT_ONCE)
    before: tuple[Any, ...] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for table in tables:
            texts = render(template, table["messages"].to_pylist(), eos=tokenizer.eos_token or "")
            encodings = pool.submit(encode, [row.text if row else "" for row in texts])
            if before is not None:
                yield before[0], before[1], before[2].result()
            before = table, texts, encodings
        if before is not None:
            yield before[0], before[1], before[2].result()

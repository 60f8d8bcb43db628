"""Greedy answers behind prompts that were read: what is finished leaves, and no row reads another's padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from sft.evaluation.reading import Read, columns_held, forward_settings
from sft.evaluation.shared import groups
from sft.models import ragged

# Answers leave when a quarter of the batch is finished: moving the others costs about two steps.
_LEAVE = 0.75
# What looks at each row by itself, so that rows may leave. There are processors that remember all rows.
_ROW_BY_ROW = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
# A run of rows costs a layer some calls more, in which the cache could have been read on: 40 us at 10 GB/s.
_RUN_BYTES = 400_000


class Decoder:
    """The loop of one batch. Rows are in the order of `read`, tokens in columns padded on the left."""

    def __init__(self, read: Read, *, room: int, pad: int) -> None:
        self.read, self.pad, self.cache = read, pad, read.cache
        device = read.logits.device
        self.lengths = torch.tensor(read.lengths, device=device)
        self.mask = columns_held(read.lengths, width=read.width, columns=read.width + room, device=device)
        self.runs: list[ragged.Run] = []

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **_: Any,
    ) -> torch.Tensor:
        """The `custom_generate` of transformers' `generate`, which has made of the model's own settings what changes
        the choice of a token and what ends an answer.

        Args:
            input_ids: (rows, width).
            logits_processor, stopping_criteria: transformers' lists of them.

        Returns:
            (rows, width + longest answer); shorter answers are padded on the right.
        """
        ids = input_ids.new_full(self.mask.shape, self.pad)
        end = input_ids.shape[1]
        ids[:, :end] = input_ids
        answers, lines = ids.clone(), torch.arange(len(ids), device=ids.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        may_leave = all(isinstance(each, _ROW_BY_ROW) for each in logits_processor)
        logits = self.read.logits
        with self._decoding(model):
            while True:
                scores = logits_processor(ids[:, :end], logits.to(torch.float32, copy=True))
                ids[:, end] = scores.argmax(dim=-1).masked_fill(done, self.pad)
                end += 1
                done = done | stopping_criteria(ids[:, :end], None)
                left = len(done) - int(done.sum())
                if left == 0 or (may_leave and left <= _LEAVE * len(done)):
                    answers[lines, :end] = ids[:, :end]
                    if left == 0:
                        return answers[:, :end]
                    staying = (~done).nonzero()[:, 0]
                    ids, lines, done = ids[staying], lines[staying], done[staying]
                    keep_rows(logits_processor, staying)
                    self._keep(staying, end - 1)
                logits = self._step(model, ids[:, end - 1 : end], end)

    def _step(self, model: Any, tokens: torch.Tensor, end: int) -> torch.Tensor:
        """Logits (rows, words) behind one more token of each row, which stands in the column before `end`."""
        found = model(
            input_ids=tokens,
            position_ids=(self.lengths + (end - 1 - self.read.width))[:, None],
            attention_mask=self.mask[:, self.first : end] if self.padded else None,
            past_key_values=self.cache,
            **forward_settings(model),
        )
        return found.logits[:, -1]

    @contextmanager
    def _decoding(self, model: Any) -> Iterator[None]:
        """As transformers prepares a model for decoding; with our attention where rows of unequal length gain by it."""
        self.by_runs = ragged.takes_runs(model)
        self._arrange(self.read.width)
        with model._optimize_model_for_decode():
            if len(self.runs) == 1:
                yield
            else:
                with ragged.run_by_run(model):
                    yield

    def _arrange(self, end: int) -> None:
        """Runs of rows for the lengths there are; the cache is used from the first column that one of them needs."""
        lengths, width = self.lengths.tolist(), self.read.width
        cost = _RUN_BYTES // self.cache.column_bytes()
        parts = groups(lengths, cost=cost) if self.by_runs else [slice(0, len(lengths))]
        self.runs = [(part, width - max(lengths[part])) for part in parts]
        self.first, self.padded = width - max(lengths), min(lengths) < max(lengths)
        self.cache.turn_to(slice(0, len(lengths)), self.first, end)
        many = len(self.runs) > 1
        self.cache.mark([(rows, first - self.first) for rows, first in self.runs] if many else None)

    def _keep(self, staying: torch.Tensor, end: int) -> None:
        """Only these rows go on; what stands before the column `end` of them goes with them."""
        parts = []
        for rows, first in self.runs:
            inside = staying[(staying >= rows.start) & (staying < rows.stop)]
            if len(inside):
                parts.append((inside, first))
        self.cache.keep(parts, end)
        self.lengths, self.mask = self.lengths[staying], self.mask[staying]
        self._arrange(end)


def keep_rows(processors: LogitsProcessorList, staying: torch.Tensor) -> None:
    """A penalty of repetitions knows of each row what pads it."""
    for each in processors:
        padding = getattr(each, "prompt_ignore_length", None)
        if isinstance(padding, torch.Tensor):
            each.prompt_ignore_length = padding.to(staying.device)[staying]

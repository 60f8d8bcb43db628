"""Attention of one new token each over cached prompts of unequal length: no row reads what pads the longest one.

A batch of answers is padded to its longest prompt, and every step reads the cache of all rows over that width: with
prompts of 42 to 426 tokens three and a half times the keys and values there are. Rows of similar length stand next to
one another, so a cache that knows its runs of them marks what it returns, and each run is a call of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.models import attention

NAME = "staged_sft_answers"
Run = tuple[slice, int]
"""Neighbouring rows, and the first column that one of them needs."""


def mark(keys: torch.Tensor, runs: list[Run] | None) -> torch.Tensor:
    """Keys (rows, heads, columns, size) that know which of their columns are needed; a model that changes them loses
    the mark, and with it only the saving."""
    vars(keys)["runs"] = runs
    return keys


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, run by run where `key` is marked and each row has one query.

    Shapes as there: query (rows, heads, 1, size), mask (rows, 1 or heads, 1, columns), result (rows, 1, heads, size).
    """
    runs = getattr(key, "runs", None)
    if not runs or query.shape[2] > 1 or attention_mask is None or keywords.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    parts = [
        sdpa_attention_forward(
            module,
            query[rows],
            key[rows, :, first:],
            value[rows, :, first:],
            attention_mask[rows, ..., first:],
            **keywords,
        )[0]
        for rows, first in runs
    ]
    return torch.cat(parts), None


def takes_runs(model: PreTrainedModel) -> bool:
    """Whether runs pay: on a GPU a step is bound by the number of its kernels, and other attention takes no marks."""
    return model.device.type == "cpu" and model.config._attn_implementation in ("sdpa", attention.NAME)


@contextmanager
def run_by_run(model: PreTrainedModel) -> Iterator[None]:
    """This attention in the model, and afterwards what it had."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Prompts read into a roomy cache: in few passes, without much padding, and what several begin with only once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sft.evaluation.roomy import KeysValues, RoomyCache
from sft.evaluation.shared import Beginning, Prompt, groups, pass_cost

Kept = dict[Beginning, list[KeysValues]]
"""What beginnings left in the cache, by layer: (1, heads, tokens, size) each."""


@dataclass(frozen=True)
class Read:
    """Prompts in a cache, padded on the left. `order` says which prompt each row is; `lengths` and `logits` (behind
    the last token; rows x words) are in this order."""

    cache: RoomyCache
    order: list[int]
    lengths: list[int]
    logits: torch.Tensor

    @property
    def width(self) -> int:
        return max(self.lengths)


def bare(model: Any) -> PreTrainedModel:
    """The model whose `generate` is called in the end: without PEFT's wrapper or that of a compiler."""
    model = model.generate.__self__
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def keeps_all(model: PreTrainedModel) -> bool:
    """Whether every layer keeps all keys and values of its own, and the model takes what we hand it: not where one
    has a window or a recurrent state, or the model's settings ask for another cache."""
    taken = inspect.signature(type(model).forward).parameters.keys() >= {"position_ids", "logits_to_keep"}
    usual = model.generation_config.cache_implementation is None
    return taken and usual and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def forward_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What every pass is told besides its tokens."""
    told: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        # Where the model's settings ask for them, a mixture weighs its experts' loads by a mask that is longer than
        # the one token it is handed behind a cache.
        told["output_router_logits"] = False
    return told


def columns_held(lengths: Sequence[int], *, width: int, columns: int, device: torch.device) -> torch.Tensor:
    """Mask (rows, columns) of prompts that end at `width`: what stands to their left is padding."""
    starts = width - torch.tensor(lengths, device=device)
    return torch.arange(columns, device=device) >= starts[:, None]


def left_padded(rows: Sequence[Sequence[int]], *, pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (rows, longest), both long."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    return ids, columns_held([len(row) for row in rows], width=width, columns=width, device=device).long()


def read_prompts(model: PreTrainedModel, prompts: Sequence[Prompt], *, room: int, kept: Kept) -> Read | None:
    """Reads all prompts, beginnings that are not in `kept` first, which are put there.

    Args:
        model: as it is called, in PEFT's wrapper or without.
        room: columns for tokens that follow.

    Returns:
        None where a layer of the model keeps something else than all keys and values of its own (a window, a recurrent
        state, those of another layer), or the model's settings ask for another cache.
    """
    if not keeps_all(bare(model)):
        return None
    missing = sorted({prompt.beginning for prompt in prompts if prompt.shared} - kept.keys())
    if missing:
        found = _read(model, [Prompt(beginning) for beginning in missing], room=0, kept={})
        if found is None:
            return None
        for row, number in enumerate(found.order):
            kept[missing[number]] = found.cache.of_row(row, found.width - found.lengths[row], found.width)
    return _read(model, prompts, room=room, kept=kept)


def _read(model: PreTrainedModel, prompts: Sequence[Prompt], *, room: int, kept: Kept) -> Read | None:
    """Rows in groups of similar length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda number: -prompts[number].rest)
    rows = [prompts[number] for number in order]
    width = max(len(row.ids) for row in rows)
    cache = RoomyCache(model.config, len(rows), width + room)
    for line, row in enumerate(rows):
        if row.shared:
            cache.place(line, width - row.rest, kept[row.beginning])
    logits = []
    for group in groups([row.rest for row in rows], cost=pass_cost(model.device.type)):
        held = max(len(row.ids) for row in rows[group])
        cache.turn_to(group, width - held, width - rows[group.start].rest)
        logits.append(_read_group(model, rows[group], cache=cache))
        if not cache.holds(held):
            return None
    cache.turn_to(slice(0, len(rows)), 0, width)
    return Read(cache, order, [len(row.ids) for row in rows], torch.cat(logits))


def _read_group(model: PreTrainedModel, rows: Sequence[Prompt], *, cache: RoomyCache) -> torch.Tensor:
    """One pass over the last tokens of every row, as many as the row that has most to read; logits (rows, words)."""
    lengths = [len(row.ids) for row in rows]
    held, read = max(lengths), max(row.rest for row in rows)
    ids, _ = left_padded([row.ids[-read:] for row in rows], pad=0, device=model.device)
    mask = columns_held(lengths, width=held, columns=held, device=model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -read:]
    return model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask if min(lengths) < held else None,
        past_key_values=cache,
        **forward_settings(model),
    ).logits[:, -1]

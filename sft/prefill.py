"""Prompts of a batch read in groups of similar length, into one key-value cache with room for the answers.

transformers pads every prompt of a batch to the longest and copies the whole cache for every new token. Here a group
of prompts is padded to its own longest, and each token is written where it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# The shortest prompt of a group, as a share of its longest: at most a quarter of what is computed is padding.
_SIMILAR = 0.75


class RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, columns, size) of one layer, allocated once; `keys` and `values` are the used part.

    Between groups `turn_to` moves the used part: rows, and columns from the first of them on.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = rows, columns
        self.rooms: tuple[torch.Tensor, ...] = ()
        self.rows, self.first = slice(0, rows), 0

    def turn_to(self, rows: slice, first: int, end: int) -> None:
        self.rows, self.first = rows, first
        if self.rooms:
            self.keys, self.values = (room[rows, :, first:end] for room in self.rooms)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, columns = self.shape
            # Zeros, as what is left of a short prompt is masked but still multiplied.
            self.rooms = tuple(
                states.new_zeros(rows, states.shape[1], columns, states.shape[3])
                for states in (key_states, value_states)
            )
        start = self.first + self.get_seq_length()
        end = start + key_states.shape[2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[self.rows, :, start:end] = states
        self.turn_to(self.rows, self.first, end)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values


def similar_lengths(lengths: Sequence[int]) -> list[slice]:
    """Groups of neighbours for lengths in falling order."""
    groups, start = [], 0
    for position in range(1, len(lengths) + 1):
        if position == len(lengths) or lengths[position] < _SIMILAR * lengths[start]:
            groups.append(slice(start, position))
            start = position
    return groups


def read_prompts(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, **generate: Any
) -> DynamicCache | None:
    """The cache of all prompts but their last token, which `generate` reads when it is handed the cache.

    Args:
        input_ids, attention_mask: (rows, tokens), padded on the left, the longest prompt first.
        generate: further arguments of the model's `generate`.

    Returns:
        None where a layer of the model keeps something else than all keys and values of its own (a window, a recurrent
        state, those of another layer), or the model's settings ask for another cache.
    """
    cache = DynamicCache(config=model.config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain or model.generation_config.cache_implementation is not None:
        return None
    count, width = input_ids.shape
    layers = [RoomyLayer(count, width + max_new_tokens) for _ in cache.layers]
    cache.layers = list(layers)
    lengths = attention_mask.sum(dim=1).tolist()
    for rows in similar_lengths(lengths):
        first = width - lengths[rows.start]
        for layer in layers:
            layer.turn_to(rows, first, first)
        model.generate(
            input_ids=input_ids[rows, first:],
            attention_mask=attention_mask[rows, first:],
            past_key_values=cache,
            **generate | {"max_new_tokens": 1, "min_new_tokens": 0},
        )
        if any(layer.get_seq_length() != width - first for layer in layers):
            return None
    for layer in layers:
        layer.turn_to(slice(0, count), 0, width - 1)
    return cache

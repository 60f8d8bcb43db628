"""A cache of keys and values that is allocated once: prompts are read into parts of it, tokens written in place."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from sft.models import ragged

KeysValues = tuple[torch.Tensor, torch.Tensor]


class RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, columns, size) of one layer, allocated once; `keys` and `values` are the used part.

    Between groups `turn_to` moves the used part: rows, and columns from the first of them on.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = rows, columns
        self.rooms: tuple[torch.Tensor, ...] = ()
        self.rows, self.first = slice(0, rows), 0
        self.runs: list[ragged.Run] | None = None

    def turn_to(self, rows: slice, first: int, end: int) -> None:
        self.rows, self.first = rows, first
        if self.rooms:
            self.keys, self.values = (room[rows, :, first:end] for room in self.rooms)

    def allocate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Room for states like these. Zeros, as what is left of a short prompt is masked but still multiplied."""
        self.lazy_initialization(key_states, value_states)
        rows, columns = self.shape
        self.rooms = tuple(
            zeros((rows, states.shape[1], columns, states.shape[3]), like=states)
            for states in (key_states, value_states)
        )

    def place(self, row: int, end: int, states: KeysValues) -> None:
        """States (1, heads, tokens, size) of a beginning into the columns of a row before `end`."""
        if not self.is_initialized:
            self.allocate(*states)
        for room, each in zip(self.rooms, states, strict=True):
            room[row, :, end - each.shape[2] : end] = each[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.allocate(key_states, value_states)
        start = self.first + self.get_seq_length()
        end = start + key_states.shape[2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[self.rows, :, start:end] = states
        self.turn_to(self.rows, self.first, end)
        assert self.keys is not None and self.values is not None
        return ragged.mark(self.keys, self.runs), self.values

    def keep(self, parts: Sequence[tuple[torch.Tensor, int]], end: int) -> None:
        """Rows move to the front, part by part (their numbers, their first column), in rising order."""
        placed = 0
        for lines, first in parts:
            for room in self.rooms:
                room[placed : placed + len(lines), :, first:end] = room[:, :, first:end].index_select(0, lines)
            placed += len(lines)


class RoomyCache(DynamicCache):
    """A cache of roomy layers for a model whose layers keep all keys and values of their own."""

    def __init__(self, config: PretrainedConfig, rows: int, columns: int) -> None:
        super().__init__(config=config)
        self.rooms = [RoomyLayer(rows, columns) for _ in self.layers]
        self.layers = list(self.rooms)

    def turn_to(self, rows: slice, first: int, end: int) -> None:
        for layer in self.rooms:
            layer.turn_to(rows, first, end)

    def place(self, row: int, end: int, states: Sequence[KeysValues]) -> None:
        """Keys and values of a beginning, by layer, into the columns of a row before `end`."""
        for layer, each in zip(self.rooms, states, strict=True):
            layer.place(row, end, each)

    def of_row(self, row: int, start: int, end: int) -> list[KeysValues]:
        """Keys and values of a row's columns, by layer, to be kept."""
        kept = [[room[row : row + 1, :, start:end].clone() for room in layer.rooms] for layer in self.rooms]
        return [(keys, values) for keys, values in kept]

    def holds(self, columns: int) -> bool:
        """Whether every layer has written so many in the part that is used."""
        return all(layer.get_seq_length() == columns for layer in self.rooms)

    def column_bytes(self) -> int:
        """Keys and values of one row in one column of a layer."""
        return sum(room[0, :, 0].numel() * room.element_size() for room in self.rooms[0].rooms)

    def mark(self, runs: list[ragged.Run] | None) -> None:
        for layer in self.rooms:
            layer.runs = runs

    def keep(self, parts: Sequence[tuple[torch.Tensor, int]], end: int) -> None:
        for layer in self.rooms:
            layer.keep(parts, end)


def zeros(shape: tuple[int, ...], *, like: torch.Tensor) -> torch.Tensor:
    """On a CPU without touching the memory: a page that no row writes is never taken from the machine.

    Pages stay small. Of those of 2 MiB, which numpy asks for, nearly each holds columns of some row: all of the room
    would be zeroed when prompts are placed.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or not size:
        return like.new_zeros(shape)
    raw = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel that knows no huge pages
            raw.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(raw, dtype=like.dtype).view(shape)

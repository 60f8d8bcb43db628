"""Attention of one row on a CPU, forward and backward, made of matrix products.

torch's fused kernel for CPUs multiplies tiles of a few dozen rows by code of its own and knows no grouped heads, which
are repeated for it. Here a block of queries meets all its keys at once: the scores of a block fit the cache, the heads
of a group are one product with their key, and the library's matrix products do the work. As in the fused kernel only
query, key and value are kept, not even the result; scores are made again for the backward pass, in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Queries of a block: larger ones compute more of the half above the diagonal (docs/log.md has the figures).
_BLOCK = 64
# Scores at once: 1 MiB in float32, what a core keeps near it.
_SCORES = 1 << 18
TAKEN = (torch.float32, torch.bfloat16)
# Shorter rows gain nothing. A row goes its way by its own length alone, whatever it is joined with.
_SHORTEST = 16


def takes_row_on_cpu(query: torch.Tensor) -> bool:
    """Whether a row with these queries, (1, heads, tokens, size), is for `row_on_cpu`."""
    return query.device.type == "cpu" and query.dtype in TAKEN and query.shape[2] >= _SHORTEST


def row_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int, scale: float | None
) -> torch.Tensor:
    """Causal attention of one row: states and result (1, heads, tokens, size), all in one number format.

    Key and value have as many heads as the query, or a fraction of them.
    """
    return _Row.apply(query, key, value, window, query.shape[-1] ** -0.5 if scale is None else scale)


class _Block:
    """Queries `start` to `end` with the keys `reach` to `end` and heads `heads` of the keys."""

    def __init__(self, start: int, end: int, reach: int, heads: slice, window: int) -> None:
        self.queries, self.keys, self.heads = slice(start, end), slice(reach, end), heads
        self.before, self.window = start - reach, window

    def grouped(self, states: torch.Tensor, groups: int) -> torch.Tensor:
        """Of (heads, tokens, size) what belongs here: (heads of the keys, group x queries, size)."""
        found = states.unflatten(0, (groups, -1))[self.heads, :, self.queries]
        return found.flatten(1, 2)

    def put(self, target: torch.Tensor, grouped: torch.Tensor, groups: int) -> None:
        """The other way round, into (tokens, heads, size)."""
        place = target.unflatten(1, (groups, -1))[self.queries, self.heads]
        place.copy_(grouped.unflatten(1, (place.shape[2], -1)).permute(2, 0, 1, 3))

    def weights(self, query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Softmax of the scores: (heads, group x queries, keys), for queries already scaled, in float32."""
        scores = query @ key[self.heads, self.keys].transpose(1, 2)
        count = self.queries.stop - self.queries.start
        each = scores.unflatten(1, (-1, count))
        each[..., self.before :] += hidden[:count, :count]
        if self.before + count > self.window:
            places = torch.arange(self.before + count)
            distance = places[self.before :, None] - places
            each.masked_fill_(distance >= self.window, -torch.inf)
        return scores.softmax(-1)


def _blocks(tokens: int, window: int, groups: int, group: int) -> Iterator[_Block]:
    for start in range(0, tokens, _BLOCK):
        end, reach = min(start + _BLOCK, tokens), max(0, start - window + 1)
        step = max(1, _SCORES // (group * (end - start) * (end - reach)))
        for head in range(0, groups, step):
            yield _Block(start, end, reach, slice(head, head + step), window)


def _hidden() -> torch.Tensor:
    """What is added to the scores of a block with its own tokens: later ones are not seen."""
    return torch.full((_BLOCK, _BLOCK), -torch.inf).triu_(1)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, window: int, scale: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.how = window, scale
        groups, group = key.shape[1], query.shape[1] // key.shape[1]
        result = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        exact_key, value, hidden = key[0].float().contiguous(), value[0].contiguous(), _hidden()
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(query.shape[2], window, groups, group):
                weights = block.weights(block.grouped(query[0], groups).float() * scale, exact_key, hidden)
                block.put(result, weights.to(value.dtype) @ value[block.heads, block.keys], groups)
        return result.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        window, scale = ctx.how
        groups, group, dtype = key.shape[1], query.shape[1] // key.shape[1], value.dtype
        exact_key, exact_value = key[0].float().contiguous(), value[0].float().contiguous()
        key, hidden = key[0].contiguous(), _hidden()
        of_query = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        of_key, of_value = torch.zeros_like(exact_key), torch.zeros_like(exact_value)
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(query.shape[2], window, groups, group):
                heads, keys = block.heads, block.keys
                scaled = block.grouped(query[0], groups).float() * scale
                weights = block.weights(scaled, exact_key, hidden)
                mine = block.grouped(gradient[0], groups)
                of_weights = mine.float() @ exact_value[heads, keys].transpose(1, 2)
                scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, torch.float32).to(dtype)
                of_value[heads, keys] += weights.to(dtype).transpose(1, 2) @ mine
                of_key[heads, keys] += scores.transpose(1, 2) @ scaled.to(dtype)
                block.put(of_query, (scores @ key[heads, keys]) * scale, groups)
        of_key, of_value = of_key.to(dtype), of_value.to(dtype)
        return of_query.transpose(0, 1)[None], of_key[None], of_value[None], None, None

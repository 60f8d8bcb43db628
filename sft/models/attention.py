"""Attention over joined rows: each row by itself, instead of all of them under a block-diagonal mask.

A mask of T x T for T joined tokens makes a device compute, and throw away, what lies outside the rows: with B rows of
equal length B times as much work as needed, twice that for the half above the diagonal, and keys repeated for every
query head besides. Here rows are causal calls without a mask, which also take grouped heads as they are: all of them
in one kernel on a GPU that has it (`torch.nn.attention.varlen`), one after the other elsewhere,
made of matrix products on a CPU (`row_on_cpu`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.models.row_on_cpu import row_on_cpu, takes_row_on_cpu

NAME = "staged_sft_rows"
# What the kernel for rows of any length takes: two number formats, heads up to 256 wide, Ampere and later.
_HALVES = (torch.bfloat16, torch.float16)
_WIDEST_HEAD = 256
_VARLEN_SINCE = (8, 0)
# torch 2.11 takes grouped heads as they come, 2.13 wants to be told of them.
_TOLD_OF_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


class RowsUnknown(RuntimeError):
    """Rows can't be told apart in this attention, or it does more than a causal product."""


def row_lengths(position_ids: torch.Tensor) -> list[int]:
    """Tokens of each row of positions (1, tokens): a row ends where the next position is not one higher."""
    ends = (position_ids[0].diff() != 1).nonzero()[:, 0] + 1
    return ends.diff(prepend=ends.new_zeros(1), append=ends.new_tensor([position_ids.shape[1]])).tolist()


def row_ends(lengths: Sequence[int]) -> torch.Tensor:
    """Where rows of these lengths begin and end, shape (rows + 1,), int32, as kernels want it."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, row by row where one sequence without a mask holds several rows.

    Shapes as there: query (batch, heads, tokens, size), result (batch, tokens, heads, size). The lengths of the rows
    come with the batch (`row_lengths`, and `row_ends` on the device), else from the positions.

    Raises:
        RowsUnknown: there is no mask and nothing that tells rows apart, or a bias, a cap or sinks besides the product.
    """
    tokens = query.shape[2]
    if attention_mask is not None or tokens != key.shape[2] or query.shape[0] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    if any(keywords.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        raise RowsUnknown("more than a product")
    lengths, positions = keywords.get("row_lengths"), keywords.get("position_ids")
    if lengths is None:
        if positions is None:
            raise RowsUnknown("no positions")
        lengths = row_lengths(positions)
    window = keywords.get("sliding_window") or tokens
    dropout, scale = keywords.get("dropout") or 0.0, keywords.get("scaling")
    query, key, value = alike(query, key, value)
    if not dropout and takes_varlen(query, value):
        ends = keywords.get("row_ends")
        ends = row_ends(lengths).to(query.device) if ends is None else ends
        return rows_at_once(query, key, value, ends=ends, longest=max(lengths), window=window, scale=scale), None
    parts = zip(*(states.split(list(lengths), dim=2) for states in (query, key, value)), strict=True)
    rows = [
        row_on_cpu(*part, window=window, scale=scale)
        if not dropout and takes_row_on_cpu(part[0])
        else causal_row(*part, window=window, dropout_p=dropout, scale=scale)
        for part in parts
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


def alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All three in one number format, that of autocast where it is on: norms in float32 leave the query in it."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def takes_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel for rows of any length runs on this device and takes these states."""
    size = query.shape[-1]
    fits = size == value.shape[-1] and size <= _WIDEST_HEAD and size % 8 == 0 and query.dtype in _HALVES
    return query.is_cuda and fits and torch.cuda.get_device_capability(query.device) >= _VARLEN_SINCE


def rows_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    ends: torch.Tensor,
    longest: int,
    window: int,
    scale: float | None,
) -> torch.Tensor:
    """All rows in one kernel: states (1, heads, tokens, size) to (1, tokens, heads, size)."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    # A window counts the token itself, the kernel those before it; a row shorter than that is plainly causal.
    before = window - 1 if window < longest else -1
    told: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _TOLD_OF_GROUPS else {}
    found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(before, 0), **told)
    assert isinstance(found, torch.Tensor)
    return found[None]


def causal_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int, **keywords: Any
) -> torch.Tensor:
    """One row through sdpa, (1, heads, tokens, size), without a mask of tokens x tokens.

    A row longer than the window goes block by block, each block of `window` queries with the keys it can reach.
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and torch.cuda.get_device_capability(query.device) < _VARLEN_SINCE:
        # The kernels before Ampere know no grouped heads: sdpa would keep all scores instead.
        key, value = (s.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for s in (key, value))
        grouped = False
    tokens = query.shape[2]
    keywords |= {"enable_gqa": grouped}
    q, k, v = (states[:, :, :window] for states in (query, key, value))
    parts = [scaled_dot_product_attention(q, k, v, is_causal=True, **keywords)]
    for start in range(window, tokens, window):
        end, reached = min(start + window, tokens), start - window + 1
        places = torch.arange(reached, end, device=query.device)
        distance = places[window - 1 :, None] - places
        band = (distance >= 0) & (distance < window)
        states = query[:, :, start:end], key[:, :, reached:end], value[:, :, reached:end]
        parts.append(scaled_dot_product_attention(*states, attn_mask=band, **keywords))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def mask(*, local_size: int | None = None, use_vmap: bool = False, **keywords: Any) -> torch.Tensor | None:
    """No mask for a sequence that `attend` can split into causal rows; for everything else sdpa's.

    Chunks shorter than the sequence, padding, a cache or a mask of the model's own needs one; a window does not.
    """
    length = keywords["kv_length"]
    windowed = local_size is None or local_size in (getattr(keywords.get("config"), "sliding_window", None),)
    whole = keywords["q_length"] == length and (windowed or local_size >= length)  # type: ignore[operator]
    if whole and keywords["batch_size"] == 1 and keywords.get("attention_mask") is None and not use_vmap:
        return None
    return sdpa_mask(local_size=local_size, use_vmap=use_vmap, **keywords)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)

"""Triton kernels for products in groups, for GPUs and number formats that torch has none for. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SMALLEST = 16  # of a side that tensor cores take


@triton.jit
def rows_kernel(
    x, matrices, out, ends, experts, ins, outs,
    x_row, x_in, of_expert, of_in, of_out, out_row,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one expert times a block of columns of its matrix. Which expert: found here, from `ends`."""
    tile = tl.program_id(0)
    number = tl.arange(0, EXPERTS)
    end = tl.load(ends + number, mask=number < experts, other=0)
    begin = tl.load(ends + number - 1, mask=(number > 0) & (number < experts), other=0)
    tiles = tl.where(number < experts, (end - begin + ROWS - 1) // ROWS, 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum(tl.where((upto <= tile) & (number < experts), 1, 0), 0)
    if expert < experts:
        mine = number == expert
        last = tl.sum(tl.where(mine, end, 0), 0)
        first = tl.sum(tl.where(mine, begin + (tile - (upto - tiles)) * ROWS, 0), 0)
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
        matrix = matrices + expert.to(tl.int64) * of_expert
        total = tl.zeros((ROWS, OUTS), tl.float32)
        for start in range(0, ins, INS):
            inner = start + tl.arange(0, INS)
            left = tl.load(
                x + row[:, None] * x_row + inner[None] * x_in,
                mask=(row < last)[:, None] & (inner < ins)[None],
                other=0.0,
            )
            right = tl.load(
                matrix + inner[:, None] * of_in + column[None] * of_out,
                mask=(inner < ins)[:, None] & (column < outs)[None],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        kept = (row < last)[:, None] & (column < outs)[None]
        tl.store(out + row[:, None] * out_row + column[None], total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def columns_kernel(
    left, right, out, ends, ins, outs,
    left_in, left_row, right_row, right_out,
    ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """A block of one expert's (in, out): the sum over the expert's rows."""
    expert = tl.program_id(0)
    inner = tl.program_id(1) * INS + tl.arange(0, INS)
    column = tl.program_id(2) * OUTS + tl.arange(0, OUTS)
    last = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((INS, OUTS), tl.float32)
    for start in range(first, last, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        a = tl.load(
            left + inner[:, None] * left_in + row[None] * left_row,
            mask=(inner < ins)[:, None] & (row < last)[None],
            other=0.0,
        )
        b = tl.load(
            right + row[:, None] * right_row + column[None] * right_out,
            mask=(row < last)[:, None] & (column < outs)[None],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    place = out + expert.to(tl.int64) * ins * outs + inner[:, None] * outs + column[None]
    tl.store(place, total.to(out.dtype.element_ty), mask=(inner < ins)[:, None] & (column < outs)[None])


def _block(size: int, largest: int) -> int:
    return min(largest, max(_SMALLEST, triton.next_power_of_2(size)))


def rows(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (rows, in), sorted by expert, with matrices (experts, in, out): (rows, out)."""
    (count, ins), (experts, _, outs) = x.shape, matrices.shape
    out = x.new_empty(count, outs)
    tall = _block(count // experts, 128)
    sizes = {"ROWS": tall, "INS": _block(ins, 32 if tall > 64 or x.itemsize > 2 else 64), "OUTS": _block(outs, 128)}
    # No more tiles than these whatever the numbers of rows are; those that are left over end at once.
    grid = (triton.cdiv(count, tall) + experts, triton.cdiv(outs, sizes["OUTS"]))
    rows_kernel[grid](
        x, matrices, out, ends, experts, ins, outs, *x.stride(), *matrices.stride(), outs,
        EXPERTS=triton.next_power_of_2(experts), **sizes, num_warps=8 if tall > 64 else 4,
    )  # fmt: skip
    return out


def columns(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """left (in, rows) and right (rows, out), rows sorted by expert: (experts, in, out)."""
    ins, outs, experts = left.shape[0], right.shape[1], len(ends)
    out = right.new_empty(experts, ins, outs)
    sizes = {"ROWS": 32, "INS": _block(ins, 64), "OUTS": _block(outs, 128)}
    grid = (experts, triton.cdiv(ins, sizes["INS"]), triton.cdiv(outs, sizes["OUTS"]))
    columns_kernel[grid](left, right, out, ends, ins, outs, *left.stride(), *right.stride(), **sizes)
    return out

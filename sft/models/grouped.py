"""Products in groups: rows sorted by expert, each group with the matrix of its expert, or two such rows per expert.

torch has kernels for bfloat16 on Hopper and Blackwell alone. Elsewhere on a GPU its `grouped_mm` waits for the numbers
of rows and then calls a product for every expert: 22 waits a layer and micro-batch, seconds of a step of many layers on
an A100. There a kernel of ours reads the numbers on the device (`sft/models/grouped_kernels.py`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn.functional import grouped_mm

from sft.environment import triton_missing

Way = Literal["torch", "triton", "loop"]
# Generations of GPUs for which torch has kernels, in bfloat16.
_HOPPER_AND_BLACKWELL = (9, 10)
SENTENCES: dict[Way, str] = {
    "torch": "torch's kernel for products in groups",
    "triton": "a Triton kernel for products in groups",
    "loop": "one product for every expert and a wait in every layer, for want of a working Triton (see --check)",
}


def way_of(weight: torch.Tensor) -> Way:
    """How products with this stack of matrices are computed."""
    if not weight.is_cuda:
        return "torch"
    generation, _ = torch.cuda.get_device_capability(weight.device)
    if weight.dtype == torch.bfloat16 and generation in _HOPPER_AND_BLACKWELL:
        return "torch"
    return "loop" if triton_missing() else "triton"


def product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.grouped_mm` without a gradient and without waiting for the device.

    left (rows, in) and right (experts, in, out) give (rows, out); left (in, rows) and right (rows, out) give
    (experts, in, out). `ends`, int32: where the rows of each expert end.
    """
    if way_of(left) != "triton":
        return grouped_mm(left, right, offs=ends)
    from sft.models import grouped_kernels

    return (grouped_kernels.rows if right.ndim == 3 else grouped_kernels.columns)(left, right, ends)


class Frozen(torch.autograd.Function):
    """The product of rows (rows, in) with frozen matrices (experts, in, out); a gradient for the rows alone."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(matrices, ends)
        return product(rows, matrices, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        matrices, ends = ctx.saved_tensors
        return product(gradients[0].contiguous(), matrices.transpose(1, 2), ends), None, None

"""An adapted linear layer as one operation on a CPU: the adapter's product is added into the layer's own result.

PEFT's way makes the product of the factors, its scaled copy and the sum, each as large as the result, and as many again
in the backward pass; autograd keeps them apart. Parameters, names, saving and merging stay PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from sft.distributed.launch import launched

_TAKEN = (torch.float32, torch.bfloat16)


class FusedLinear(Linear):
    """PEFT's adapted linear layer; `fuse_adapters` makes layers into this class."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PEFT's result; by PEFT itself where more is wanted than one plain adapter on the CPU."""
        factors = None if args or kwargs else _factors(self, x)
        if factors is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        down, up, scaling, dtype = factors
        bias = None if base.bias is None else base.bias.to(dtype)
        return _Adapted.apply(x.to(dtype), base.weight.to(dtype), bias, down.to(dtype), up.to(dtype), scaling)


def fuse_adapters(model: nn.Module) -> None:
    """Where there is no GPU and each process has all weights, plain adapters on plain linear layers."""
    if torch.cuda.is_available() or launched().splits_weights:
        return
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLinear


def _factors(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, torch.dtype] | None:
    """A, B, their scaling and the number format to compute in; None where PEFT's own path has to be taken."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or x.device.type != "cpu":
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    base, down, up = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad) or up.bias is not None:
        return None
    mixed = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if mixed else x.dtype
    alike = mixed or {base.weight.dtype, down.weight.dtype, up.weight.dtype} == {dtype}
    return (down.weight, up.weight, layer.scaling[name], dtype) if alike and dtype in _TAKEN else None


class _Adapted(torch.autograd.Function):
    """x W' + bias + scaling x A' B', W frozen."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, down: Any, up: Any, scaling: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast("cpu", enabled=False):
            result = nn.functional.linear(flat, weight, bias)
            small = flat @ down.t()
            result.addmm_(small, up.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, down, up, small)
        ctx.scaling = scaling
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, down, up, small = ctx.saved_tensors
        of_x, of_down, of_up = None, None, None
        with torch.autocast("cpu", enabled=False):
            mine = gradient.reshape(-1, gradient.shape[-1])
            of_small = (mine @ up).mul_(ctx.scaling)
            if ctx.needs_input_grad[3]:
                of_down = of_small.t() @ flat
            if ctx.needs_input_grad[4]:
                # This way round it takes a fifth of the time.
                of_up = (small.t() @ mine).mul_(ctx.scaling).t()
            if ctx.needs_input_grad[0]:
                of_x = (mine @ weight).addmm_(of_small, down).view(*gradient.shape[:-1], -1)
        return of_x, None, None, of_down, of_up, None

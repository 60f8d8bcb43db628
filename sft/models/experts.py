"""Adapters on fused experts, applied to the routed tokens instead of folded into the weights of all experts.

PEFT makes W + scaling * B A for every expert of a layer in every forward pass, and the gradient of all of it in every
backward pass: twice the experts' memory per layer, and in bfloat16 the sum is rounded to W's eight bits. Here a token
goes through W and through A and B of the experts it was sent to. Parameters, names, saving and merging stay PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from sft.distributed.launch import launched
from sft.models.grouped import SENTENCES, Frozen, product, way_of

# Rows of matrices that are multiplied in groups begin at multiples of this many bytes.
_ALIGNMENT = 16
# The first generation of GPUs (Ampere) that multiplies in groups.
_GROUPED_SINCE = (8, 0)
_WRAPPED = {"gate_up_proj", "down_proj"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class RoutedAdapter(ParamWrapper):
    """The outermost PEFT wrapper of an experts module; `route_experts` makes wrappers into this class."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PEFT's result for hidden states (tokens, hidden), expert numbers and weights (tokens, chosen experts)."""
        factors = None if self.disable_adapters or self.merged or kwargs else _active_factors(self)
        if factors is None:
            return super().forward(x, *args, **kwargs)
        return experts_forward(self.get_base_layer(), factors, x, *args)


Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]


def route_experts(model: nn.Module) -> list[str]:
    """Takes adapters on fused experts off PEFT's path; why not, once per reason, where they stay on it."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}
    reasons: dict[str, None] = {}
    for wrapper in wrappers:
        if id(wrapper) in inner:
            continue
        reason = _unknown(wrapper)
        if reason:
            reasons[reason] = None
        else:
            wrapper.__class__ = RoutedAdapter
    return list(reasons)


def products(model: nn.Module) -> str:
    """How routed experts with adapters are multiplied, as a sentence; "" where there are none."""
    found: list[Any] = [each.get_base_layer() for each in model.modules() if isinstance(each, RoutedAdapter)]
    ways = {way_of(each.down_proj) for each in found}
    return "; ".join(f"Experts with adapters: {SENTENCES[way]}" for way in sorted(ways))


def _unknown(wrapper: ParamWrapper) -> str:
    """What about an experts module is not known here; "" where everything is."""
    experts = wrapper.get_base_layer()
    kind = type(experts).__name__
    if launched().sharding == "zero3":
        return f"{kind} under ZeRO-3, which gathers weights module by module"
    layout = {"has_gate": True, "has_bias": False, "is_transposed": False}
    # transformers 5.17 knows no norms behind experts, and has no word for them.
    if any(getattr(experts, name, None) is not value for name, value in layout.items()) or getattr(
        experts, "has_post_expert_norm", False
    ):
        return f"{kind} keeps its weights in another layout"
    found = (getattr(experts, name, None) for name in sorted(_WRAPPED))
    weights = [weight for weight in found if isinstance(weight, nn.Parameter) and weight.dtype in _FLOATS]
    if [weight.ndim for weight in weights] != [3, 3]:
        return f"{kind} keeps its weights in another form"
    if any(weight.requires_grad for weight in weights):
        return f"{kind} is trained as well"
    if weights[0].is_cuda and torch.cuda.get_device_capability(weights[0].device) < _GROUPED_SINCE:
        return f"{kind} on a GPU without products in groups"
    if getattr(experts, "_is_expert_parallel", False):
        return f"{kind} is shared out among processes"
    if {each.parameter_name for each in _chain(wrapper)} - _WRAPPED:
        return f"{kind} has an adapter on something else"
    return ""


def _chain(wrapper: nn.Module) -> list[ParamWrapper]:
    """The wrappers around one module, the outermost first."""
    found = []
    while isinstance(wrapper, ParamWrapper):
        found.append(wrapper)
        wrapper = wrapper.base_layer
    return found


def _active_factors(wrapper: ParamWrapper) -> Factors | None:
    """{parameter: (A^T as (experts, in, rank), B^T as (experts, rank, out), scaling)} in the type of the weights.

    None where a wrapper has another number of active adapters than one.
    """
    factors = {}
    for each in _chain(wrapper):
        active = [name for name in each.active_adapters if name in each.lora_A]
        if len(active) != 1:
            return None
        b, a, scaling = each.get_delta_factors(active[0])
        if width := -a.shape[1] % (_ALIGNMENT // a.element_size()):
            a, b = nn.functional.pad(a, (0, 0, 0, width)), nn.functional.pad(b, (0, width))
        # B lies with the experts innermost, which grouped products do not take.
        factors[each.parameter_name] = (a.transpose(1, 2), b.transpose(1, 2).contiguous(), scaling)
    return factors


def experts_forward(
    experts: Any, factors: Factors, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum over each token's experts of weight * expert(token), shape (tokens, hidden), as transformers' grouped_mm."""
    tokens, together = chosen.shape
    sorted_experts, order = torch.sort(chosen.reshape(-1))
    counts = torch.histc(_countable(sorted_experts), bins=experts.num_experts, min=0, max=experts.num_experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    wide = _adapted(hidden, experts.gate_up_proj, factors.get("gate_up_proj"), ends=ends, order=order)
    narrow = _adapted(experts._apply_gate(wide), experts.down_proj, factors.get("down_proj"), ends=ends)
    weighted = narrow * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[_back(order)].view(tokens, together, -1).sum(dim=1).to(hidden.dtype)


def _countable(numbers: torch.Tensor) -> torch.Tensor:
    """torch.histc counts floating point numbers on the CPU and, deterministically, integers alone on a GPU."""
    return numbers.int() if numbers.device.type == "cuda" else numbers.float()


def _back(order: torch.Tensor) -> torch.Tensor:
    """Where each place of the unsorted sequence has gone."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back


def _adapted(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor, float] | None,
    *,
    ends: torch.Tensor,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows sorted by expert through their experts' W and low-rank part: (rows, out). `order` makes rows of tokens."""
    if factors is None:
        return Frozen.apply(_rows(tokens, order, weight), weight.transpose(1, 2), ends)
    return _Adapted.apply(tokens, weight, *factors, order, ends)


def _rows(tokens: torch.Tensor, order: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """The tokens as their experts see them, sorted: each as often as it has experts. Autocast leaves types to us."""
    rows = tokens if order is None else tokens[order // (len(order) // len(tokens))]
    return rows.to(weight.dtype)


class _Adapted(torch.autograd.Function):
    """x W^T + scaling * (x A^T) B^T for rows grouped by expert, W frozen. Keeps tokens, not the rows made of them."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Any, weight: Any, a: Any, b: Any, scaling: float, order: Any, ends: torch.Tensor
    ) -> torch.Tensor:
        rows = _rows(tokens, order, weight)
        low = product(rows, a, ends) * scaling
        ctx.scaling = scaling
        ctx.save_for_backward(tokens, weight, a, b, low, order, ends)
        return product(rows, weight.transpose(1, 2), ends).add_(product(low, b, ends))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        tokens, weight, a, b, low, order, ends = ctx.saved_tensors
        towards = gradients[0].contiguous()
        towards_low = product(towards, b.transpose(1, 2), ends) * ctx.scaling
        towards_a = product(_rows(tokens, order, weight).T, towards_low, ends)
        towards_b = product(low.T, towards, ends)
        back = None
        if ctx.needs_input_grad[0]:
            back = product(towards, weight, ends).add_(product(towards_low, a.transpose(1, 2), ends))
            if order is not None:
                back = back[_back(order)].view(len(tokens), -1, back.shape[1]).sum(dim=1)
            back = back.to(tokens.dtype)
        return back, None, towards_a, towards_b, None, None, None

"""The last decoder layer only at positions whose logits are wanted: of the others its keys and values alone are read.

Query, output projection and feed-forward part take every position by itself. They are given the wanted ones, and zeros
stand for the rest, which nothing reads any more. What is left out is (share of tokens not trained) x (one layer).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from sft.distributed.launch import launched
from sft.models.fused import fuse_adapters
from sft.models.isolation import probing, tolerance

# In a layer, and in its attention, what transformers calls the parts that take positions one by one.
_PARTS, _ATTENTION, _PARTS_OF_ATTENTION = ("mlp",), ("self_attn", "attn"), ("q_proj", "o_proj")
# Picking positions and putting them back costs more than is left out where nearly all are wanted.
_WORTH = 0.9
_PROBE, _WANTED = 12, (4, 9)


class LastLayer:
    """Such parts of a model's last layer; none where the model has others, or where leaving out changes its logits.

    A model with mixed experts keeps its feed-forward part: what balances them counts all tokens.
    """

    def __init__(self, model: Any, *, checkpointing: bool = False) -> None:
        left_alone = checkpointing or torch.cuda.is_available() or launched().splits_weights
        # Asking one without gradients makes bitsandbytes repack its weights for answering.
        left_alone = left_alone or getattr(model, "is_quantized", False)
        self.parts = [] if left_alone else _parts(model)
        if self.parts and not self._holds(model):
            self.parts = []

    def _holds(self, model: Any) -> bool:
        """Whether the wanted logits are the same to rounding: the model is asked, not believed."""
        words, wanted = model.config.get_text_config().vocab_size, list(_WANTED)
        ids = (torch.arange(words // 3, words // 3 + _PROBE) % words)[None].to(model.device)
        with probing(model), torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits[0, wanted].float()
            with self.at(torch.tensor(wanted, device=ids.device), _PROBE):
                found = model(input_ids=ids, use_cache=False).logits[0, wanted].float()
        return bool((found - whole).abs().max() <= tolerance(model.dtype) * whole.abs().max())

    @contextmanager
    def at(self, positions: torch.Tensor, tokens: int) -> Iterator[None]:
        """A forward pass of one sequence of so many tokens, of which only these positions are wanted, rising."""
        parts = self.parts if 0 < len(positions) < _WORTH * tokens else []

        def pick(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return arguments[0].index_select(1, positions), *arguments[1:]

        def put(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            whole = output.new_zeros(output.shape[0], tokens, *output.shape[2:])
            return whole.index_copy(1, positions, output)

        hooks = [part.register_forward_pre_hook(pick) for part in parts]
        hooks += [part.register_forward_hook(put) for part in parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def lighter_on_a_cpu(model: Any, *, checkpointing: bool) -> LastLayer:
    """Adapters of `model` fused, where it may be one of PEFT's, and what can be left out of its last layer."""
    fuse_adapters(model)
    return LastLayer(model.get_base_model() if isinstance(model, PeftModel) else model, checkpointing=checkpointing)


def _parts(model: Any) -> list[nn.Module]:
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    attention = next((part for name in _ATTENTION if (part := getattr(layers[-1], name, None)) is not None), None)
    found = [getattr(layers[-1], name, None) for name in _PARTS]
    found += [getattr(attention, name, None) for name in _PARTS_OF_ATTENTION]
    return [part for part in found if isinstance(part, nn.Module) and not _mixes_experts(part)]


def _mixes_experts(part: nn.Module) -> bool:
    return any("expert" in name or "router" in name for name, _ in part.named_modules())

"""A small model of the same architecture, for what depends on the kinds of layers alone and not on their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import set_zero3_state

from sft.models.model import compute_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from sft.settings import Settings

# What can be smaller than it is without changing how layers work.
_LARGEST = {
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "intermediate_size": 128, "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128, "shared_intermediate_size": 128, "block_ff_dim": 128, "ffn_dim": 128,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 1,
    "topk_group": 1, "mamba_chunk_size": 16, "chunk_size": 16, "n_mamba_heads": 2,
}  # fmt: skip
# Sizes that other sizes may depend on.
_WIDTH, _HEADS = 256, 4
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Weights of a stand-in at most: 2 GB in float32, filled within seconds.
_WEIGHTS = 5e8
# A list of more different values than this numbers the layers, it does not name their kinds.
_KINDS = 8


def shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy with that many layers; lists with one entry per layer are cut as well."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    all_layers = text.num_hidden_layers
    if all_layers != layers:
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == all_layers:
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    return short


def every_kind(config: PretrainedConfig) -> int:
    """The fewest first layers, at least two, among which each kind of layer is found."""
    text = config.get_text_config()
    layers, needed = text.num_hidden_layers, 2
    for value in vars(text).values():
        if isinstance(value, list) and len(value) == layers:
            kinds = [str(kind) for kind in value]
            if len(set(kinds)) <= _KINDS:
                needed = max(needed, max(kinds.index(kind) for kind in set(kinds)) + 1)
    dense = getattr(text, "first_k_dense_replace", None) or 0
    return min(layers, max(needed, dense + 1))


def stand_ins(config: PretrainedConfig, settings: Settings, *, device: str) -> Iterator[PreTrainedModel]:
    """Random models with every kind of layer of `config`: narrow in all directions, then, for architectures whose sizes
    depend on each other otherwise, as wide as it is. None that would be too large or that can't be built this way."""
    for narrow in (True, False):
        small = shortened(config, every_kind(config))
        text: Any = small.get_text_config()
        _shrink(text, _LARGEST)
        if narrow and (heads := getattr(text, "num_attention_heads", None)):
            grouped = getattr(text, "num_key_value_heads", None) or heads
            _shrink(text, {"num_key_value_heads": max(1, _HEADS * grouped // heads), "num_attention_heads": _HEADS})
            _shrink(text, {"hidden_size": _WIDTH})
        for holder, name in product((small, text), _TOKENS):
            setattr(holder, name, None)
        vars(small).pop("quantization_config", None)
        model = _built(small, settings, device)
        if model is not None:
            yield model


def _shrink(text: Any, largest: dict[str, int]) -> None:
    for name, size in largest.items():
        if isinstance(value := getattr(text, name, None), int) and value > size:
            setattr(text, name, size)


def _built(config: PretrainedConfig, settings: Settings, device: str) -> PreTrainedModel | None:
    keywords: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.attn != "auto":
        keywords["attn_implementation"] = settings.attn
    try:
        with torch.device("meta"), set_zero3_state():
            blank = AutoModelForCausalLM.from_config(copy.deepcopy(config), **keywords)
        if sum(parameter.numel() for parameter in blank.parameters()) > _WEIGHTS:
            return None
        with torch.random.fork_rng(), set_zero3_state():
            torch.manual_seed(0)
            # In float32 on a CPU: what is asked is whether rows mix, and numbers that round less say it more clearly.
            dtype = compute_dtype(settings) if device == "cuda" else torch.float32
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **keywords).to(device)
    except (ValueError, RuntimeError, TypeError, AttributeError, ImportError):
        return None

"""The shapes that are benchmarked and the operations a training step of them takes, from the configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft.errors import Problems
from sft.settings.rules import NO_FOLDER, is_missing_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "benchmark_models.json"


def model_config(name: str) -> PretrainedConfig:
    """The shape of a model: one of configs/benchmark_models.json, else of a folder or the hub. No weights are read.

    Raises:
        Problems: there is no such shape.
    """
    shapes = json.loads(SHAPES.read_text(encoding="utf-8"))
    if name in shapes:
        return AutoConfig.for_model(**shapes[name])
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = NO_FOLDER if is_missing_folder(name) else str(error).splitlines()[0]
        raise Problems(
            [f"MODEL {name}: no such model shape ({reason}); known without the hub: {', '.join(shapes)}"]
        ) from error


def matmul_parameters(config: PretrainedConfig) -> tuple[int, int]:
    """(all parameters, those a token is multiplied with): without input embeddings, a router's share of the experts."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    active = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or (parameter is model.get_input_embeddings().weight and not config.tie_word_embeddings):
            continue
        active += parameter.numel() * (share if ".experts." in name else 1)
    return sum(parameter.numel() for parameter in model.parameters()), round(active)


def flops_per_token(config: PretrainedConfig, active: int, adapter: int, *, seq_len: int, full: bool) -> float:
    """Floating point operations of one training step per token, without recomputed activations.

    Two per weight forward and two for the gradient of its input; two more for the gradient of a trained weight.
    Attention over half the row on average (causal): 2 x heads x head size x row per layer forward, twice that backward.
    """
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 3 * 2 * config.num_hidden_layers * width * seq_len
    return (6 if full else 4) * active + (0 if full else 6 * adapter) + attention

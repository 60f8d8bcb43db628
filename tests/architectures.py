"""Tiny random models of every kind of layer that rows are joined for, all with the same vocabulary of 64."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft.models.isolation import Isolation
from sft.models.last_layer import LastLayer
from sft.training.trainer import StagedTrainer

_COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16,
    },
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
}  # fmt: skip


def tiny_config(kind: str, **values: Any) -> Any:
    return AutoConfig.for_model(kind, **(_COMMON | CONFIGS[kind] | values))


def tiny_model(kind: str, *, seed: int = 1, **values: Any) -> Any:
    """A random model of that kind, in float32 and evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **values)).eval()


def token_losses(model: Any, batch: dict[str, Any], isolation: Isolation) -> torch.Tensor:
    """The trainer's loss of each trained token of a joined micro-batch."""
    trainer: Any = SimpleNamespace(keeps_logits=True, isolation=isolation, last_layer=LastLayer(model))
    trainer.pass_losses = partial(StagedTrainer.pass_losses, trainer)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "row_lengths", "row_ends")}
    return StagedTrainer.token_losses(trainer, model, inputs, batch["labels"])

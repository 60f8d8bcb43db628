"""How many answers are made at once: what their keys and values take, and what a GPU has free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft.distributed import ranks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Kinds of layers whose cache does not grow: they keep a state of fixed size, small beside that of attention.
_WITHOUT_CACHE = ("linear_attention", "mamba", "conv")
USUAL = 8
# Of what is free: the rest is for logits, for kernels, and for what the allocator can't join.
_SHARE = 0.7
# Reading a prompt holds hidden states and two halves of a gated layer at once, and what comes out.
_STATES = 4


@dataclass(frozen=True)
class AnswerBatch:
    """A batch of answers at its largest: how many, and the tokens of prompt and answer in each."""

    rows: int
    tokens: int


def cache_bytes(config: PretrainedConfig, answers: AnswerBatch, dtype: torch.dtype) -> int:
    """Keys and values of all layers: rows x tokens x heads x size x 2; layers with a window keep no more than that."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or answers.tokens
    kept = {"full_attention": answers.tokens} | dict.fromkeys(_WITHOUT_CACHE, 0)
    tokens = sum(kept.get(kind, min(window, answers.tokens)) for kind in kinds)
    return 2 * answers.rows * tokens * heads * size * dtype.itemsize


def reading_bytes(config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """What a prompt of so many tokens takes for a moment while one layer reads it."""
    text = config.get_text_config()
    widest = max(text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    return _STATES * tokens * widest * dtype.itemsize


def answers_at_once(model: Any, *, longest: int, new: int, count: int, processes: int = 1) -> int:
    """SFT_GEN_BATCH_SIZE=auto: as many of `count` answers as fit into what the GPU has free, each with a prompt as
    long as the longest; 8 on a CPU. `processes` that answer together all ask and take the smallest of their numbers.
    """
    if model.device.type != "cuda":
        return USUAL
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    one = cache_bytes(model.config, AnswerBatch(1, longest + new), model.dtype)
    one += reading_bytes(model.config, longest, model.dtype)
    fitting = max(1, min(count, int(_SHARE * free) // one))
    return -ranks.largest(-fitting, model.device) if processes > 1 else fitting

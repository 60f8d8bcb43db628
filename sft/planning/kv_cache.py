"""Memory of the generation evaluation: the keys and values that a batch of answers keeps while it grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sft.data.masked_loss.edge_mask import MASKED

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PretrainedConfig

    from sft.settings import Settings

# So many of the longest validation rows are searched for the longest prompt.
_SEARCHED = 1000
# Kinds of layers whose cache does not grow: they keep a state of fixed size, small beside that of attention.
_WITHOUT_CACHE = ("linear_attention", "mamba", "conv")


@dataclass(frozen=True)
class AnswerBatch:
    """A batch of answers at its largest: how many, and the tokens of prompt and answer in each."""

    rows: int
    tokens: int


def largest_answers(val: datasets.Dataset, settings: Settings) -> AnswerBatch | None:
    """The batch with the longest prompt and answers as long as they may get; None without a generation evaluation.

    Prompts of SFT_GEN_EVAL_DATASET, which is not read here, are taken for as long as SFT_MAX_SEQ_LEN.
    """
    if settings.gen_eval == "none" or not (settings.gen_eval_sources or len(val)):
        return None
    prompt = settings.max_seq_len if settings.gen_eval_sources else longest_prompt(val, settings)
    rows = min(settings.gen_batch_size, settings.gen_eval_samples)
    return AnswerBatch(rows, prompt + settings.gen_max_new_tokens)


def longest_prompt(val: datasets.Dataset, settings: Settings) -> int:
    """Tokens before the last answer; the whole row where prompts are trained as well and can't be told apart."""
    lengths = np.asarray(val["length"])
    if settings.train_on_prompt:
        return int(lengths.max())
    chosen = val.select(np.argsort(-lengths, kind="stable")[:_SEARCHED])
    return max(_last_answer(np.asarray(labels)) for labels in chosen["labels"])


def _last_answer(labels: np.ndarray) -> int:
    """Where the last unbroken run of trained tokens begins."""
    trained = np.flatnonzero(labels != MASKED)
    if not len(trained):
        return len(labels)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    return int(trained[breaks[-1] + 1] if len(breaks) else trained[0])


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

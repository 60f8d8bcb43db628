"""The batch of answers of the generation evaluation whose keys and values are largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sft.data.masked_loss.edge_mask import MASKED
from sft.evaluation.at_once import USUAL, AnswerBatch

if TYPE_CHECKING:
    import datasets

    from sft.settings import Settings

# So many of the longest validation rows are searched for the longest prompt.
_SEARCHED = 1000


def largest_answers(val: datasets.Dataset, settings: Settings) -> AnswerBatch | None:
    """The batch with the longest prompt and answers as long as they may get; None without a generation evaluation.

    Prompts of SFT_GEN_EVAL_DATASET, which is not read here, are taken for as long as SFT_MAX_SEQ_LEN.
    """
    if settings.gen_eval == "none" or not (settings.gen_eval_sources or len(val)):
        return None
    prompt = settings.max_seq_len if settings.gen_eval_sources else longest_prompt(val, settings)
    # auto takes what is free, and fewer where that is little.
    rows = min(settings.gen_batch_size or USUAL, settings.gen_eval_samples)
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

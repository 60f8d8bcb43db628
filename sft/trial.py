"""One step on the real GPU: the largest micro-batch forward and backward, with its time and peak memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from sft.data.mixture import Mix
    from sft.settings import Settings


class Trial(NamedTuple):
    """What was measured: seconds of a micro-batch of `tokens`, and bytes at the peak."""

    seconds: float
    tokens: int
    peak: int


def trial(base: str, settings: Settings, mix: Mix, *, checkpointing: bool) -> Trial | None:
    """Loads the model and trains the largest micro-batch without keeping anything; None without a GPU.

    The second of two passes is timed: the first one also sets up kernels and memory.
    """
    if not torch.cuda.is_available():
        return None
    from trl.trainer.utils import add_fused_lm_head

    from sft.activations import with_adapter
    from sft.batches import TrainingRows, join
    from sft.memory import largest_items, packs_of
    from sft.model import compute_dtype, load_model

    rows = largest_items(np.asarray(mix.train["length"]), settings, packs=packs_of(mix.train, settings))
    batch = join([[TrainingRows(mix.train).row(0, row) for row in rows]])
    inputs = {name: batch[name].cuda() for name in ("input_ids", "position_ids", "labels")}
    bare = load_model(base, settings)
    add_fused_lm_head(bare)
    model = with_adapter(bare, settings).cuda().train()
    if checkpointing:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        bare.enable_input_require_grads()
    torch.cuda.reset_peak_memory_stats()
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast("cuda", compute_dtype(settings), enabled=compute_dtype(settings) != torch.float32):
            loss = model(**inputs, fused_lm_head=True).loss
        loss.backward()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return Trial(seconds, inputs["input_ids"].numel(), torch.cuda.max_memory_allocated())

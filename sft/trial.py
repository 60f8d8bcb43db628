"""One step on the real GPU: the largest micro-batch forward and backward, with its time and peak memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sft.activations import with_adapter
from sft.batches import TrainingRows, join
from sft.memory import largest_items, packs_of
from sft.model import compute_dtype, load_model

if TYPE_CHECKING:
    from sft.data.mixture import Mix
    from sft.settings import Settings


class Trial(NamedTuple):
    """What was measured: seconds of a micro-batch of `tokens`, bytes at the peak, whether it could be done at all."""

    seconds: float
    tokens: int
    peak: int
    fits: bool = True


def trial(base: str, settings: Settings, mix: Mix, *, checkpointing: bool) -> Trial | None:
    """Loads the model and trains the largest micro-batch without keeping anything; None without a GPU.

    The second of two passes is timed: the first one also sets up kernels and memory.
    """
    if not torch.cuda.is_available():
        return None
    rows = largest_items(np.asarray(mix.train["length"]), settings, packs=packs_of(mix.train, settings))
    batch = join([[TrainingRows(mix.train).row(0, row) for row in rows]])
    inputs = {name: batch[name].cuda() for name in ("input_ids", "position_ids", "labels")}
    torch.cuda.reset_peak_memory_stats()
    seconds, fits = 0.0, True
    try:
        model = trained_model(base, settings, checkpointing=checkpointing)
        for _ in range(2):
            seconds = timed_pass(model, inputs, compute_dtype(settings))
    except torch.OutOfMemoryError:
        fits = False
    return Trial(seconds, inputs["input_ids"].numel(), torch.cuda.max_memory_allocated(), fits)


def trained_model(base: str, settings: Settings, *, checkpointing: bool) -> torch.nn.Module:
    """The model as the trainer has it: with TRL's fused head and the stage's adapter, on the GPU."""
    from trl.trainer.utils import add_fused_lm_head

    bare = load_model(base, settings)
    add_fused_lm_head(bare)
    model = with_adapter(bare, settings)
    if not settings.load_in_4bit and not settings.load_in_8bit:
        model.cuda()  # a quantised model was placed while it was loaded
    if checkpointing:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        bare.enable_input_require_grads()
    return model.train()


def timed_pass(model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = model(**inputs, fused_lm_head=True).loss
    loss.backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start

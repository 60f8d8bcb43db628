"""One step on the real device: the largest micro-batch forward and backward, with its time and, on a GPU, its peak."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.utils.logging import disable_progress_bar

from sft.data.masked_loss.edge_mask import MASKED
from sft.distributed.launch import launched
from sft.models.isolation import Isolation, keep_rows_apart
from sft.models.model import casts_left_to_autocast, compute_dtype, load_model, lora_layers, weight_dtype
from sft.planning.activations import with_adapter
from sft.planning.document import Steps
from sft.training.batches import TrainingRows, join_rows
from sft.training.loss import leave_out_triton, token_cross_entropy
from sft.training.passes import largest_pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.data.mixture import Mix
    from sft.planning.memory import Estimate
    from sft.planning.need import Need
    from sft.settings import Settings

# Multiplications and additions a CPU is asked for at most: a few seconds at 20 to 50 billion a second.
_CPU_LIMIT = 1e11
# Per weight and token: forward and twice that backward, in two passes.
_PER_WEIGHT = 12


class StepTime(NamedTuple):
    """What was measured: seconds of a micro-batch of `tokens`, bytes at a GPU's peak, whether it could be done at all;
    or, in `reason`, why nothing was."""

    seconds: float = 0.0
    tokens: int = 0
    peak: int = 0
    fits: bool = True
    rows: int = 0
    device: str = ""
    reason: str = ""
    isolation: Isolation | None = None


def measure_step(base: str, settings: Settings, mix: Mix, *, need: Need) -> StepTime:
    """Loads the model and trains the largest pass without keeping anything.

    The second of two passes is timed: the first one also sets up kernels and memory. On a CPU only where both take a
    few seconds.

    Raises:
        Problems: the model can't be loaded.
    """
    rows = largest_pass(mix.train, settings, need.tokens)
    batch = join_rows([[TrainingRows(mix.train).row(0, row) for row in rows]])
    tokens = batch["input_ids"].numel()
    if reason := why_unmeasured(settings, need.estimate, tokens):
        return StepTime(tokens=tokens, rows=len(rows), reason=reason)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "labels", "row_ends")}
    seconds, fits, isolation = 0.0, True, None
    try:
        model, isolation = trained_model(base, settings, device=device, checkpointing=need.checkpointing)
        passes = isolation.passes(inputs | {"row_lengths": batch["row_lengths"]})
        for _ in range(2):
            seconds = timed_passes(model, passes, compute_dtype(settings))
    except torch.OutOfMemoryError:
        fits = False
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return StepTime(seconds, tokens, peak, fits, rows=len(rows), device=device_name(), isolation=isolation)


def why_unmeasured(settings: Settings, estimate: Estimate, tokens: int) -> str:
    """Why no time can be claimed; "" where the step can be tried."""
    launch = launched()
    if launch.splits_weights:
        return f"under {launch.sharding} no device holds the whole model, so one alone can't try a step"
    if torch.cuda.is_available():
        return ""
    if settings.quantised:
        return "a step of a quantised model takes too long on this CPU to be tried"
    weights = (estimate.weights + estimate.adapter) / weight_dtype(settings).itemsize
    if _PER_WEIGHT * weights * tokens > _CPU_LIMIT:
        return f"{tokens:,} tokens through {weights / 1e6:,.0f} million weights take too long on this CPU to be tried"
    return ""


def device_name() -> str:
    """The GPU's name, or the CPU with the threads that work."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"this CPU with {threads} {'thread' if threads == 1 else 'threads'}"


def trained_model(
    base: str, settings: Settings, *, device: torch.device, checkpointing: bool
) -> tuple[torch.nn.Module, Isolation]:
    """The model as the trainer has it, with the stage's adapter, on a GPU with TRL's fused head; and how joined rows
    stay apart in it."""
    disable_progress_bar()
    bare = load_model(base, settings, device=device)
    isolation = keep_rows_apart(bare, settings)
    if device.type == "cuda":
        from trl.trainer.utils import add_fused_lm_head

        leave_out_triton()
        torch.cuda.reset_peak_memory_stats()
        add_fused_lm_head(bare)
    model = with_adapter(bare, settings)
    if not settings.quantised:
        model.to(device)  # a quantised model was placed while it was loaded
    if checkpointing:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        bare.enable_input_require_grads()
    return model.train(), isolation


def timed_passes(model: torch.nn.Module, passes: list[dict[str, Any]], dtype: torch.dtype) -> float:
    """Seconds of a micro-batch, forward and backward."""
    device = passes[0]["input_ids"].device.type
    mixed = dtype != torch.float32
    start = time.perf_counter()
    with casts_left_to_autocast(lora_layers(model) if mixed else ()):
        with torch.autocast(device, dtype, enabled=mixed):
            on_gpu = device == "cuda"
            losses = [model(**each, fused_lm_head=True).loss if on_gpu else cpu_loss(model, each) for each in passes]
        torch.stack(losses).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cpu_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Loss of the trained tokens; where the model can, only their positions go through the output head."""
    targets = (inputs["labels"][0] != MASKED).nonzero()[:, 0]
    bare: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {name: value for name, value in inputs.items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(type(bare).forward).parameters:
        logits = model(**names, use_cache=False, logits_to_keep=targets - 1).logits.squeeze(0)
    else:
        logits = model(**names, use_cache=False).logits[0, targets - 1]
    return token_cross_entropy(logits, inputs["labels"][0, targets]).mean()


@dataclass(frozen=True)
class Forecast:
    """Seconds in all and of a step, the speed and what it was measured on; or, in `reason`, why nothing is claimed."""

    seconds: float | None = None
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    measured_on: str = ""
    reason: str = ""
    peak: int = 0


def forecast(measured: StepTime, *, tokens: int, steps: Steps) -> Forecast:
    """Steps x seconds of a step with the mean number of tokens; `tokens`: of an epoch, all devices together."""
    if measured.reason or not measured.fits:
        return Forecast(reason=measured.reason or f"out of memory on {measured.device}", peak=measured.peak)
    assert steps.per_epoch is not None and steps.total is not None
    speed = measured.tokens / measured.seconds * launched().processes
    step = tokens / steps.per_epoch / speed
    batch = f"the largest micro-batch ({measured.rows} rows, {measured.tokens:,} tokens)"
    what = f"{measured.device}, forward and backward of {batch}"
    return Forecast(steps.total * step, step, speed, what, peak=measured.peak)

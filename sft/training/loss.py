"""Cross-entropy of each token from logits in few passes and little memory, where TRL's fused head does not run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from sft.environment import triton_missing
from sft.errors import RunFailed

_AT_ONCE = 1 << 20  # logits: 4 MiB in float32


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in float32 of each target: logits (tokens, words), targets and result (tokens,).

    As torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"), which keeps the logits in float32
    and their softmax, and makes two more tensors of that size for the gradient. Here `logits` become their own
    gradient: nothing may use them afterwards, and there is no second backward pass.
    """
    return _TokenCrossEntropy.apply(logits, targets)


def _parts(logits: torch.Tensor) -> Iterator[slice]:
    step = max(1, _AT_ONCE // logits.shape[1])
    return (slice(first, first + step) for first in range(0, len(logits), step))


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        norms = logits.new_empty(len(logits), dtype=torch.float32)
        chosen = torch.empty_like(norms)
        for rows in _parts(logits):
            part = logits[rows].float()
            norms[rows] = part.logsumexp(dim=1)
            chosen[rows] = part.gather(1, targets[rows, None])[:, 0]
        ctx.save_for_backward(logits, targets, norms)
        return norms - chosen

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        logits, targets, norms = ctx.saved_tensors
        for rows in _parts(logits):
            part = logits[rows].float()
            part.sub_(norms[rows, None]).exp_()
            part.scatter_add_(1, targets[rows, None], -torch.ones_like(norms[rows, None]))
            logits[rows] = part.mul_(grad[rows, None])
        return logits, None


ROWS_NAMED = 16  # a step may hold hundreds
OVERFLOWS_IN_A_ROW = 20  # each halves the scale: from 65,536 to below 1 are 17


def leave_out_triton() -> None:
    """TRL's fused head folds its tiles in torch where Triton could not build its kernels: it asks only for the package,
    and the first step would end the run."""
    from trl.kernels import chunked_logprob

    if triton_missing():
        chunked_logprob._TRITON_AVAILABLE = False


class LossScale:
    """Overflows under float16's loss scaler. They are how it finds its scale: it skips the step and halves it, and
    doubles it again after 2,000 good ones. Only a row of them means that something else is wrong."""

    def __init__(self) -> None:
        self.overflows = 0

    def may_skip(self, norm: torch.Tensor | float | None, scale: float) -> bool:
        """Whether a step with this gradient norm is the scaler's to skip, `scale` being what it works with."""
        if norm is None or math.isfinite(norm):
            self.overflows = 0
            return False
        self.overflows += 1
        return self.overflows < OVERFLOWS_IN_A_ROW and scale >= 1.0


def current_scale(accelerator: Any, model: Any) -> float | None:
    """What float16's loss is multiplied with, None in other formats: by torch's scaler, or by DeepSpeed's, which has
    left a step that overflowed out by the time the Trainer asks for its norm, and calls that infinite."""
    if accelerator.scaler is not None:
        return accelerator.scaler.get_scale()
    optimizer = getattr(model, "optimizer", None) if accelerator.mixed_precision == "fp16" else None
    return None if optimizer is None else float(optimizer.loss_scale)


def finite_norm(norm: torch.Tensor | float | None, *, step: int, rows: Iterable[object]) -> float | None:
    """The gradient norm of a step as a number. `rows` is looked at only when it is none.

    Raises:
        RunFailed: it is infinite or not a number; names the step and its rows.
    """
    number = norm.item() if isinstance(norm, torch.Tensor) else norm
    if number is None or math.isfinite(number):
        return number
    named = ", ".join(str(row) for row in islice(rows, ROWS_NAMED))
    raise RunFailed(
        f"Loss or gradient is not finite at step {step} (gradient norm {number}). Nothing was updated and no "
        f"checkpoint of it was written. Training rows of this step: {named}. Try a lower SFT_LR, "
        "SFT_MAX_GRAD_NORM=1.0, or SFT_DTYPE=bfloat16 instead of float16; look at the rows."
    )


def require_finite_evaluation(loss: float, step: int) -> None:
    """Raises RunFailed where the loss on the validation rows is infinite or not a number."""
    if not math.isfinite(loss):
        raise RunFailed(
            f"The loss on the validation rows is {loss} at step {step}: the model is broken, and no later stage should "
            "build on it. Checkpoints before it are kept. Try SFT_DTYPE=bfloat16 or float32, or a lower SFT_LR with "
            "--fresh."
        )


def require_finite(model: torch.nn.Module, step: int) -> None:
    """Before anything is saved.

    Raises:
        RunFailed: the last optimizer step left a trained weight that is infinite or not a number.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter.detach()).all():
            raise RunFailed(
                f"{name} is not finite after step {step}, so it was not saved; checkpoints before it are good. A rate "
                "that is far too high does this: start again with a lower SFT_LR and --fresh."
            )


def source_losses(sums: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """`eval_loss` and `eval_loss/<source>` from the summed losses and trained tokens of each source, (sources, 2).

    A source without validation rows has none; one alone has the overall one.
    """
    total = sums.sum(dim=0)
    found = {"eval_loss": (total[0] / total[1].clamp(min=1)).item()}
    there = [(name, loss / count) for name, (loss, count) in zip(names, sums.tolist(), strict=False) if count]
    return found | ({f"eval_loss/{name}": loss for name, loss in there} if len(there) > 1 else {})

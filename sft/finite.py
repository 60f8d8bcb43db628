"""Nothing infinite and no NaN goes into an optimizer step or onto the disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sft.errors import RunFailed

if TYPE_CHECKING:
    from sft.trainer import StagedTrainer

ROWS_NAMED = 16


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


def named_rows(trainer: StagedTrainer) -> Iterator[str]:
    """The rows of the step so that a person finds them: position, source and how the trained text begins."""
    for position in trainer.step_rows:
        row = trainer.train_dataset.rows[position]
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        text = trainer.processing_class.decode(trained[:24], skip_special_tokens=True)
        source = Path(trainer.settings.sources[row["source"]].id).name
        yield f"{position} from {source} ({text[:60]!r})"


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

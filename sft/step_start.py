"""A step that a stop signal finds far from its end is given up, and the run saved as it was before it."""

from __future__ import annotations

from dataclasses import dataclass
from random import getstate, setstate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from sft.trainer import StagedTrainer

# Stops promise to take a minute at most; a step of many micro-batches may take longer.
PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class StepStart:
    """What the micro-batches of a step change before its optimizer step: random states, loss and tokens counted."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None
    loss: torch.Tensor
    tokens: int

    @classmethod
    def of(cls, trainer: StagedTrainer, tokens: int) -> StepStart:
        """`tokens`: those counted before the step's own."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        loss = trainer._tr_loss.detach().clone()
        return cls(getstate(), np.random.get_state(), torch.get_rng_state(), cuda, loss, tokens)

    def restore(self, trainer: StagedTrainer) -> None:
        """Back to before the step; its gradients, which nobody saves, stay behind."""
        setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        trainer._tr_loss.copy_(self.loss)
        trainer.tokens_seen = self.tokens

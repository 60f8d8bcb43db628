"""What happens around the steps of a run: stop signals, early stopping, best so far, metrics file, readable lines."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from random import getstate, setstate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from sft.distributed.signals import STOP, Stopped
from sft.scoring.metrics import metric_direction
from sft.stages import paths
from sft.stages.checkpoints import metrics_mark
from sft.storage import json_files

if TYPE_CHECKING:
    from sft.training.trainer import StagedTrainer


if TYPE_CHECKING:
    from sft.training.trainer import StagedTrainer


def stop_agreed(trainer: StagedTrainer) -> bool:
    """Whether any rank was told to stop; all ranks learn it at the same point."""
    told = STOP.number is not None
    if trainer.args.world_size == 1:
        return told
    votes = trainer.accelerator.reduce(torch.tensor([float(told)], device=trainer.args.device), "sum")
    if votes.item() > 0:
        STOP.agree()
    return votes.item() > 0


class StageRhythm(TrainerCallback):
    """Best so far, early stopping and stop signals; what it knows travels in the checkpoint, so that a resumed run
    goes on counting where the killed one was."""

    def __init__(self, trainer: StagedTrainer) -> None:
        self.trainer = trainer
        self.metric = ""
        self.best: float | None = None
        self.best_step = 0
        self.without_improvement = 0
        self.stopped = False
        self.evaluation_due = False
        self.step_start: StepStart | None = None
        self.restored: dict[str, Any] = {}

    # Best model and early stopping

    def improved(self, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far by SFT_METRIC_FOR_BEST; counts those that are not."""
        name = self.trainer.settings.metric_for_best
        self.metric = name if name in metrics else f"eval_{name.removeprefix('eval_')}"
        if self.metric not in metrics:
            known = ", ".join(sorted(key for key in metrics if "/" not in key))
            raise KeyError(f"SFT_METRIC_FOR_BEST={name} is not among the metrics of this run: {known}")
        value = metrics[self.metric]
        greater = metric_direction(name)
        better = math.isfinite(value) and (self.best is None or (value > self.best if greater else value < self.best))
        self.without_improvement = 0 if better else self.without_improvement + 1
        if better:
            self.best, self.best_step = value, self.trainer.state.global_step
        self.stop_when_patience_ends()
        return better

    def stop_when_patience_ends(self) -> None:
        """Early stopping; also when a run resumes from the checkpoint at which an earlier one had stopped."""
        patience = self.trainer.settings.early_stopping_patience
        if 0 < patience <= self.without_improvement:
            if self.trainer.args.should_save:
                best = f"best {self.best:.4f} at step {self.best_step}" if self.best is not None else "no best"
                print(f"Stopping early: {self.metric} has not improved for {patience} evaluations ({best}).")
            self.trainer.control.should_training_stop = True

    # Stopping

    def raise_if_stopped(self) -> None:
        """Between the batches of an evaluation: a stop signal ends it; it is made up for after the resume."""
        if stop_agreed(self.trainer):
            self.stopped = self.evaluation_due = True
            raise Stopped(STOP.number or 15)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
        if stop_agreed(self.trainer) and state.global_step < state.max_steps:
            self.stopped, self.evaluation_due = True, control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal that came too late to cut the evaluation off: no further step is begun."""
        if stop_agreed(self.trainer) and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = state.global_step > 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal that came while a checkpoint was written: it is there already."""
        if stop_agreed(self.trainer) and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        self.step_start = StepStart.of(trainer, trainer.tokens_before_step) if args.world_size == 1 else None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives up a step that goes on long after a stop signal; of several ranks none can do that alone."""
        if self.step_start and STOP.number is not None and time.monotonic() - STOP.arrived > PATIENCE_SECONDS:
            self.step_start.restore(self.trainer)
            self.stopped = True
            raise Stopped(STOP.number)

    # What travels in a checkpoint

    def save(self, folder: Path) -> None:
        """Writes rhythm.json; every rank calls it, the main process writes."""
        trainer = self.trainer
        loss = trainer._tr_loss.detach().reshape(1).to(trainer.args.device)
        record = {
            "metric": self.metric,
            "best": self.best,
            "best_step": self.best_step,
            "without_improvement": self.without_improvement,
            "evaluation_due": self.evaluation_due,
            "loss_since_logged": trainer.accelerator.gather(loss).tolist(),
            "last_logged_step": trainer._globalstep_last_logged,
            "tokens_seen": trainer.tokens_seen,
        }
        if trainer.args.should_save:
            json_files.write_json(folder / paths.RHYTHM, record | metrics_mark(trainer.stage.folder / paths.METRICS))

    def restore(self, folder: Path) -> None:
        """Reads rhythm.json before training starts."""
        self.restored = json_files.read_json(folder / paths.RHYTHM)
        self.metric = self.restored["metric"]
        self.best, self.best_step = self.restored["best"], self.restored["best_step"]
        self.without_improvement = self.restored["without_improvement"]
        self.trainer.tokens_seen = self.restored["tokens_seen"]
        # Step 0 was evaluated by the run that made the checkpoint.
        self.trainer.args.eval_on_start = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if restored := self.restored:
            losses = restored["loss_since_logged"]
            same = len(losses) == args.world_size
            self.trainer._tr_loss.fill_(losses[args.process_index] if same else sum(losses) / len(losses))
            self.trainer._globalstep_last_logged = restored["last_logged_step"]
            if restored["evaluation_due"]:  # a signal cut it off
                metrics = self.trainer.evaluate()
                self.trainer._determine_best_metric(metrics, None)
                self.evaluation_due = False
            else:
                self.stop_when_patience_ends()


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

"""What decides around the steps of a run: the best evaluation so far, early stopping, stop signals."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft.distributed.ranks import stop_agreed
from sft.distributed.signals import STOP, Stopped
from sft.scoring.metrics import logged_name, metric_direction
from sft.stages import paths
from sft.storage import json_files

# Stops promise to take a minute at most; a step of many micro-batches may take longer.
PATIENCE_SECONDS = 20.0


class StageRhythm(TrainerCallback):
    """Best so far, early stopping and stop signals; what it knows travels in the checkpoint, so that a resumed run
    goes on counting where the killed one was.

    Args:
        metric: SFT_METRIC_FOR_BEST.
        patience: evaluations without improvement after which training stops; none where it is not positive.
        own_lower: as `metric_direction` takes it.
    """

    def __init__(self, metric: str, patience: int, own_lower: Collection[str] | None = None) -> None:
        self.metric, self.greater, self.patience = logged_name(metric), metric_direction(metric, own_lower), patience
        self.best: float | None = None
        self.best_step = 0
        self.improved = False  # by the last evaluation
        self.without_improvement = 0
        self.stopped = self.step_given_up = False
        self.evaluation_due = False  # a signal cut it off

    # Best model and early stopping

    def count(self, metrics: dict[str, float], step: int) -> None:
        """Takes an evaluation into account: whether it is the best so far, and how long there was none better."""
        value = metrics.get(self.metric, math.nan)  # whether it will be there was asked before the first step
        better = self.best is None or (value > self.best if self.greater else value < self.best)
        self.improved = math.isfinite(value) and better
        self.without_improvement = 0 if self.improved else self.without_improvement + 1
        if self.improved:
            self.best, self.best_step = value, step

    def stop_when_patience_ends(self, args: Any, control: Any) -> None:
        """Early stopping; also when a run resumes from the checkpoint at which an earlier one had stopped."""
        if 0 < self.patience <= self.without_improvement:
            if args.should_save:
                best = f"best {self.best:.4f} at step {self.best_step}" if self.best is not None else "no best"
                print(f"Stopping early: {self.metric} has not improved for {self.patience} evaluations ({best}).")
            control.should_training_stop = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.evaluation_due:
            self.stop_when_patience_ends(args, control)

    # Stopping

    def raise_if_stopped(self) -> None:
        """Between the batches of an evaluation: a stop signal ends it; it is made up for after the resume."""
        if stop_agreed():
            self.stopped = self.evaluation_due = True
            raise Stopped(STOP.number or 15)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
        if stop_agreed() and state.global_step < state.max_steps:
            self.stopped, self.evaluation_due = True, control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Counts it. After a signal that came too late to cut it off no further step is begun."""
        self.evaluation_due = False
        self.count(metrics, state.global_step)
        self.stop_when_patience_ends(args, control)
        if stop_agreed() and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = state.global_step > 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal that came while a checkpoint was written: it is there already."""
        if stop_agreed() and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives up a step that goes on long after a stop signal; of several ranks none can do that alone."""
        late = STOP.number is not None and time.monotonic() - STOP.arrived > PATIENCE_SECONDS
        if late and args.world_size == 1:
            self.stopped = self.step_given_up = True
            raise Stopped(STOP.number or 15)

    # What travels in a checkpoint

    def record(self) -> dict[str, Any]:
        """What a resumed run has to know; `restore` reads it."""
        return {
            "metric": self.metric,
            "best": self.best,
            "best_step": self.best_step,
            "without_improvement": self.without_improvement,
            "evaluation_due": self.evaluation_due,
        }

    def restore(self, checkpoint: Path) -> None:
        """Reads it back from a checkpoint, before training starts."""
        record = json_files.read_json(checkpoint / paths.RHYTHM)
        self.evaluation_due = record["evaluation_due"]
        if record["metric"] == self.metric:  # else the person has chosen another since, and counting begins anew
            self.best, self.best_step = record["best"], record["best_step"]
            self.without_improvement = record["without_improvement"]

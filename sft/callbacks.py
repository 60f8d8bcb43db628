"""What happens around the steps of a run: stop signals, early stopping, best so far, metrics file, readable lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from sft import files
from sft.checkpoints import RHYTHM, metrics_mark
from sft.settings import metric_direction
from sft.signals import STOP, Stopped
from sft.step_start import PATIENCE_SECONDS, StepStart

if TYPE_CHECKING:
    from sft.trainer import StagedTrainer


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
            files.write_json(folder / RHYTHM, record | metrics_mark(trainer.stage.folder / "metrics.jsonl"))

    def restore(self, folder: Path) -> None:
        """Reads rhythm.json before training starts."""
        self.restored = files.read_json(folder / RHYTHM)
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


class AtStart(TrainerCallback):
    """Calls `action` with the model when training is set up: weights split over the ranks can't answer before."""

    def __init__(self, action: Callable[[Any], None]) -> None:
        self.action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.action(kwargs["model"])


class Metrics(TrainerCallback):
    """Hands every metric that is logged to `on_metrics`: metrics.jsonl, the source of tracking and report alike."""

    def __init__(self, trainer: StagedTrainer) -> None:
        self.trainer = trainer
        self.last: tuple[float, int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = (time.monotonic(), self.trainer.tokens_seen)

    def throughput(self) -> float:
        """Tokens per second of all ranks since the last training log, evaluations in between included."""
        now, tokens = time.monotonic(), self.trainer.tokens_seen
        then, before = self.last or (now, tokens)
        self.last = (now, tokens)
        return (tokens - before) / max(now - then, 1e-9)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation's time is not training time."""
        self.last = (time.monotonic(), self.trainer.tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        if "loss" in logs:
            logs["tokens"] = self.trainer.tokens_seen
            logs["tokens_per_second"] = round(self.throughput(), 1)
        record = {"step": state.global_step, "time": round(time.time(), 3)} | logs
        self.trainer.on_metrics(record)


def metric_line(step: int, logs: dict[str, float], total: int) -> str:
    """One readable line of a training log or an evaluation."""
    if "loss" in logs:
        parts = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
        parts += [f"grad {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []
        parts += [f"{logs['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in logs else []
        return f"step {step}/{total}  epoch {logs.get('epoch', 0):.2f}  " + "  ".join(parts)
    shown = {"eval_loss": "loss", "eval_perplexity": "perplexity"}
    names = [name for name in logs if name in shown or (name.startswith("gen_") and "/" not in name)]
    return f"step {step}/{total}  evaluation  " + "  ".join(f"{shown.get(n, n)} {logs[n]:.4g}" for n in names)


class Readable(TrainerCallback):
    """A progress bar and one line per log, on the main process."""

    def __init__(self, trainer: StagedTrainer) -> None:
        self.trainer = trainer
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            done, steps = state.global_step, state.max_steps
            self.bar = tqdm(total=steps, initial=done, desc="training", leave=False, unit="step", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            tqdm.write(metric_line(state.global_step, logs, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

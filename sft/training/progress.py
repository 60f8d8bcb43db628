"""What a run tells while it trains: the metrics file, readable lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from sft.scoring.metrics import LOSS_METRICS, logged_name


class AtStart(TrainerCallback):
    """Calls `action` with the model when training is set up: weights split over the ranks can't answer before."""

    def __init__(self, action: Callable[[Any], None]) -> None:
        self.action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.action(kwargs["model"])


class AtSave(TrainerCallback):
    """Calls `action` on the main process when a checkpoint stands under its name."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.action()


class Metrics(TrainerCallback):
    """Hands every metric that is logged to `record`, on the main process alone: the one door from training to
    metrics.jsonl, the tracker and the report. Adds the tokens trained on and the speed."""

    def __init__(self, record: Callable[[dict[str, Any]], None]) -> None:
        self.record = record
        self.last = (time.monotonic(), 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = (time.monotonic(), state.num_input_tokens_seen)

    def throughput(self, tokens: int) -> float:
        """Tokens per second of all ranks since the last training log, evaluations in between left out."""
        now, (then, before) = time.monotonic(), self.last
        self.last = (now, tokens)
        return (tokens - before) / max(now - then, 1e-9)

    on_evaluate = on_train_begin  # an evaluation's time is not training time

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        if "loss" in logs:
            logs["tokens"] = state.num_input_tokens_seen
            logs["tokens_per_second"] = round(self.throughput(logs["tokens"]), 1)
        self.record({"step": state.global_step, "time": round(time.time(), 3)} | logs)


def metric_line(step: int, logs: dict[str, float], total: int) -> str:
    """One readable line of a training log or an evaluation."""
    if "loss" in logs:
        parts = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
        parts += [f"grad {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []
        parts += [f"{logs['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in logs else []
        return f"step {step}/{total}  epoch {logs.get('epoch', 0):.2f}  " + "  ".join(parts)
    shown = {logged_name(name): name for name in LOSS_METRICS}
    names = [name for name in logs if name in shown or (name.startswith("gen_") and "/" not in name)]
    return f"step {step}/{total}  evaluation  " + "  ".join(f"{shown.get(n, n)} {logs[n]:.4g}" for n in names)


class Readable(TrainerCallback):
    """A progress bar and one line per log, on the main process."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            done, steps = state.global_step, state.max_steps
            self.bar = tqdm(total=steps, initial=done, desc="training", leave=False, unit="step", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and any(name.startswith(("loss", "eval_", "gen_")) for name in logs):
            tqdm.write(metric_line(state.global_step, logs, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

"""Best so far, early stopping and what a checkpoint keeps of them; the door metrics go through; arguments."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.settings.rules import warmup_remark
from sft.stages import paths
from sft.training.arguments import training_arguments
from sft.training.callbacks import StageRhythm
from sft.training.progress import Metrics, metric_line

ARGS = SimpleNamespace(should_save=False, world_size=1, eval_strategy="steps")


def evaluated(rhythm: StageRhythm, values: list[float], name: str = "eval_loss") -> list[bool]:
    """Whether each evaluation improved, at steps 0, 1, 2, ...; training is told to stop by `stopped_at`."""
    found = []
    for step, value in enumerate(values):
        control = SimpleNamespace(should_training_stop=False, should_save=False)
        state = SimpleNamespace(global_step=step, max_steps=99)
        rhythm.on_evaluate(ARGS, state, control, metrics={name: value})
        found.append(rhythm.improved)
        rhythm.stopped_at = step if control.should_training_stop else None  # type: ignore[attr-defined]
    return found


def test_the_best_is_the_lowest_loss_and_the_highest_score():
    """Step 0 counts; equal is no improvement; what is no number never is the best."""
    loss = StageRhythm("eval_loss", -1)
    assert evaluated(loss, [3.0, math.nan, 2.0, 2.0, 2.5]) == [True, False, True, False, False]
    assert (loss.best, loss.best_step, loss.without_improvement) == (2.0, 2, 2)
    score = StageRhythm("gen_score", -1)
    assert evaluated(score, [0.1, 0.3, 0.2], "gen_score") == [True, True, False]
    assert StageRhythm("perplexity", -1).metric == "eval_perplexity"


def test_training_stops_when_patience_ends():
    """Two evaluations without improvement after the best at step 1: told to stop at step 3."""
    rhythm = StageRhythm("loss", 2)
    evaluated(rhythm, [3.0, 2.0, 2.5, 2.5])
    assert rhythm.stopped_at == 3  # type: ignore[attr-defined]


def test_a_resumed_run_goes_on_counting_unless_the_metric_changed(tmp_path: Path):
    """rhythm.json brings back best, step and count; another SFT_METRIC_FOR_BEST begins anew."""
    rhythm = StageRhythm("eval_loss", 3)
    evaluated(rhythm, [2.0, 2.5])
    (tmp_path / paths.RHYTHM).write_text(json.dumps(rhythm.record() | {"evaluation_due": True}))
    same, other = StageRhythm("loss", 3), StageRhythm("perplexity", 3)
    same.restore(tmp_path)
    other.restore(tmp_path)
    assert (same.best, same.best_step, same.without_improvement, same.evaluation_due) == (2.0, 0, 1, True)
    assert (other.best, other.without_improvement, other.evaluation_due) == (None, 0, True)


def test_metrics_go_through_one_door(monkeypatch: pytest.MonkeyPatch):
    """Training logs get the tokens so far and the speed since the last one; only the main process hands on."""
    monkeypatch.setattr("time.monotonic", lambda: 14.0)
    records: list[dict] = []
    door = Metrics(records.append)
    door.last = (8.0, 100)
    main = SimpleNamespace(is_world_process_zero=True, global_step=5, num_input_tokens_seen=300)
    door.on_log(None, main, None, logs={"loss": 1.0})
    door.on_log(None, main, None, logs={"train_runtime": 1.0})
    door.on_log(None, SimpleNamespace(is_world_process_zero=False), None, logs={"loss": 1.0})
    (record,) = records
    assert (record["step"], record["tokens"], record["loss"]) == (5, 300, 1.0)
    assert record["tokens_per_second"] == 33.3  # 200 tokens in six seconds


def test_a_line_shows_what_was_logged():
    """Training: loss, rate, gradient, speed; evaluation: what there is of loss and scores, parts left out."""
    logs = {"loss": 1.25, "learning_rate": 1e-4, "grad_norm": 0.5, "epoch": 0.5, "tokens_per_second": 1234.0}
    assert metric_line(3, logs, 10) == ("step 3/10  epoch 0.50  loss 1.2500  lr 1.00e-04  grad 0.50  1,234 tokens/s")
    assert metric_line(3, {"gen_score": 0.5, "gen_score/x": 0.1}, 10) == "step 3/10  evaluation  gen_score 0.5"


def test_a_resumed_run_does_not_evaluate_step_0_again(make_settings, tmp_path: Path):
    """And a stage with nothing to evaluate on never does."""
    settings = make_settings(report_to=("none",))
    seen = [
        (made.eval_on_start, str(made.eval_strategy.value))
        for evaluated, resumed in ((True, False), (True, True), (False, False))
        for made in [training_arguments(settings, tmp_path, checkpointing=False, evaluated=evaluated, resumed=resumed)]
    ]
    assert seen == [(True, "steps"), (False, "steps"), (False, "no")]


def test_a_warm_up_longer_than_the_run_is_named():
    """The setting, the steps there are, what to do; silent where the rate gets there."""
    settings = SimpleNamespace(warmup_steps=50, warmup_ratio=0.03, lr=1e-4)
    assert warmup_remark(settings, 51) == ""
    assert "SFT_WARMUP_STEPS=50: there are only 40 steps" in warmup_remark(settings, 40)

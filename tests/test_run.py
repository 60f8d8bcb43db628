"""The steps of a stage: what each hands on, and in which order the end is made. Stand-ins for all that computes."""

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from sft import run
from sft.data.mixture import Mix
from sft.distributed.signals import STOP, Stopped
from sft.errors import RunFailed
from sft.settings.values import SourceRecord
from sft.stages.stage import Stage
from tests.ladders import make_settings as stage_settings
from tests.stops import before

ROWS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "{}"}]}]
ROW = ROWS[0] | {"extras": None, "task_key": "text_to_json"}


def mix_of(*, train: int = 3, val: int = 1) -> Mix:
    source = SourceRecord(id="rows.jsonl", drawn=3)
    rows = datasets.Dataset.from_list([ROW] * 3)
    views = rows.select(range(train)), rows.select(range(val))
    return Mix(*views, [source], [], Counter(empty=2), tokens={"total": 30, "trained": 10})


@pytest.fixture(autouse=True)
def no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the start of a run."""
    monkeypatch.setattr(STOP, "number", None)
    monkeypatch.setattr(STOP, "deferred", False)


# --- before training


def test_the_manifest_is_told_what_the_rows_are():
    """Sources, counts, losses, upsampling and tokens, under the manifest's names."""
    assert run.rows_facts(mix_of()) == {
        "sources": [SourceRecord(id="rows.jsonl", drawn=3)],
        "train_rows": 3,
        "val_rows": 1,
        "dropped": {"empty": 2},
        "upsampling": [],
        "replay": [],
        "tokens": {"total": 30, "trained": 10},
    }


def test_the_evaluation_writes_its_questions_before_training(tmp_path: Path, make_settings: Callable[..., Any]):
    """Later stages ask them again; the tokenizer and the rows go on to the evaluation."""
    settings = make_settings(gen_eval="structured")
    evaluation = run.evaluation(Stage(settings), "tokenizer", mix_of())  # type: ignore[arg-type]
    assert evaluation is not None
    asked = {"task": "text_to_json", "prompt": ROW["messages"][:1], "reference": "{}"}
    assert (evaluation.tokenizer, evaluation.rows) == ("tokenizer", [asked])
    lines = (tmp_path / "out_stage1" / "gen_rows.jsonl").read_text().splitlines()
    assert [json.loads(line).items() >= asked.items() for line in lines] == [True]


@pytest.mark.parametrize(("kind", "val"), [("none", 1), ("structured", 0)])
def test_without_questions_there_is_no_evaluation(tmp_path: Path, make_settings: Callable[..., Any], kind, val):
    """None is handed on, no earlier model is scored and no file is written."""
    stage = Stage(make_settings(gen_eval=kind))
    assert run.evaluation(stage, None, mix_of(val=val)) is None  # type: ignore[arg-type]
    assert run.score_earlier_models(stage, None) is None
    assert list(tmp_path.iterdir()) == []


def test_the_edge_mask_is_drawn_over_the_rows_to_train(make_settings: Callable[..., Any]):
    """None without SFT_MASKED_LOSS; the seed and the redrawing are the settings'."""
    mix = mix_of()
    mix.train = datasets.Dataset.from_dict({"unit_edges": [["is a", "has"], ["is a"]]})
    assert run.build_edge_mask(mix, make_settings()) is None
    settings = make_settings(masked_loss="inverse_frequency", seed=7, masked_loss_redraw="once")
    mask = run.build_edge_mask(mix, settings)
    assert mask is not None
    assert (mask.seed, mask.redraw, mask.row_index.tolist()) == (7, "once", [0, 1])
    assert dict(zip(mask.edges, mask.counts.tolist(), strict=True)) == {"is a": 2, "has": 1}


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("auto", True)])
def test_gradients_are_checkpointed_as_set_and_where_auto_finds_it_needed(
    make_settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, value, expected
):
    """Auto asks with the bytes of the loaded model: 8 numbers in float32; under ZeRO-3 those of this rank's share."""
    held: list[int] = []

    def needed(config: Any, settings: Any, batch: Any, *, held: int, to: list[int] = held) -> bool:
        to.append(held)
        return True

    monkeypatch.setattr(run, "checkpointing_needed", needed)
    monkeypatch.setattr(run, "largest_batch", lambda rows, settings, tokens: None)
    model: Any = torch.nn.Linear(3, 2)
    model.config = None
    settings = make_settings(gradient_checkpointing=value)
    assert run.checkpoints_gradients(settings, model, mix_of()) is expected
    model.bias.ds_tensor = torch.zeros(1)
    assert run.checkpoints_gradients(settings, model, mix_of()) is expected
    assert held == ([32, 28] if value == "auto" else [])


def test_the_trainer_measures_answers_at_its_step_and_the_record_keeps_them():
    """Model, accelerator and the call that a stop goes through pass unchanged; the record learns step and steps."""
    calls: list[Any] = []

    def answer(model: Any, accelerator: Any, *, step: int, interrupted: Any, record: Any) -> dict[str, float]:
        calls.append((model, accelerator, step, interrupted))
        record(["answers"])
        return {"gen_score": 0.5}

    evaluation: Any = SimpleNamespace(run=answer)
    record: Any = SimpleNamespace(samples=lambda samples, *, step, steps: calls.append((samples, step, steps)))
    measure = run.measure_answers(evaluation, record)
    state = SimpleNamespace(global_step=4, max_steps=8)
    assert measure("model", "accelerator", state, len) == {"gen_score": 0.5}  # type: ignore[arg-type]
    assert calls == [("model", "accelerator", 4, len), (["answers"], 4, 8)]


# --- training


def trainer_that(does: Callable[[str | None], None], *, stopped: bool = False) -> Any:
    """Everything `train` and `finish` ask of a trainer."""
    model = torch.nn.Linear(3, 2)
    model.config = None  # type: ignore[assignment]
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, is_main_process=True, wait_for_everyone=int)
    return SimpleNamespace(
        train=lambda resume_from_checkpoint: does(resume_from_checkpoint),
        model=model,
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing=True, to_dict=dict),
        passes=SimpleNamespace(tokens=0),
        train_dataset=SimpleNamespace(rows="rows"),
        rhythm=SimpleNamespace(stopped=stopped),
        state=SimpleNamespace(global_step=8, epoch=2.0),
        processing_class="tokenizer",
        saved=[],
    )


@pytest.mark.parametrize("checkpoint", [None, Path("out_stage1/checkpoint-4")])
def test_training_goes_on_from_the_checkpoint_and_stops_only_between_steps(
    make_settings: Callable[..., Any], checkpoint
):
    """While it runs a signal waits for the end of a step; afterwards it does not."""
    stage = Stage(make_settings())
    stage.verdict.checkpoint = checkpoint
    seen: list[Any] = []
    run.train(stage, trainer_that(lambda resumed: seen.append((resumed, STOP.deferred))))
    assert seen == [(checkpoint and str(checkpoint), True)]
    assert STOP.deferred is False


def test_a_stop_that_cuts_an_evaluation_short_saves_first(make_settings: Callable[..., Any]):
    """Then the stop goes on to whoever ends the program."""

    def stop(_: object) -> None:
        STOP.number = signal.SIGINT
        raise Stopped(signal.SIGINT)

    trainer = trainer_that(stop)
    trainer.save_after_stop = lambda: trainer.saved.append(STOP.deferred)
    with pytest.raises(Stopped) as stopped:
        run.train(Stage(make_settings()), trainer)
    assert (stopped.value.exit_code, trainer.saved, STOP.deferred) == (130, [True], False)


@pytest.mark.parametrize(("stopped", "number", "code"), [(True, None, 143), (False, signal.SIGINT, 130)])
def test_a_stop_after_the_last_step_is_still_a_stop(make_settings: Callable[..., Any], stopped, number, code):
    """Whether the trainer ended early because of it, or had nothing left to cut short."""

    def arrive(_: object) -> None:
        STOP.number = number

    with pytest.raises(Stopped) as found:
        run.train(Stage(make_settings()), trainer_that(arrive, stopped=stopped))
    assert found.value.exit_code == code


def test_memory_that_ran_out_is_explained_and_other_errors_pass(
    make_settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """The estimate is asked with what ran: the rows, the checkpointing."""
    asked: list[Any] = []

    def shortage(error: Exception, config: Any, settings: Any, rows: Any, *, checkpointing: bool, tokens: int) -> None:
        asked.append((rows, checkpointing))
        if "memory" in str(error):
            raise RunFailed("Out of memory: 3.0 GiB were estimated") from error

    monkeypatch.setattr(run, "raise_shortage", shortage)

    def fail(text: str) -> Callable[[object], None]:
        def failing(_: object) -> None:
            raise RuntimeError(text)

        return failing

    with pytest.raises(RunFailed, match="were estimated"):
        run.train(Stage(make_settings()), trainer_that(fail("out of memory")))
    with pytest.raises(RuntimeError, match="shapes"):
        run.train(Stage(make_settings()), trainer_that(fail("shapes differ")))
    assert (asked, STOP.deferred) == ([("rows", True)] * 2, False)


# --- the end


def test_the_best_model_is_named_with_its_perplexity_where_it_has_one(tmp_path: Path, capsys):
    """Silent where there is none."""
    run.say_best(tmp_path)
    assert capsys.readouterr().out == ""
    record = tmp_path / "best_model" / "best_model_info.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"step": 40, "best_perplexity": 1.23456}))
    run.say_best(tmp_path)
    assert capsys.readouterr().out == (
        f"Best model saved to {tmp_path / 'best_model'} (step 40)\nBest perplexity: 1.2346\n"
    )
    record.write_text(json.dumps({"step": 40, "best_perplexity": None}))
    run.say_best(tmp_path)
    assert capsys.readouterr().out == f"Best model saved to {tmp_path / 'best_model'} (step 40)\n"


def test_the_end_comes_in_an_order_that_a_kill_may_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Result, probe, scores, held-out rows, report, and only then the status; tracking is closed last.

    The report is given the finished manifest, with the last value of every metric and without its steps and times.
    """
    order: list[tuple[str, str]] = []
    written: list[Any] = []

    def note(what: str, result: Any = None) -> Callable[..., Any]:
        def noted(*arguments: Any, **keywords: Any) -> Any:
            order.append((what, json.loads((tmp_path / "out_stage1" / "stage.json").read_text())["status"]))
            written.append((what, arguments, keywords))
            return result

        return noted

    def save_model(folder: str, **_: Any) -> None:
        note("weights")()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            Path(folder, name).write_text("{}")

    monkeypatch.setattr(run, "keep_probe", note("probe"))
    monkeypatch.setattr(run, "ladder_scores", note("scores", {"models": ["stage 1"]}))
    monkeypatch.setattr(run, "write_held_out", note("held out"))
    monkeypatch.setattr("sft.reporting.report.write_report", note("report"))
    monkeypatch.setattr("sft.reporting.report.close_stage", note("closed"))
    before(monkeypatch, "sft.run.say_best", note("best model"))
    trainer = trainer_that(lambda _: None)
    trainer.save_model = save_model
    settings = stage_settings(tmp_path, general_eval=0)
    with Stage.open(settings) as stage:
        stage.begin()
        lines = [{"step": 4, "time": 1.0, "loss": 2.0, "eval_loss": 1.5}, {"step": 8, "time": 2.0, "loss": 1.0}]
        (stage.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tracker: Any = SimpleNamespace(wait_for_run=lambda seconds: "run 7")
        run.finish(stage, trainer, mix_of(), None, None, tracker)
    names = ["weights", "best model", "probe", "scores", "held out", "report", "closed"]
    assert order == [(name, "complete" if name == "closed" else "running") for name in names]
    manifest = json.loads((tmp_path / "out_stage1" / "stage.json").read_text())
    reported = next(keywords["manifest"] for what, _, keywords in written if what == "report")
    assert reported.record().items() <= manifest.items()
    assert reported.metrics == {"loss": 1.0, "eval_loss": 1.5, "epoch": 2.0}
    assert (reported.steps, reported.mlflow_run_id, reported.status) == (8, "run 7", "complete")
    assert reported.forgetting == {"models": ["stage 1"]}
    assert (tmp_path / "out_stage1" / "training_config.json").is_file()


def test_processes_beside_the_main_one_write_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They save and score with the others and leave manifest and report alone."""
    done: list[str] = []
    for name in ("write_result", "keep_probe", "ladder_scores", "write_held_out"):
        monkeypatch.setattr(run, name, lambda *_, name=name, **__: done.append(name))
    trainer = trainer_that(lambda _: None)
    trainer.save_model, trainer.accelerator.is_main_process = None, False
    stage = Stage(stage_settings(tmp_path, general_eval=0))
    run.finish(stage, trainer, mix_of(), None, None, None)
    assert done == ["write_result", "keep_probe", "ladder_scores"]
    assert not stage.folder.exists()

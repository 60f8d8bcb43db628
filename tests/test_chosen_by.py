"""What chooses the best model is there before the first step, in a run and in --check alike."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from sft.errors import Problems
from sft.evaluation.chosen_by import measured, require_metric
from sft.scoring.metrics import LOSS_METRICS, NAMES
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

TASKED = [{"task": "text_to_json", "prompt": [], "reference": '{"a": 1}'}]
PLAIN = [{"task": None, "prompt": [], "reference": "some words"}]


def settings(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(**{
        "gen_eval": "structured", "gen_eval_sources": (), "gen_eval_samples": 4, "seed": 0, "extraction_fields": (),
        "json_schema": None,
        "output_markers": ("Output:",), "metric_for_best": "eval_loss", "early_stopping_patience": -1, "origins": {},
        "lr_scheduler": "cosine",
    } | more)  # fmt: skip


def test_metrics_follow_from_the_rows():
    """Loss with validation rows, scores with questions that can be judged, parts of the tasks there are."""
    assert measured(settings(), 0, []) == set()
    assert measured(settings(), 3, PLAIN) == {"eval_loss", "eval_perplexity"}
    assert {f"eval_{name}" for name in NAMES if not name.startswith("gen_")} == measured(settings(), 3, PLAIN)
    names = measured(settings(), 0, TASKED)
    assert {"gen_score", "gen_score/text_to_json", "gen_value_rate"} <= names
    assert not {"eval_loss", "gen_score/text_to_yaml", "gen_edge_f1"} & names


def asked(monkeypatch: pytest.MonkeyPatch, rows: list[dict], val: int, **more: Any) -> list[str]:
    """What is said, or the problems."""
    monkeypatch.setattr("sft.evaluation.chosen_by.asked_rows", lambda *_: rows)
    said: list[str] = []
    try:
        require_metric(settings(**more), SimpleNamespace(val=range(val), train=range(7), names=["one"]), said.append)
    except Problems as found:
        return found.problems
    return said


@pytest.mark.parametrize(
    ("metric", "sources", "reason"),
    [
        ("eval_loss/b.jsonl", [0, 1, 1], ""),
        ("loss/b.jsonl", [0, 1, 1], ""),
        (
            "eval_loss/c.jsonl", [0, 1, 1],
            "no source of that name has validation rows; take one of eval_loss/a.jsonl, eval_loss/b.jsonl",
        ),
        ("eval_loss/b.jsonl", [1, 1, 1], "the validation rows are of one source alone; take eval_loss"),
        (
            "eval_loss/b.jsonl", [],
            "eval_loss/b.jsonl needs validation rows; raise SFT_VAL_RATIO, or set SFT_EVAL_DATASET, or choose by",
        ),
    ],
)  # fmt: skip
def test_the_loss_of_one_source_may_choose(metric: str, sources: list[int], reason: str, monkeypatch):
    """Where that source has validation rows, and another as well: else there is none."""
    monkeypatch.setattr("sft.evaluation.chosen_by.asked_rows", lambda *_: TASKED)
    val = datasets.Dataset.from_dict({"source": sources})
    mix = SimpleNamespace(val=val, train=range(7), names=["a.jsonl", "b.jsonl"])
    chosen = settings(metric_for_best=metric, origins={"SFT_METRIC_FOR_BEST": "stage1.env:3"})
    if not reason:
        require_metric(chosen, mix, pytest.fail)
        return
    with pytest.raises(Problems) as found:
        require_metric(chosen, mix, pytest.fail)
    assert found.value.problems[0].startswith(f"SFT_METRIC_FOR_BEST={metric}: {reason}")


def test_a_metric_that_never_comes_is_a_problem(monkeypatch):
    """With its name, what is there and a remedy; said aloud only, where nobody asked for it."""
    chosen = {"origins": {"SFT_METRIC_FOR_BEST": "stage1.env:3"}}
    assert asked(monkeypatch, TASKED, 3, metric_for_best="gen_score/text_to_json", **chosen) == []
    assert asked(monkeypatch, PLAIN, 3, metric_for_best="gen_score", **chosen) == [
        "SFT_METRIC_FOR_BEST=gen_score: the rows to answer do not give it; they give eval_loss, eval_perplexity"
    ]
    (problem,) = asked(monkeypatch, TASKED, 0, metric_for_best="perplexity", **chosen)
    assert "eval_perplexity needs validation rows; raise SFT_VAL_RATIO, or set SFT_EVAL_DATASET, or choose" in problem
    assert asked(monkeypatch, [], 0, early_stopping_patience=2) == [
        "SFT_EARLY_STOPPING_PATIENCE=2: goes by SFT_METRIC_FOR_BEST=eval_loss, but there is nothing to evaluate: no "
        "validation rows of 7; raise SFT_VAL_RATIO, or set SFT_EVAL_DATASET"
    ]
    assert asked(monkeypatch, [], 0)[0].startswith("[WARNING] No best model will be kept: there is nothing to evaluate")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 24)
    write_rows(tmp_path / "asked.jsonl", 4, target="yaml")
    lines = [{"prompt": f"Say {number}", "completion": f"number {number}"} for number in range(24)]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def stage(folder: Path, **more: object) -> None:
    common = {"SFT_BASE_MODEL": folder / "base", "SFT_DATASET_ID": folder / "rows.jsonl", "SFT_MAX_STEPS": 2}
    small = {"SFT_OUT_LORA_DIR": folder / "out", "SFT_GEN_EVAL": "structured", "SFT_GEN_MAX_NEW_TOKENS": 4}
    write_stage(folder, 1, common | small | more)


@pytest.mark.slow
def test_check_and_run_refuse_it_in_the_same_words(folder: Path, capsys):
    """Exit 2, before anything is written."""
    stage(folder, SFT_DATASET_ID=folder / "plain.jsonl", SFT_METRIC_FOR_BEST="gen_score")
    problem = "SFT_METRIC_FOR_BEST=gen_score: the rows to answer do not give it; they give eval_loss, eval_perplexity"
    for more in (("--check",), ()):
        assert run_train("--stage", 1, "--env-dir", folder, *more) == 2
        assert problem in capsys.readouterr().err
    assert not list(folder.glob("out_stage1/*"))


@pytest.mark.slow
def test_questions_alone_are_evaluated_and_choose_the_best(folder: Path):
    """SFT_VAL_RATIO=0 with SFT_GEN_EVAL_DATASET: at steps 0 and 2, without a loss; step 0 counts for the best model."""
    stage(folder, SFT_VAL_RATIO=0, SFT_GEN_EVAL_DATASET=folder / "asked.jsonl", SFT_METRIC_FOR_BEST="gen_score",
          SFT_GEN_EVAL_SAMPLES=2)  # fmt: skip
    assert run_train("--stage", 1, "--env-dir", folder) == 0
    out = folder / "out_stage1"
    assert [path.name for path in sorted(out.glob("gen_metrics_step*"))] == [
        "gen_metrics_step0.json", "gen_metrics_step2.json",
    ]  # fmt: skip
    assert len(metric_lines(out, "gen_score")) == 2
    assert metric_lines(out, "eval_loss") == []
    best = json.loads((out / "best_model" / "best_model_info.json").read_text())
    assert best["step"] == 0  # two answers of four random tokens: 0 both times, the first is the best
    assert best["best_model_checkpoint"] == "checkpoint-0"


@pytest.mark.slow
def test_a_validation_loss_that_is_no_number_is_a_failure(folder: Path, monkeypatch, capsys):
    """Exit 1 and status failed instead of "complete"."""
    from sft.training.trainer import StagedTrainer

    monkeypatch.setattr(StagedTrainer, "validation_loss", lambda self, rows: {"eval_loss": float("nan")})
    stage(folder, SFT_GEN_EVAL="none")
    assert run_train("--stage", 1, "--env-dir", folder) == 1
    assert "The loss on the validation rows is nan at step 0" in capsys.readouterr().err
    assert json.loads((folder / "out_stage1" / "stage.json").read_text())["status"] != "complete"


def test_a_stage_stops_and_keeps_its_best_by_the_loss_of_one_source(tmp_path):
    """Patience 1 at a rate that soon makes things worse: stopped at the first evaluation that is no better."""
    mix = [{"id": str(write_rows(tmp_path / f"{kind}.jsonl", 20, target=kind))} for kind in ("json", "yaml")]
    common = {"SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_OUT_LORA_DIR": tmp_path / "out"}
    write_stage(tmp_path, 1, common | {
        "SFT_DATASET_MIX": json.dumps(mix), "SFT_METRIC_FOR_BEST": "eval_loss/yaml.jsonl", "SFT_MAX_STEPS": 12,
        "SFT_EARLY_STOPPING_PATIENCE": 1, "SFT_LR": 30, "SFT_EVAL_STEPS": 2, "SFT_WARMUP_RATIO": 0,
    })  # fmt: skip
    assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
    out = tmp_path / "out_stage1"
    losses = metric_lines(out, "eval_loss/yaml.jsonl")
    assert losses.index(min(losses)) == len(losses) - 2
    for name in LOSS_METRICS:  # whatever may be named to choose by is logged at every evaluation
        assert len(metric_lines(out, f"eval_{name}")) == len(losses)
    record = json.loads((out / "best_model" / "best_model_info.json").read_text())
    assert (record["best_metric_name"], record["best_metric"]) == ("eval_loss/yaml.jsonl", min(losses))
    assert json.loads((out / "stage.json").read_text())["steps"] == 2 * (len(losses) - 1) < 12
    code = run_train("--stage", 1, "--env-dir", tmp_path, "--set", "SFT_METRIC_FOR_BEST=eval_loss/xml.jsonl", "--check")
    assert code == 2

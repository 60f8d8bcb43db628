"""What a run leaves behind while it trains: a line per metric, answers on the screen, and an MLflow run that ends."""

import json
from threading import Thread
from types import SimpleNamespace

import pytest

from sft.distributed.signals import Stopped
from sft.reporting import recording
from sft.settings.values import SourceRecord
from sft.stages.manifest import Manifest


class Tracker:
    """Notes what it is told; its thread has ended."""

    def __init__(self, run_id=""):
        self.run_id, self.told, self.lost = run_id, [], 0
        self.thread = Thread()

    def log_metrics(self, record):
        self.told.append(("metrics", record))

    def log_table(self, rows, name):
        self.told.append((name, rows))

    def close(self, status):
        self.told.append(("closed", status))


@pytest.fixture
def stage(tmp_path):
    manifest = Manifest(sources=[SourceRecord(id="hub/rows", fingerprint="sha256:ab")])
    settings = SimpleNamespace(num_generate_samples=1, report_to=("mlflow",), base_model="https://me:geheim@hub/base")
    parents = (SimpleNamespace(stage=1, adapter_sha256="c" * 64),)
    stage = SimpleNamespace(number=2, folder=tmp_path, manifest=manifest, settings=settings, parents=parents)
    stage.update = lambda **fields: setattr(stage, "manifest", stage.manifest.changed(**fields))
    return stage


def test_a_metric_is_a_line_and_a_message_and_the_run_s_id_is_kept(stage):
    """The file holds what the tracker is told; a killed run is found again by the id in the manifest."""
    tracker = Tracker(run_id="run 7")
    run = recording.RunRecord(stage, tracker)
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": float("nan")}]
    for record in records:
        run.metrics(record)
    lines = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": None}]
    assert tracker.told == [("metrics", record) for record in records]
    assert stage.manifest.mlflow_run_id == "run 7"


@pytest.mark.parametrize(("step", "shown"), [(0, "before training"), (5, None), (10, "after training")])
def test_answers_are_shown_before_and_after_training_and_kept_of_every_evaluation(stage, capsys, step, shown):
    """One of two is shown, as SFT_NUM_GENERATE_SAMPLES says, with its score and what is wrong with it."""
    prompt = [{"role": "user", "content": "Give\nJSON"}]
    samples = [
        {"task": "t", "prompt": prompt, "answer": "{}", "reference": "{1}", "score": 0.5, "faults": ["fence"]},
        {"task": "t", "prompt": prompt, "answer": "second", "reference": "", "score": None},
    ]
    tracker = Tracker()
    recording.RunRecord(stage, tracker).samples(samples, step=step, steps=10)
    said = capsys.readouterr().out
    assert (f"Sample answers of stage 2 {shown}" in said) is bool(shown)
    assert ("asked    Give ⏎ JSON" in said, "score    0.50   (fence)" in said) == (bool(shown), bool(shown))
    assert "second" not in said
    assert tracker.told[0][0] == "gen_samples.json"
    assert [row["answer"] for row in tracker.told[0][1]] == ["{}", "second"]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError("x"), "FAILED"), (Stopped(15), "KILLED")]
)
def test_the_run_ends_as_training_ended(stage, monkeypatch, error, status):
    """Whatever ends the block ends the run, and is not swallowed."""
    tracker = Tracker()
    monkeypatch.setattr(recording, "start_tracking", lambda stage, mix: tracker)
    try:
        with recording.tracked(stage, None) as found:
            assert found is tracker
            if error:
                raise error
    except (ValueError, Stopped) as caught:
        assert caught is error
    assert tracker.told == [("closed", status)]


def test_a_run_is_found_by_what_it_was_made_from(stage):
    """Base model, every parent's adapter and every data set, by digest, without credentials."""
    assert recording.lineage_tags(stage) == {
        "lineage.base_model": "https://***@hub/base",
        "lineage.parent.stage_1": "c" * 64,
        "lineage.dataset.1": "hub/rows sha256:ab",
    }

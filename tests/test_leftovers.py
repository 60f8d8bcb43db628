"""Complete means complete: the report comes before the status, and what a kill left undone is done later."""

import json
from pathlib import Path

import pytest

from sft.reporting.leftovers import look_after
from sft.stages import paths
from sft.stages.stage import Stage
from tests.ladders import add_adapter, make_settings, train


def status(folder: Path) -> str:
    return json.loads((folder / paths.MANIFEST).read_text())["status"]


def test_the_report_is_made_from_the_finished_manifest_before_the_status_says_complete(tmp_path):
    """A kill in between leaves a stage that goes on and makes its report again (trust M11)."""
    seen = []
    with Stage.open(make_settings(tmp_path)) as stage:
        stage.begin()
        add_adapter(stage.folder, b"x")
        (stage.folder / "error.log").write_text("of a start that failed")
        (stage.folder / "error.rank1.log").write_text("of another rank")
        stage.complete(steps=3, report=lambda manifest: seen.append((status(stage.folder), manifest)))
    ((before, manifest),) = seen
    assert (before, status(stage.folder)) == ("running", "complete")
    assert (manifest.status, manifest.steps) == ("complete", 3)
    assert list(stage.folder.glob("error*.log")) == []


def test_a_report_that_fails_leaves_the_stage_unfinished(tmp_path):
    """Its manifest says failed, not complete."""
    with pytest.raises(OSError, match="full"), Stage.open(make_settings(tmp_path)) as stage:
        stage.begin()
        add_adapter(stage.folder, b"x")

        def full(manifest: object) -> None:
            raise OSError("full")

        stage.complete(report=full)
    assert status(stage.folder) == "failed"


def test_a_complete_stage_without_report_gets_one_when_it_is_looked_at(tmp_path):
    """Stages that an earlier version completed and was killed after, or whose page somebody deleted."""
    stage = train(make_settings(tmp_path))
    before = (stage.folder / paths.MANIFEST).read_bytes()
    look_after(Stage.inspect(stage.settings))
    assert json.loads((stage.folder / paths.REPORT_FACTS).read_text())["status"] == "complete"
    assert "<html" in (stage.folder / paths.REPORT).read_text()
    assert (stage.folder / paths.MANIFEST).read_bytes() == before


def test_a_run_that_a_kill_left_running_is_ended_when_the_stage_is_looked_at(tmp_path):
    """MLflow's own store says FINISHED afterwards, and nothing is asked of it a second time."""
    from sft.reporting.tracker import quiet_client

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    stage = train(make_settings(tmp_path))
    client = quiet_client(uri)
    run = client.create_run(client.create_experiment("x")).info.run_id
    left_open = stage.folder / paths.OPEN_RUN
    left_open.write_text(json.dumps({"uri": uri, "run_id": run}))
    look_after(Stage.inspect(stage.settings))
    assert client.get_run(run).info.status == "FINISHED"
    assert not left_open.exists()

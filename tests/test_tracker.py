"""Tracking can't hurt: whatever the MLflow server does, training goes on, and what it missed is sent later."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.reporting.tracker import KIND_TAG, TRAINING, Tracker, end_run, metric_names, quiet_client

ROOT = Path(__file__).parents[1]


def settings(uri: str, stage: int = 1) -> SimpleNamespace:
    name = f"llm-training-stage{stage}"
    return SimpleNamespace(mlflow_tracking_uri=uri, mlflow_experiment_name=name, run_name=None)


def record(folder: Path, step: int, **metrics: float) -> dict[str, float]:
    """A metric record, written to metrics.jsonl as a run does before it tells the tracker."""
    line = {"step": step, "time": 1_700_000_000.0 + step} | metrics
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    return line


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as MLflow sets it up, which takes it seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracker = Tracker(settings(f"sqlite:///{path}"), path.parent, run_id=None, say=print)
    assert tracker.wait_for_run(120.0)
    tracker.close("FINISHED")
    return path


@pytest.mark.parametrize("given", [None, "sqlite:///another.db"])
def test_the_store_s_address_does_not_stay_in_the_environment(
    empty_store: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
):
    """MLflow writes it there, and the settings of a later stage are read from there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    quiet_client(f"sqlite:///{empty_store}").search_experiments()
    assert os.environ.get("MLFLOW_TRACKING_URI") == given


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mlruns" / "mlflow.db"
    path.parent.mkdir()
    path.write_bytes(empty_store.read_bytes())
    return path


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def history(store: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    with sqlite3.connect(store) as connection:
        query = "select step, value from metrics where run_uuid = ? and key = ? order by step"
        return connection.execute(query, (run_id, name)).fetchall()


@pytest.mark.parametrize("kind", ["unreachable", "silent"])
def test_a_dead_server_costs_training_no_time_and_its_end_seconds(kind, silent_server, tmp_path, monkeypatch):
    """500 logged steps wait for none of the requests, each of which is given 10 s; closing takes at most its limit. One
    warning when it fails, one at the end."""
    monkeypatch.setattr("sft.reporting.tracker.CLOSING_SECONDS", 3.0)
    said: list[str] = []
    uri = "http://127.0.0.1:9" if kind == "unreachable" else silent_server
    began = time.monotonic()
    tracker = Tracker(settings(uri), tmp_path, run_id=None, say=said.append)
    for step in range(500):
        tracker.log_metrics({"step": step, "loss": 1.0})
    assert time.monotonic() - began < 5.0  # on a busy machine the import of MLflow beside it takes seconds
    began = time.monotonic()
    tracker.close("FINISHED")
    assert time.monotonic() - began < 6.0
    assert [text for text in said if "did not take everything in time; all metrics are in" in text] == said[-1:]
    assert len(said) <= 2
    assert tracker.wait_for_run(0.0) is None


def test_a_silent_server_does_not_keep_the_program_from_ending(silent_server, tmp_path):
    """No thread of MLflow's is waited for at the end of the interpreter."""
    code = (
        "import sys, time; from types import SimpleNamespace; from pathlib import Path;"
        "from sft.reporting import tracker;"
        "tracker.CLOSING_SECONDS = 1.0;"
        f"settings = SimpleNamespace(mlflow_tracking_uri={silent_server!r}, mlflow_experiment_name='e', run_name=None);"
        f"tracker = tracker.Tracker(settings, Path({str(tmp_path)!r}), run_id=None, say=print);"
        "import mlflow; time.sleep(2); tracker.close('FINISHED'); print('closed', time.monotonic())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert time.monotonic() - float(done.stdout.split()[-1]) < 10.0


def test_metrics_arrive_once_each_however_often_the_stage_is_resumed(store, tmp_path):
    """A resumed stage goes on in its run: steps that were sent are not sent again, those after a kill are."""
    folder, uri = tmp_path / "out_stage1", f"sqlite:///{store}"
    first = Tracker(settings(uri), folder, run_id=None, say=pytest.fail)
    for step in (1, 2):
        first.log_metrics(record(folder, step, loss=3.0 - step, epoch=step / 2))
    first.log_metrics(record(folder, 2, eval_loss=5.0, epoch=1.0))
    run_id = first.wait_for_run(60.0)
    first.close("KILLED")
    record(folder, 3, loss=0.25)  # the server never heard of this one
    second = Tracker(settings(uri), folder, run_id=run_id, say=pytest.fail)
    second.log_metrics(record(folder, 4, loss=0.125))
    second.close("FINISHED")
    assert second.run_id == run_id
    assert history(store, run_id, "loss") == [(1, 2.0), (2, 1.0), (3, 0.25), (4, 0.125)]
    assert history(store, run_id, "eval_loss") == [(2, 5.0)]
    assert history(store, run_id, "epoch") == [(1, 0.5), (2, 1.0)]


def test_a_database_that_refuses_for_a_while_gets_everything_later(store, tmp_path, monkeypatch):
    """Writes fail in the middle of a run; once they work again nothing is missing, in the right order."""
    monkeypatch.setattr("sft.reporting.tracker.RETRY_SECONDS", 0.0)
    folder, said = tmp_path / "out_stage1", []
    tracker = Tracker(settings(f"sqlite:///{store}"), folder, run_id=None, say=said.append)
    tracker.log_metrics(record(folder, 1, loss=4.0))
    run_id = tracker.wait_for_run(60.0)
    wait_until(lambda: len(history(store, run_id, "loss")) == 1)
    with sqlite3.connect(store) as connection:
        connection.execute("create trigger refuse before insert on metrics begin select raise(abort, 'read-only'); end")
    tracker.log_metrics(record(folder, 2, loss=3.0))
    wait_until(lambda: bool(said))
    with sqlite3.connect(store) as connection:
        connection.execute("drop trigger refuse")
    tracker.log_metrics(record(folder, 3, loss=2.0))
    tracker.close("FINISHED")
    assert history(store, run_id, "loss") == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert len(said) == 1
    assert "MLflow tracking failed" in said[0]
    assert said[0].endswith("training goes on")


def test_what_a_database_refuses_for_good_is_sent_when_the_stage_goes_on(store, tmp_path):
    """The closing warning says so, and a second start with the same run does it."""
    folder, said, uri = tmp_path / "out_stage1", [], f"sqlite:///{store}"
    with sqlite3.connect(store) as connection:
        connection.execute("create trigger refuse before insert on metrics begin select raise(abort, 'read-only'); end")
    tracker = Tracker(settings(uri), folder, run_id=None, say=said.append)
    tracker.log_metrics(record(folder, 1, loss=4.0))
    run_id = tracker.wait_for_run(60.0)
    tracker.close("KILLED")
    assert said[-1].endswith("metrics.jsonl and are sent when the stage goes on")
    with sqlite3.connect(store) as connection:
        connection.execute("drop trigger refuse")
    again = Tracker(settings(uri), folder, run_id=run_id, say=pytest.fail)
    again.log_metrics(record(folder, 2, loss=3.0))
    again.close("FINISHED")
    assert history(store, again.run_id, "loss") == [(1, 4.0), (2, 3.0)]


def test_values_over_the_limits_are_cut(store, tmp_path):
    """A parameter of 10,000 characters: its first 500 are kept, and the others arrive."""
    tracker = Tracker(settings(f"sqlite:///{store}"), tmp_path, run_id=None, say=pytest.fail)
    tracker.log_parameters({"SFT_DATASET_MIX": "x" * 10_000, "SFT_LR": 1e-4})
    tracker.log_tags({"parents": "y" * 9_000})
    tracker.close("FINISHED")
    with sqlite3.connect(store) as connection:
        rows = dict(
            connection.execute("select key, value from params where run_uuid = ?", (tracker.run_id,)).fetchall()
        )
    assert rows == {"SFT_DATASET_MIX": "x" * 500, "SFT_LR": "0.0001"}


def test_a_name_that_mlflow_does_not_take_loses_nothing(store, tmp_path):
    """Task keys are people's own words: brackets and ampersands become _, the rest arrives as it is."""
    tracker = Tracker(settings(f"sqlite:///{store}"), tmp_path / "out_stage1", run_id=None, say=pytest.fail)
    keys = {"gen_score/text_to_json (easy)": 0.25, "gen_score/Q&A": 0.5, "gen_score/日本語": 0.75, "gen_score//x": 1.0}
    tracker.log_metrics(record(tmp_path / "out_stage1", 4, eval_loss=2.0, **keys))
    tracker.close("FINISHED")
    names = ("eval_loss", "gen_score/text_to_json _easy_", "gen_score/Q_A", "gen_score/日本語", "gen_score/x")
    assert [history(store, tracker.run_id, name) for name in names] == [
        [(4, value)] for value in (2.0, 0.25, 0.5, 0.75, 1.0)
    ]


def test_names_that_fall_together_stay_apart():
    """The plain one keeps its name; nothing is longer than MLflow allows or leaves the run's folder."""
    found = metric_names({"a_b", "a&b", "a(b", "../../x", "z" * 300, ""})
    assert found["a_b"] == "a_b"
    assert len(set(found.values())) == 6
    assert max(map(len, found.values())) <= 250
    assert found["../../x"] == "x"


def test_a_metric_that_is_refused_all_the_same_is_named_and_the_others_sent(store, tmp_path, monkeypatch):
    """One by one, where the server refuses the whole batch for one of them."""
    monkeypatch.setattr("sft.reporting.tracker.metric_names", lambda names: {name: name for name in names})
    said: list[str] = []
    tracker = Tracker(settings(f"sqlite:///{store}"), tmp_path / "out_stage1", run_id=None, say=said.append)
    for step in (1, 2):
        tracker.log_metrics(record(tmp_path / "out_stage1", step, eval_loss=2.0, **{"a(b": 1.0}))
    tracker.close("FINISHED")
    assert history(store, tracker.run_id, "eval_loss") == [(1, 2.0), (2, 2.0)]
    assert len(said) == 1
    assert said[0].startswith("[WARNING] MLflow refuses the metric 'a(b'; it is in ")


def runs(store: Path) -> dict[str, tuple[str, str, str | None]]:
    """run id -> name, status, parent."""
    with sqlite3.connect(store) as connection:
        tags = connection.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall()
        found = connection.execute("select run_uuid, name, status from runs").fetchall()
    return {identity: (name, status, dict(tags).get(identity)) for identity, name, status in found}


def test_stages_of_a_ladder_stand_below_one_run(store, tmp_path):
    """Named after the output folder, with a child per stage in its own experiment; another ladder has another. The
    experiments carry what MLflow's page knows training by."""
    made = {}
    for name in ("out_stage1", "out_stage2", "other_stage1"):
        where = settings(f"sqlite:///{store}", int(name[-1]))
        tracker = Tracker(where, tmp_path / name, run_id=None, say=pytest.fail)
        tracker.close("FINISHED")
        made[name] = tracker.run_id
    found = runs(store)
    parents = {name: found[identity][2] for name, identity in made.items()}
    assert [found[identity][0] for identity in made.values()] == list(made)
    assert parents["out_stage1"] == parents["out_stage2"] != parents["other_stage1"]
    assert found[parents["out_stage1"]] == ("out (ladder)", "FINISHED", None)
    kinds = [each.tags.get(KIND_TAG) for each in quiet_client(f"sqlite:///{store}").search_experiments()]
    assert kinds.count(TRAINING) == 2


def test_no_run_stays_running_after_its_process_was_killed(store, tmp_path):
    """A stage trained afresh ends the run the kill left; one looked at again has its run ended by end_run."""
    uri, folder = f"sqlite:///{store}", tmp_path / "out_stage1"
    killed = Tracker(settings(uri), folder, run_id=None, say=pytest.fail)
    assert killed.wait_for_run(60.0)
    killed.calls.put(None)  # the thread ends and nobody says that the run did
    killed.thread.join()
    other = Tracker(settings(uri), tmp_path / "out_stage2", run_id=None, say=pytest.fail)
    assert other.wait_for_run(60.0)
    again = Tracker(settings(uri), folder, run_id=None, say=pytest.fail)
    again.close("FINISHED")
    assert [runs(store)[t.run_id][1] for t in (killed, again, other)] == ["KILLED", "FINISHED", "RUNNING"]
    assert end_run(uri, other.run_id)
    assert runs(store)[other.run_id][1] == "FINISHED"
    assert end_run(uri, killed.run_id)
    assert runs(store)[killed.run_id][1] == "KILLED"
    assert not end_run(uri, "no such run")
    assert not end_run(uri, None)
    other.close("FINISHED")


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_gpu_s_figures_are_recorded(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """nvidia-ml-py is declared, so that MLflow finds NVIDIA's library: utilisation, memory and power are the run's."""
    import pynvml

    answers = {
        "nvmlInit": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "card",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=20e9, total=80e9),
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=93),
        "nvmlDeviceGetPowerUsage": 350_000,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *handle, answer=answer: answer)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracker = Tracker(settings(f"sqlite:///{store}"), tmp_path, run_id=None, say=print)
    run_id = tracker.wait_for_run(60.0)
    assert run_id
    end = time.monotonic() + 60
    while time.monotonic() < end and not history(store, run_id, "system/gpu_0_power_usage_percentage"):
        time.sleep(0.1)
    tracker.close("FINISHED")
    expected = {"utilization_percentage": 93, "memory_usage_percentage": 25, "power_usage_watts": 350}
    found = {name: history(store, run_id, f"system/gpu_0_{name}")[0][1] for name in expected}
    assert found == expected

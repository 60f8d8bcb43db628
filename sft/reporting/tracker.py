"""MLflow, in a thread of its own: whatever the tracking server does, training neither stops nor waits for it."""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.environment import restored_variable
from sft.errors import first_line, hide_secrets
from sft.stages import paths
from sft.storage import json_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from sft.settings import Settings
    from sft.settings.values import SourceRecord

# MLflow's own limits (mlflow/utils/validation.py); longer values are cut, the manifest artifact has them whole.
VALUE_LIMIT = 500
BATCH_LIMIT = 100
# A silent server holds up one request this long, and the end of a run at most CLOSING seconds.
REQUEST_SECONDS = "10"
CLOSING_SECONDS = 20.0
# After a failure the server is left alone this long; what came meanwhile waits.
RETRY_SECONDS = 30.0
# MLflow's import would take turns with the start of training, second for second; a slow first step is not waited for.
FIRST_STEP_SECONDS = 30.0
MOST_TRIES = 3  # of one call while the server answers: then it is refused, and would hold up the others for ever
# A record is of one kind; kind and step tell whether a server has it.
KINDS = ("loss", "eval_loss", "gen_score")
NAME_LIMIT = 250
# Which folder a run belongs to: a digest, as a path may hold quotes that a search of MLflow can't.
FOLDER_TAG, LADDER_TAG = "sft.folder", "sft.ladder"
# Without it MLflow's page (3.17) opens an experiment on traces of agents: "Traces 0, no data".
KIND_TAG, TRAINING = "mlflow.experimentKind", "custom_model_development"
# What the page shows as a run's description.
NOTE_TAG = "mlflow.note.content"
Call = Callable[["MlflowClient"], None]


def artifact_location(uri: str) -> str | None:
    """Beside a sqlite database for its artifacts; None leaves it to a server."""
    if not uri.startswith("sqlite:///"):
        return None
    folder = Path(uri.removeprefix("sqlite:///")).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "artifacts").as_uri()


def digest_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]


def metric_names(names: Iterable[str]) -> dict[str, str]:
    """name -> what MLflow takes for it: other characters become `_`, and two that fall together get a digest."""
    found: dict[str, str] = {}
    for name in sorted(names):
        clean = posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("./")[:NAME_LIMIT] or "_"
        if clean != name and (clean in names or clean in found.values()):
            clean = f"{clean[: NAME_LIMIT - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        found[name] = clean
    return found


def quiet_client(uri: str) -> MlflowClient:
    """A client that waits for a silent server no longer than it must, and whose package keeps its logs to itself."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_SECONDS)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient, set_tracking_uri
    from mlflow.system_metrics import system_metrics_monitor

    # MLflow sets its loggers up when it is imported.
    for name in ("mlflow", "alembic", "sqlalchemy", "urllib3", system_metrics_monitor.__name__):
        logging.getLogger(name).setLevel(logging.ERROR)
    artifact_location(uri)  # a sqlite database wants its folder
    # MLflow writes it into the environment as well, where the next stage of this process would find it as a setting.
    with restored_variable("MLFLOW_TRACKING_URI"):
        set_tracking_uri(uri)
    return MlflowClient(uri)


def end_run(uri: str, run_id: str | None, *, status: str = "FINISHED") -> bool:
    """Ends a run that a killed process left RUNNING; False where the store does not have it or can't be reached.

    For a stage that is looked at again without being trained: one that goes on ends its run itself.
    """
    from mlflow.exceptions import MlflowException

    if not run_id:
        return False
    try:
        client = quiet_client(uri)
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status)
    except MlflowException:
        return False
    return True


class Tracker:
    """One MLflow run per stage, continued on resume, below a run that stands for its ladder.

    Calls are queued and made by a thread, in order; one that fails is tried again later, so a server may come late or
    be away for a while. The first failure is said. Metrics are in metrics.jsonl in any case: what a server missed
    for good is sent by the next start that resumes the stage.
    """

    def __init__(self, settings: Settings, folder: Path, *, run_id: str | None, say: Callable[[str], None]) -> None:
        self.settings, self.folder, self.say = settings, folder, say
        self.run_id: str = run_id or ""
        self.warned = False
        self.lost = self.tries = 0
        self.sent: set[tuple[str, int]] = set()
        self.refused: set[str] = set()
        self.monitor: Any = None
        self.started = threading.Event()
        self.begun = threading.Event()
        self.client: MlflowClient | None = None
        self.calls: queue.Queue[Call | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self.calls.put(self._send_missing)
        self.thread.start()

    # Called by the run

    def log_parameters(self, values: dict[str, Any]) -> None:
        from_settings = {name: str(value)[:VALUE_LIMIT] for name, value in values.items()}
        self.calls.put(lambda client: self._send_parameters(client, from_settings))

    def log_tags(self, tags: dict[str, str]) -> None:
        self.calls.put(lambda client: self._send_tags(client, tags))

    def log_sources(self, sources: list[SourceRecord]) -> None:
        """The stage's sources (manifest records) as the run's data sets, each with its fingerprint as digest."""
        self.calls.put(lambda client: self._send_sources(client, sources))

    def log_metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self.begun.set()
        self.calls.put(lambda client: self._send_metrics(client, record))

    def log_artifact(self, path: Path) -> None:
        self.calls.put(lambda client: client.log_artifact(self.run_id, str(path)) if path.exists() else None)

    def log_table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Rows of equal keys as a table that the MLflow page shows."""
        columns = {key: [row.get(key) for row in rows] for key in rows[0]} if rows else {}
        self.calls.put(lambda client: client.log_table(self.run_id, columns, name))

    def wait_for_run(self, seconds: float) -> str | None:
        """The run's id as soon as it is known, None when the server does not answer in time."""
        self.begun.set()
        self.started.wait(seconds)
        return self.run_id or None

    def close(self, status: str) -> None:
        """Sends what is left and ends the run; gives up after CLOSING_SECONDS. Status: FINISHED, FAILED, KILLED."""
        self.begun.set()
        self.calls.put(self._send_missing)
        self.calls.put(lambda client: client.set_terminated(self.run_id, status))
        self.calls.put(None)
        self.thread.join(CLOSING_SECONDS)
        if self.thread.is_alive() or self.lost:
            later = "" if status == "FINISHED" else " and are sent when the stage goes on"
            self.say(
                "[WARNING] MLflow did not take everything in time; all metrics are in "
                f"{self.folder / paths.METRICS}{later}"
            )

    # In the thread

    def _work(self) -> None:
        waiting: deque[Call] = deque()
        retry_at = 0.0
        self.begun.wait(FIRST_STEP_SECONDS)
        while (call := self.calls.get()) is not None:
            waiting.append(call)
            if time.monotonic() >= retry_at and not self._send(waiting):
                retry_at = time.monotonic() + RETRY_SECONDS
        for call in waiting:
            self.lost += not self._succeeds(call)
            if self.client is None:  # nobody there: the rest would only take its time
                break
        if self.monitor is not None:
            self.monitor.finish()

    def _send(self, waiting: deque[Call]) -> bool:
        """Makes the calls in order; False at the first that fails. One that is refused again and again is given up."""
        while waiting:
            if not self._succeeds(waiting[0]):
                self.tries += 1
                if self.tries >= MOST_TRIES and self.client is not None:
                    waiting.popleft()
                    self.lost, self.tries = self.lost + 1, 0
                return False
            waiting.popleft()
            self.tries = 0
        return True

    def _succeeds(self, call: Call) -> bool:
        # Only the end of the command line catches as broadly: MLflow raises whatever its database, HTTP and file
        # layers raise, and none of it may reach training.
        try:
            if self.client is None:
                self.client = self._open()
            self.started.set()
            call(self.client)
        except Exception as error:
            if not self.warned:
                reason = first_line(error)[:300]
                self.say(f"[WARNING] MLflow tracking failed ({hide_secrets(reason)}); training goes on")
            self.warned = True
            return False
        return True

    def _open(self) -> MlflowClient:
        client = quiet_client(self.settings.mlflow_tracking_uri)
        self.run_id = self._continued(client) or self._created(client)
        self._start_monitor()
        return client

    def _continued(self, client: MlflowClient) -> str | None:
        """The run of an earlier start of this stage, if the store still has it; finds out what was sent already."""
        from mlflow.exceptions import MlflowException

        if not self.run_id:
            return None
        try:
            client.update_run(self.run_id, status="RUNNING")
        except MlflowException:
            return None
        for name in KINDS:
            self.sent |= {(name, metric.step) for metric in client.get_metric_history(self.run_id, name)}
        return self.run_id

    def _created(self, client: MlflowClient) -> str:
        """A run of its own, named after the folder, below the ladder's; one that a kill left running here is ended."""
        name = self.settings.mlflow_experiment_name
        experiment = client.get_experiment_by_name(name)
        location = artifact_location(self.settings.mlflow_tracking_uri)
        number = experiment.experiment_id if experiment else client.create_experiment(name, artifact_location=location)
        if not experiment or KIND_TAG not in experiment.tags:
            client.set_experiment_tag(number, KIND_TAG, TRAINING)
        mine = digest_of(self.folder)
        # Whoever trains into this folder holds its lock, so that nobody else's run of it is alive.
        for run in client.search_runs([number], f"tags.`{FOLDER_TAG}` = '{mine}' and attributes.status = 'RUNNING'"):
            client.set_terminated(run.info.run_id, "KILLED")
        tags = {FOLDER_TAG: mine, "mlflow.parentRunId": self._ladder_run(client, number)}
        return client.create_run(number, run_name=self.settings.run_name or self.folder.name, tags=tags).info.run_id

    def _ladder_run(self, client: MlflowClient, experiment: str) -> str:
        """The run that all stages of a ladder stand below; `experiment`: where it is made by the first of them.

        Each stage has an experiment of its own; the page that shows several lists them below this run all the same.
        """
        path = self.folder.with_name(re.sub(r"_stage\d+$", "", paths.stage_name(self.folder)))
        tags = {LADDER_TAG: digest_of(path)}
        ours = client.search_experiments(filter_string=f"tags.`{KIND_TAG}` = '{TRAINING}'")
        everywhere = [each.experiment_id for each in ours]
        found = client.search_runs(everywhere, f"tags.`{LADDER_TAG}` = '{tags[LADDER_TAG]}'", max_results=1)
        run = found[0] if found else client.create_run(experiment, run_name=f"{path.name} (ladder)", tags=tags)
        if not found:
            client.set_terminated(run.info.run_id, "FINISHED")  # it holds runs and does nothing itself
        return run.info.run_id

    def _start_monitor(self) -> None:
        """GPU, CPU, memory and disk figures every ten seconds, by MLflow itself."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.monitor = SystemMetricsMonitor(self.run_id, resume_logging=bool(self.sent))
        self.monitor.start()

    def _send_parameters(self, client: MlflowClient, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        known = client.get_run(self.run_id).data.params
        fresh = [Param(name, value) for name, value in values.items() if name not in known]
        for start in range(0, len(fresh), BATCH_LIMIT):
            client.log_batch(self.run_id, params=fresh[start : start + BATCH_LIMIT])

    def _send_tags(self, client: MlflowClient, tags: dict[str, str]) -> None:
        for name, value in tags.items():
            client.set_tag(self.run_id, name, value[:5000])

    def _send_sources(self, client: MlflowClient, sources: list[SourceRecord]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        inputs = []
        for source in sources:
            kind, _, digest = (source.fingerprint or "unknown").partition(":")
            about = {"uri": source.id, "split": source.split, "weight": source.weight}
            name = Path(source.id).name
            inputs.append(
                DatasetInput(Dataset(name, (digest or kind)[:36], kind, json_files.json_text(about, indent=None)))
            )
        client.log_inputs(self.run_id, inputs)

    def _send_missing(self, client: MlflowClient) -> None:
        """What is in metrics.jsonl and not on the server: sent by an earlier start in vain, or refused in this one."""
        for record in json_files.read_records(self.folder / paths.METRICS):
            self._send_metrics(client, record)

    def _send_metrics(self, client: MlflowClient, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        step = record["step"]
        key = (next((kind for kind in KINDS if kind in record), ""), step)
        if key in self.sent:
            return
        stamp = int(record.get("time", time.time()) * 1000)
        # An evaluation may fall on a step that was logged already, with the same epoch.
        left_out = {"step", "time"} if "loss" in record else {"step", "time", "epoch"}
        numbers = {k: v for k, v in record.items() if k not in left_out and isinstance(v, int | float)}
        names = metric_names(numbers)
        metrics = [Metric(names[name], float(value), stamp, step) for name, value in numbers.items()]
        for start in range(0, len(metrics), 500):
            self._send_batch(client, metrics[start : start + 500])
        self.sent.add(key)

    def _send_batch(self, client: MlflowClient, metrics: list[Metric]) -> None:
        """All metrics together, or one by one where one of them is refused: the others are not lost with it."""
        from mlflow.exceptions import MlflowException

        try:
            client.log_batch(self.run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            for metric in metrics:
                self._send_one(client, metric)

    def _send_one(self, client: MlflowClient, metric: Metric) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.log_batch(self.run_id, metrics=[metric])
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if metric.key not in self.refused:
                self.say(f"[WARNING] MLflow refuses the metric {metric.key!r}; it is in {self.folder / paths.METRICS}")
            self.refused.add(metric.key)

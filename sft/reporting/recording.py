"""What a run leaves for people to follow it: MLflow's run, metrics.jsonl, answers shown before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from sft.distributed import ranks
from sft.distributed.ranks import say
from sft.distributed.signals import STOP, Stopped
from sft.errors import hide_secrets
from sft.evaluation.generation_evaluation import show_samples
from sft.reporting.tracker import Tracker
from sft.stages import paths
from sft.storage import json_files

if TYPE_CHECKING:
    from sft.data.mixture import Mix
    from sft.stages.stage import Stage


@contextmanager
def tracked(stage: Stage, mix: Mix) -> Iterator[Tracker | None]:
    """The stage's MLflow run around training, on the main process alone. Ended by what ended the block."""
    settings = stage.settings
    tracker = start_tracking(stage, mix) if PartialState().is_main_process and "mlflow" in settings.report_to else None
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        if tracker:
            tracker.close(status)
            if not tracker.lost and not tracker.thread.is_alive():
                (stage.folder / paths.OPEN_RUN).unlink(missing_ok=True)
        if status == "KILLED" and STOP.agreed:
            ranks.leave()


def start_tracking(stage: Stage, mix: Mix) -> Tracker:
    """The stage's MLflow run with its parameters and tags."""
    settings = stage.settings
    known = stage.manifest.mlflow_run_id
    json_files.write_json(stage.folder / paths.OPEN_RUN, {"uri": settings.mlflow_tracking_uri, "run_id": known})
    tracker = Tracker(settings, stage.folder, run_id=known, say=say)
    values = {name: record["value"] for name, record in settings.record().items()}
    tracker.log_parameters(values | {"train_rows": len(mix.train), "val_rows": len(mix.val)})
    tracker.log_tags({"ladder": str(settings.out_lora_dir), "stage": str(stage.number)} | lineage_tags(stage))
    tracker.log_sources(stage.manifest.sources)
    return tracker


def lineage_tags(stage: Stage) -> dict[str, str]:
    """What a stage is made from, by digest: a run can be found by the data or the adapter behind it."""
    tags = {"lineage.base_model": hide_secrets(str(stage.settings.base_model))}
    for parent in stage.parents:
        tags[f"lineage.parent.stage_{parent.stage}"] = parent.adapter_sha256
    for number, source in enumerate(stage.manifest.sources, 1):
        tags[f"lineage.dataset.{number}"] = f"{hide_secrets(source.id)} {source.fingerprint or 'unknown'}"
    return tags


class RunRecord:
    """What training hands out: every logged metric (a line in metrics.jsonl, and the same to MLflow) and the answers of
    every evaluation (the first ones shown before and after training, all of them in MLflow's table)."""

    def __init__(self, stage: Stage, tracker: Tracker | None) -> None:
        self.stage, self.tracker = stage, tracker

    def metrics(self, record: dict[str, Any]) -> None:
        json_files.append_line(self.stage.folder / paths.METRICS, json_files.json_text(record, indent=None))
        if self.tracker:
            self.tracker.log_metrics(record)
            if self.tracker.run_id and self.stage.manifest.mlflow_run_id != self.tracker.run_id:
                self.stage.update(mlflow_run_id=self.tracker.run_id)  # a killed run goes on in the same one

    def samples(self, samples: list[dict[str, Any]], *, step: int, steps: int) -> None:
        """`step` of `steps`."""
        if step == 0 or step >= steps:
            when = "before training" if step == 0 else "after training"
            count = self.stage.settings.num_generate_samples
            show_samples(samples, count, f"Sample answers of stage {self.stage.number} {when}")
        if self.tracker:
            rows = [
                {"step": step, "task": s["task"], "asked": s["prompt"][-1]["content"]}
                | {name: s.get(name) for name in ("answer", "reference", "score")}
                for s in samples
            ]
            self.tracker.log_table(rows, "gen_samples.json")

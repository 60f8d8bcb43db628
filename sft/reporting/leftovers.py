"""What a stage that is complete may lack when it is looked at again. Imports nothing until something is to be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft.distributed.launch import launched
from sft.stages import paths
from sft.stages.safety_copy import copy_finished
from sft.storage.json_files import read_object

if TYPE_CHECKING:
    from sft.stages.stage import Stage


def look_after(stage: Stage) -> None:
    """What a kill just after the end of a stage left undone: its report, and an MLflow run that never ended."""
    if launched().rank > 0:
        return
    if not (stage.folder / paths.REPORT).is_file() or not (stage.folder / paths.REPORT_FACTS).is_file():
        from sft.reporting.report import write_report

        write_report(stage.folder, stage.settings.report_language)
    copy_finished(stage)
    left_open = stage.folder / paths.OPEN_RUN
    if left_open.is_file():
        from sft.reporting.tracker import end_run

        record = read_object(left_open, [])
        if end_run(str(record.get("uri")), record.get("run_id") or stage.manifest.mlflow_run_id):
            left_open.unlink(missing_ok=True)

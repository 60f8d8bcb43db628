"""What a person reads when a stage or a ladder is done: figures, where things are, how to look at them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.report import forgetting_table, score_table, write_ladder_report, write_report
from sft.settings import launched

if TYPE_CHECKING:
    from sft.settings import Settings
    from sft.stages import Stage
    from sft.tracking import Tracker


def close_stage(stage: Stage, tracker: Tracker | None) -> None:
    """Writes the report of a completed stage, sends it to MLflow and prints the summary."""
    report = write_report(stage.folder)
    manifest = stage.manifest
    if tracker:
        for path in (stage.folder / "stage.json", report, stage.folder / "report.json"):
            tracker.log_artifact(path)
    metrics = manifest["metrics"]
    figures = [f"{manifest['steps']} steps", f"{manifest['metrics'].get('tokens', 0):,} tokens"]
    shown = {"loss": "loss", "eval_loss": "eval loss", "gen_score": "gen_score"}
    figures += [f"{text} {metrics[name]:.4f}" for name, text in shown.items() if metrics.get(name) is not None]
    print(f"\nStage {stage.number} is complete: {', '.join(figures)}")
    if table := forgetting_table(manifest):
        print(f"\nForgetting matrix (gen_score; rows: models, columns: each stage's validation rows)\n{table}")
    print(f"\n  adapter  {stage.folder}\n  best     {stage.folder / 'best_model'}\n  report   {report}\n")


def stage_folders(ladder: Sequence[Settings]) -> list[Path]:
    return [Path(f"{settings.out_lora_dir}_stage{settings.stage}") for settings in ladder]


def close_ladder(ladder: Sequence[Settings]) -> None:
    """Writes the report that compares the stages and prints score table, report and how to open MLflow."""
    if launched().rank > 0:
        return
    folders = [folder for folder in stage_folders(ladder) if (folder / "stage.json").is_file()]
    report = write_ladder_report(folders, Path(f"{ladder[-1].out_lora_dir}_report.html"))
    if table := score_table(folders):
        print(f"\nScores of base model and stages (gen_score, 0 to 1, on rows never trained on)\n{table}\n")
    print(f"Report: {report}\nMLflow: official_content/mlflow_ui.sh   (then open http://127.0.0.1:58000)")

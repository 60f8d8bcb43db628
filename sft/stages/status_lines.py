"""What is said about an output folder when a run looks at it (contract section 6)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sft.stages.checkpoints import trainer_state

if TYPE_CHECKING:
    from sft.stages.stage import Stage


def announce(stage: "Stage", show: Callable[[str], object] = print) -> None:
    """Say what was found, warnings first, in the words that scripts look for (contract section 6)."""
    for line in status_lines(stage):
        show(line)


def status_lines(stage: "Stage") -> list[str]:
    """The lines of `announce`."""
    lines = [*stage.warnings, "Checking checkpoint status..."]
    if stage.verdict.broken:
        lines += ["Invalid checkpoint state found. Please check manually.", f"Checkpoint directory: {stage.folder}"]
        lines += [f"{place.name} is damaged: {'; '.join(faults[:3])}" for place, faults in stage.verdict.broken]
    target = float(stage.settings.epochs)
    if stage.decision == "complete":
        return lines + _training_status(stage, target) + _completed_lines(stage, target)
    if stage.checkpoint:
        return lines + _training_status(stage, target)
    if stage.verdict.existed:
        lines += ["Checkpoint directory exists but no checkpoints found.", "Continuing with training..."]
    return lines


def _epoch(stage: "Stage") -> float:
    recorded = stage.manifest.metrics.get("epoch") if stage.decision == "complete" else None
    epoch = trainer_state(stage.checkpoint).get("epoch") if stage.checkpoint and recorded is None else recorded
    return round(float(epoch), 2) if isinstance(epoch, int | float) else float(stage.settings.epochs)


def _training_status(stage: "Stage", target: float) -> list[str]:
    if not stage.checkpoint:
        return []
    return [
        f"Found latest checkpoint: {stage.checkpoint.name}",
        "Current training status:",
        f"Current epoch: {_epoch(stage)}",
        f"Target epochs: {target}",
        *_steps_decide(stage),
    ]


def _steps_decide(stage: "Stage") -> list[str]:
    """The lines with epochs are an interface; where SFT_MAX_STEPS wins over them, one more says so."""
    steps = stage.settings.max_steps
    return [f"SFT_MAX_STEPS={steps} decides when it ends, not the epochs"] if steps >= 0 else []


def _completed_lines(stage: "Stage", target: float) -> list[str]:
    line = "=" * 50
    return [
        line,
        "IMPORTANT NOTICE:",
        f"Training has already been completed at epoch {_epoch(stage)}!",
        f"Target epochs was {target}",
        *_steps_decide(stage),
        f"Trained model is available at: {stage.folder}",
        line,
    ]

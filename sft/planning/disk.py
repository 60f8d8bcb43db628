"""Whether the disk has room for what a stage will write, asked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.distributed.launch import launched
from sft.errors import Problems
from sft.models.model import load_config
from sft.planning.memory import optimizer_bytes, parameter_bytes
from sft.stages import paths
from sft.storage import atomic

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sft.stages.stage import Stage

# Counters, random states, metrics, samples, tokenizer and report, in each folder that is written.
SMALL_FILES = 256 * 1024


def needed_bytes(stage: Stage, config: PretrainedConfig) -> dict[str, int]:
    """What the stage will add to the disk at its fullest moment, by kind, less what it replaces of its own.

    One checkpoint more than are kept, since the oldest goes when the newest is whole; the best model twice for the same
    reason. The merged base only where the base is local; the merge itself looks again, exactly.
    """
    settings = stage.settings
    parameters = parameter_bytes(config, settings)
    weights = parameters.trained + SMALL_FILES
    state = weights + optimizer_bytes(parameters, settings, launched())
    # Only a run that goes on replaces what is there: --fresh keeps the old output aside.
    own = [stage.folder] if stage.decision == "resume" else []
    checkpoints = (settings.save_total_limit + 1) * state
    checkpoints -= sum(bytes_of(folder.glob("checkpoint-*/**/*")) for folder in own)
    best = 2 * weights - sum(bytes_of((folder / paths.BEST_MODEL).glob("*")) for folder in own)
    needed = {"checkpoints": max(checkpoints, 0), "best model": max(best, 0), "result": weights}
    if stage.adapters and not (stage.merged_base / paths.MERGE_RECORD).exists():
        needed["merged base"] = bytes_of(Path(stage.start_model).glob("*.safetensors"))
    return needed


def require_space(stage: Stage) -> None:
    """Compares `needed_bytes` with what is free.

    Raises:
        Problems: it does not fit.
    """
    if not stage.main_process:
        return
    needed = needed_bytes(stage, load_config(stage.settings))
    free, total = atomic.free_bytes(stage.folder), sum(needed.values())
    if total <= free:
        return
    parts = ", ".join(f"{kind} {readable(size)}" for kind, size in needed.items() if size)
    raise Problems(
        [
            f"SFT_OUT_LORA_DIR={stage.settings.out_lora_dir}: stage {stage.number} will write up to {readable(total)} "
            f"({parts}) and {readable(free)} are free; free some space, keep fewer checkpoints "
            f"(SFT_SAVE_TOTAL_LIMIT={stage.settings.save_total_limit}), or choose a place with more room"
        ]
    )


def require_space_for_all(stages: Sequence[Stage]) -> None:
    """The same for the variants of a stage, which are all kept and share one merged base; those that are complete need
    nothing more.

    Raises:
        Problems: they do not fit together.
    """
    waiting = [stage for stage in stages if stage.decision != "complete" and stage.main_process]
    needed = [needed_bytes(stage, load_config(stage.settings)) for stage in waiting]
    merged = max((each.pop("merged base", 0) for each in needed), default=0)
    total = sum(sum(each.values()) for each in needed) + merged
    if not waiting or total <= (free := atomic.free_bytes(waiting[0].folder)):
        return
    fitting = int((free - merged) * len(waiting) // max(total - merged, 1))
    raise Problems(
        [
            f"--try: {len(waiting)} variants will write up to {readable(total)} and {readable(free)} are free, enough "
            f"for {max(fitting, 0)}; try fewer values, drop old variants (--drop-tries NAME), keep fewer checkpoints "
            f"(SFT_SAVE_TOTAL_LIMIT={waiting[0].settings.save_total_limit}), or free some space"
        ]
    )


def bytes_of(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file())


def readable(size: int) -> str:
    """1.5 GB, 20 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):.1f} MB"

"""Whether the disk has room for what a stage will write, asked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sft.distributed.launch import launched
from sft.errors import Problems
from sft.merging.weights import read_header, shard_paths
from sft.models.model import load_config
from sft.planning.memory import optimizer_bytes, parameter_bytes
from sft.stages import paths
from sft.storage import atomic

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sft.settings import Settings
    from sft.stages.stage import Stage

# Counters, random states, metrics, samples and report, in each folder that is written.
SMALL_FILES = 256 * 1024


def needed_bytes(stage: Stage, config: PretrainedConfig) -> dict[str, int]:
    """What the stage will add to the disk at its fullest moment, by kind, less what it replaces of its own.

    Checkpoints: one more than are kept, since the oldest goes when the newest is whole. The best model twice for the
    same reason. The merged base only where base and adapters are local; the merge itself looks again, exactly.
    """
    settings = stage.settings
    parameters = parameter_bytes(config, settings)
    side = SMALL_FILES + bytes_of(tokenizer_files(stage.start_model))
    checkpoint = parameters.trained + optimizer_bytes(parameters, settings, launched()) + side
    needed = {
        "checkpoints": (settings.save_total_limit + 1) * checkpoint,
        "best model": 2 * (parameters.trained + side),
        "result": parameters.trained + side,
    }
    there = {
        "checkpoints": bytes_in(stage.folder.glob("checkpoint-*")),
        "best model": bytes_in([stage.folder / paths.BEST_MODEL]),
        "result": 0,
    }
    if stage.adapters and not (stage.merged_base / paths.MERGE_RECORD).exists():
        needed["merged base"] = merged_bytes(Path(stage.start_model), settings)
    return {kind: max(size - there.get(kind, 0), 0) for kind, size in needed.items()}


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


def merged_bytes(base: Path, settings: Settings) -> int:
    """Of the merged weights, where the base is a local folder; else 0."""
    weights = bytes_of(base.glob("*.safetensors")) if base.is_dir() else 0
    if weights and settings.merge_dtype:
        width = getattr(torch, settings.merge_dtype).itemsize
        return sum(width * tensor.elements for path in shard_paths(base) for tensor in read_header(path))
    return weights


def tokenizer_files(model: str) -> list[Path]:
    """Of a local model; they go into every checkpoint."""
    names = ("tokenizer*", "*.model", "vocab*", "merges.txt", "*.jinja")
    return [path for name in names for path in Path(model).glob(name)] if Path(model).is_dir() else []


def bytes_of(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def bytes_in(folders: Iterable[Path]) -> int:
    return sum(bytes_of(folder.rglob("*")) for folder in folders)


def readable(size: int) -> str:
    """1.5 GB, 20 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):.1f} MB"

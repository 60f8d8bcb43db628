"""What a stage leaves behind: the adapter, the best model, the configuration, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.distributed import ranks
from sft.errors import hide_secrets
from sft.stages import paths
from sft.storage import atomic, json_files, seals

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sft.settings import Settings

# Where the ranks write before a folder gets its name.
STAGING = ".saving"
# A pickle that the Trainer adds and nothing reads, and peft's model card (the report says more).
UNWANTED = ("training_args.bin", "README.md")


@contextmanager
def published_together(target: Path, *, main: bool, sealed: bool = False) -> Iterator[Path]:
    """A folder that all ranks fill and that appears at `target` when all are done (`atomic.published_folder` is for one
    process alone). `sealed` adds checksums, by which damage is noticed before use.
    """
    staging = target.parent / STAGING / target.name
    if main:
        shutil.rmtree(staging.parent, ignore_errors=True)  # also what a killed process left there
        staging.mkdir(parents=True)
    ranks.wait(f"the folder for {target.name}", hours=1)
    try:
        yield staging
        ranks.wait(f"all processes to write {target.name}", hours=1)
        if main:
            _publish(staging, target, sealed=sealed)
    finally:
        if main:  # on a full disk what was half written makes room again
            shutil.rmtree(staging.parent, ignore_errors=True)
    ranks.wait(f"the main process to publish {target.name}", hours=1)


def _publish(staging: Path, target: Path, *, sealed: bool) -> None:
    with atomic.published_folder(target) as folder:
        for path in staging.iterdir():
            if path.name not in UNWANTED:
                path.rename(folder / path.name)
        if sealed:
            # All ranks wait meanwhile: sha256 takes a minute for the 62 GB of a 235B model with adapted experts.
            seals.seal(folder, digest="xxh3")


def training_config(settings: Settings, args: TrainingArguments, model: torch.nn.Module) -> dict[str, Any]:
    """training_config.json: model_name, training_args, lora_config, bnb_config; tokens and credentials left out.

    `model`: unwrapped.
    """
    adapter = getattr(model, "peft_config", {}).get("default")
    arguments = {name: value for name, value in args.to_dict().items() if "token" not in name or "num" in name}
    config = {
        "model_name": settings.base_model,
        "training_args": arguments,
        "lora_config": adapter.to_dict() if adapter else None,
        "bnb_config": {
            "load_in_4bit": settings.load_in_4bit,
            "load_in_8bit": settings.load_in_8bit,
            "bnb_4bit_use_double_quant": settings.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_type": settings.bnb_4bit_quant_type,
            "bnb_4bit_compute_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
    }
    return json_files.plain(config, hide_secrets)


def best_model_record(metrics: dict[str, float], name: str, value: float, step: int) -> dict[str, Any]:
    """best_model_info.json."""
    return {
        "best_metric": value,
        "best_metric_name": name,
        "best_model_checkpoint": paths.checkpoint_name(step),
        "best_perplexity": metrics.get("eval_perplexity"),
        "step": step,
    }


def write_result(folder: Path, save_model: Callable[..., None], config: dict[str, Any], *, main: bool) -> None:
    """Puts the final adapter (or model), tokenizer and `config` into `folder`, each file whole; all ranks call it
    together. `save_model`: the trainer's."""
    result = folder / ".result"
    with published_together(result, main=main) as aside:
        save_model(str(aside), _internal_call=True)
    if main:
        # The weights come last: whoever finds them finds the rest as well.
        for path in sorted(result.iterdir(), key=lambda p: p.suffix == ".safetensors"):
            path.replace(folder / path.name)
        result.rmdir()
        json_files.write_json(folder / paths.TRAINING_CONFIG, config)
        atomic.sync(folder)


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trained, all) parameters."""
    sizes = [(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel, p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

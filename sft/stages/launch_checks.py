"""How a run was launched against what settings and checkpoint say: what contradicts is named at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.distributed.launch import launched
from sft.settings import Settings
from sft.stages.checkpoints import saved_under

if TYPE_CHECKING:
    from sft.stages.stage import Stage

_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
# What each number in DeepSpeed's file is called among the settings.
_DEEPSPEED_SETTINGS = {
    "gradient_accumulation_steps": "SFT_GRAD_ACCUM",
    "train_micro_batch_size_per_gpu": "SFT_PER_DEVICE_TRAIN_BS",
    "gradient_clipping": "SFT_MAX_GRAD_NORM",
    "optimizer.params.lr": "SFT_LR",
    "optimizer.params.eps": "SFT_ADAM_EPSILON",
    "optimizer.params.weight_decay": "SFT_WEIGHT_DECAY",
}
_ACCELERATE_DEEPSPEED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}


def launch_problems(settings: Settings, environ: Mapping[str, str] | None = None) -> list[str]:
    """Everything about how this process was launched that contradicts the settings or cannot work, with remedies."""
    environ = os.environ if environ is None else environ
    launch = launched(environ)
    found = [*_precision_problems(settings, environ)]
    if launch.deepspeed and find_spec("deepspeed") is None:
        remedy = "make install-deepspeed (pip install deepspeed), or ddp.yaml"
        found.append(f"DeepSpeed is not installed, which this launch file needs: {remedy}")
    if launch.deepspeed:
        found += _deepspeed_problems(settings, deepspeed_values(environ), launch.processes)
    if launch.sharding in ("zero3", "fsdp"):
        found += _quantised_problems(settings, "DeepSpeed ZeRO-3" if launch.sharding == "zero3" else "FSDP")
    return found


def resume_problems(stage: Stage) -> list[str]:
    """What keeps this run from going on from its checkpoint: split optimizer state fits the same processes only."""
    if stage.decision != "resume" or stage.checkpoint is None:
        return []
    launch, saved = launched(), saved_under(stage.checkpoint)
    here = ""
    if launch.deepspeed:
        here = f"DeepSpeed ZeRO-{3 if launch.sharding == 'zero3' else 2} with {launch.processes} processes"
    elif launch.sharding == "fsdp":
        here = "FSDP" if saved else ""  # without GPUs it is plain data parallel
    if saved == here:
        return []
    plain = "one process or plain data parallel"
    what = f"{stage.checkpoint}: was saved under {saved or plain}, this run is {here or plain}"
    again = f"{stage.settings.command('--fresh')} moves it aside and trains again"
    return [f"{what}; the optimizer's state does not fit: launch as before, or {again}"]


def deepspeed_values(environ: Mapping[str, str]) -> dict[str, Any]:
    """What DeepSpeed's file says, or accelerate's launch file where there is none; {} without either."""
    path = Path(environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    if path.is_file():
        # accelerate takes 1 where the file does not name it, whatever the settings say.
        return {"gradient_accumulation_steps": 1} | json.loads(path.read_text(encoding="utf-8"))
    return {key: _number(environ[name]) for name, key in _ACCELERATE_DEEPSPEED.items() if name in environ}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _precision_problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    said = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if said == "no" or settings.dtype in (_PRECISIONS.get(said), "auto" if said == "bf16" else None):
        return
    yield (
        f"SFT_DTYPE={settings.dtype}: the launch file says mixed_precision: {said}; leave that line (or "
        "--mixed_precision) out, the stage file decides"
    )


def _value(values: Mapping[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key, "auto") if isinstance(values, Mapping) else "auto"
    return values


def _deepspeed_problems(settings: Settings, values: Mapping[str, Any], processes: int) -> Iterator[str]:
    record = settings.record()
    expected = {key: (name, record[name]["value"]) for key, name in _DEEPSPEED_SETTINGS.items()}
    whole = settings.per_device_train_bs * settings.grad_accum * processes
    expected["train_batch_size"] = ("SFT_PER_DEVICE_TRAIN_BS × SFT_GRAD_ACCUM × processes", whole)
    for key, (name, mine) in expected.items():
        said = _value(values, key)
        if said not in ("auto", mine):
            yield f'{name}={mine}: the DeepSpeed file says {key}: {said}; write "auto" there, the stage file decides'
    for short, dtype in _PRECISIONS.items():
        if _value(values, f"{short}.enabled") is True and settings.dtype not in (dtype, "auto"):
            yield f'SFT_DTYPE={settings.dtype}: the DeepSpeed file turns {short} on; write "enabled": "auto" there'
    if "scheduler" in values:
        name = f"SFT_LR_SCHEDULER={settings.lr_scheduler}"
        yield f"{name}: the DeepSpeed file has a scheduler of its own; take it out, the stage file decides"


def _quantised_problems(settings: Settings, engine: str) -> Iterator[str]:
    for name in settings.quantised:
        yield (
            f"{name}=1: {engine} cannot split quantised weights; launch with configs/accelerate/ddp.yaml or "
            f"zero2.yaml, or set {name}=0"
        )

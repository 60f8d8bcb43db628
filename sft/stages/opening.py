"""Opening a stage on one process or many; torch is imported only where there are many."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sft.distributed.launch import launched
from sft.environment import offline_unless_reachable, silence_libraries, silence_torch
from sft.errors import Problems
from sft.settings import Settings
from sft.stages.checkpoints import saved_under
from sft.stages.paths import lock_path
from sft.stages.stage import Stage


def open_stage(settings: Settings, *, fresh: bool) -> Stage:
    """The stage, held by the main process; the others look at it after the main process has decided.

    Raises:
        Problems: anything wrong with lineage, output folder or lock (said by the main process), with how the run was
            launched, or a node that does not see the output folder (said by its ranks).
    """
    silence_libraries()
    settings.export_passthrough()
    offline_unless_reachable()  # half a minute of retries for every name that only the hub could know
    if problems := launch_problems(settings):
        raise Problems(problems)
    alone = launched().processes == 1
    stage = Stage.open(settings, fresh=fresh, processes=1) if alone else _open_together(settings, fresh=fresh)
    if problems := resume_problems(stage.checkpoint if stage.decision == "resume" else None):
        stage.close()
        raise Problems(problems)
    return stage


def _open_together(settings: Settings, *, fresh: bool) -> Stage:
    silence_torch()
    from sft.distributed import ranks

    state = ranks.join_processes()
    what = f"the main process to open stage {settings.stage}"
    if state.is_main_process:
        stage = Stage.open(settings, fresh=fresh, processes=state.num_processes)
        ranks.from_main(_findings(stage), what)
    else:
        found = ranks.from_main(None, what)
        if found["holder"] is not None and not ranks.sees(Path(found["lock"]), found["holder"]):
            raise _other_storage(settings)
        stage = Stage.open(settings, main_process=False, processes=state.num_processes)
        if any(found[name] != value for name, value in _findings(stage).items() if name != "holder"):
            raise _other_storage(settings)
    # Nobody writes there before all have looked.
    ranks.wait("all processes to open the stage")
    if launched().sharding == "fsdp" and state.device.type == "cpu":
        stage.warnings.append("[WARNING] FSDP needs GPUs: without them accelerate trains plainly data parallel")
    return stage


def _findings(stage: Stage) -> dict[str, Any]:
    """What every rank must find alike, and the holder that stands in the lock file."""
    lock = lock_path(stage.folder)
    return {
        "decision": stage.decision,
        "checkpoint": stage.checkpoint.name if stage.checkpoint else None,
        "lock": str(lock),
        "holder": lock.read_text(encoding="utf-8") if stage.decision != "complete" and lock.exists() else None,
    }


def _other_storage(settings: Settings) -> Problems:
    text = (
        f"SFT_OUT_LORA_DIR={settings.out_lora_dir}: {socket.gethostname()} does not see there what the main process "
        "wrote; name a folder on storage that all nodes share"
    )
    return Problems([text], every_rank=True)


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
        found.append("DeepSpeed is not installed, which this launch file needs: make install-deepspeed, or ddp.yaml")
    if launch.deepspeed:
        found += _deepspeed_problems(settings, deepspeed_values(environ), launch.processes)
    if launch.sharding in ("zero3", "fsdp"):
        found += _quantised_problems(settings, "DeepSpeed ZeRO-3" if launch.sharding == "zero3" else "FSDP")
    return found


def resume_problems(checkpoint: Path | None) -> list[str]:
    """What keeps this run from going on from the checkpoint: split optimizer state fits the same processes only."""
    if checkpoint is None:
        return []
    launch, saved = launched(), saved_under(checkpoint)
    here = ""
    if launch.deepspeed:
        here = f"DeepSpeed ZeRO-{3 if launch.sharding == 'zero3' else 2} with {launch.processes} processes"
    elif launch.sharding == "fsdp":
        here = "FSDP" if saved else ""  # without GPUs it is plain data parallel
    if saved == here:
        return []
    plain = "one process or plain data parallel"
    what = f"{checkpoint}: was saved under {saved or plain}, this run is {here or plain}"
    return [f"{what}; the optimizer's state does not fit: launch as before, or --fresh moves it aside and starts again"]


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
    for name, quantised in (("SFT_LOAD_IN_4BIT", settings.load_in_4bit), ("SFT_LOAD_IN_8BIT", settings.load_in_8bit)):
        if quantised:
            yield (
                f"{name}=1: {engine} cannot split quantised weights; launch with configs/accelerate/ddp.yaml or "
                f"zero2.yaml, or set {name}=0"
            )

"""Opening a stage on one process or many; torch is imported only where there are many."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from sft.distributed.launch import launched
from sft.environment import offline_unless_reachable, silence_libraries, silence_torch
from sft.errors import Problems
from sft.settings import Settings
from sft.stages.launch_checks import launch_problems, resume_problems
from sft.stages.safety_copy import mirror_problems, restore
from sft.stages.stage import Stage


def quiet_start(settings: Settings) -> None:
    """Before anything of a stage is looked at: libraries quiet, their variables set, the hub left alone where it can't
    be reached, which costs half a minute of retries for every name that only it could know."""
    silence_libraries()
    settings.export_passthrough()
    offline_unless_reachable()


def open_stage(settings: Settings, *, fresh: bool) -> Stage:
    """The stage, held by the main process; the others look at it after the main process has decided.

    Raises:
        Problems: anything wrong with lineage, output folder or lock (said by the main process), with how the run was
            launched, or a node that does not see the output folder (said by its ranks).
    """
    quiet_start(settings)
    if problems := launch_problems(settings):
        raise Problems(problems)
    alone = launched().processes == 1
    stage = _restored_and_open(settings, fresh=fresh, processes=1) if alone else _open_together(settings, fresh=fresh)
    if problems := resume_problems(stage):
        stage.close()
        raise Problems(problems)
    return stage


def _restored_and_open(settings: Settings, *, fresh: bool, processes: int) -> Stage:
    if problems := mirror_problems(settings):
        raise Problems(problems)
    for sentence in restore(settings, fresh=fresh):
        print(sentence, flush=True)
    return Stage.open(settings, fresh=fresh, processes=processes)


def _open_together(settings: Settings, *, fresh: bool) -> Stage:
    silence_torch()
    from sft.distributed import ranks

    state = ranks.join_processes()
    what = f"the main process to open stage {settings.stage}"
    if state.is_main_process:
        stage = _restored_and_open(settings, fresh=fresh, processes=state.num_processes)
        ranks.from_main(_findings(stage), what)
    else:
        found = ranks.from_main(None, what)
        if found["holder"] is not None and not ranks.sees(Path(found["lock"]), found["holder"]):
            raise _other_storage(settings)
        damaged = found["damaged"]
        stage = Stage.open(settings, main_process=False, processes=state.num_processes, damaged=damaged)
        if any(found[name] != value for name, value in _findings(stage).items() if name not in ("holder", "damaged")):
            raise _other_storage(settings)
    # Nobody writes there before all have looked.
    ranks.wait("all processes to open the stage")
    if launched().sharding == "fsdp" and state.device.type == "cpu":
        stage.warnings.append("[WARNING] FSDP needs GPUs: without them accelerate trains plainly data parallel")
    return stage


def _findings(stage: Stage) -> dict[str, Any]:
    """What every rank must find alike, the holder that stands in the lock file, and the damaged checkpoints."""
    lock = stage.lock_path
    return {
        "decision": stage.decision,
        "checkpoint": stage.checkpoint.name if stage.checkpoint else None,
        "damaged": [folder.name for folder, _ in stage.verdict.broken],
        "lock": str(lock),
        "holder": lock.read_text(encoding="utf-8") if stage.decision != "complete" and lock.exists() else None,
    }


def _other_storage(settings: Settings) -> Problems:
    text = (
        f"SFT_OUT_LORA_DIR={settings.out_lora_dir}: {socket.gethostname()} does not see there what the main process "
        "wrote; name a folder on storage that all nodes share"
    )
    return Problems([text], every_rank=True)

"""Checkpoints of a stage: which are whole, which is the newest, what is said about them, which may go."""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.stages.paths import RHYTHM, TRAINER_STATE
from sft.storage.atomic import remove_folder, write_bytes
from sft.storage.json_files import DamagedFile, json_text, read_json, read_records
from sft.storage.seals import damage, is_sealed

_NAME = re.compile(r"^checkpoint-(\d{1,18})$")  # 18 digits: int() refuses thousands of them


@dataclass(frozen=True)
class Checkpoint:
    """A folder checkpoint-<step>, whole or not."""

    step: int
    folder: Path


@dataclass
class Scan:
    """The newest whole checkpoint, and the damaged ones above it: (folder, what is wrong)."""

    newest: Path | None = None
    broken: list[tuple[Path, list[str]]] = field(default_factory=list)


def find(folder: Path) -> list[Checkpoint]:
    """Every checkpoint-<step> of the folder, by step from the newest down; other names are no checkpoints."""
    if not folder.is_dir():
        return []
    named = ((_NAME.match(path.name), path) for path in folder.iterdir() if path.is_dir())
    found = [Checkpoint(int(match[1]), path) for match, path in named if match]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def scan(folder: Path) -> Scan:
    """Verify checkpoints from the newest down until one is whole. Reads all of it; writes nothing."""
    result = Scan()
    for checkpoint in find(folder):
        faults = damage(checkpoint.folder) or _state_faults(checkpoint)
        if not faults:
            result.newest = checkpoint.folder
            break
        result.broken.append((checkpoint.folder, faults))
    return result


def newest_sealed(folder: Path, *, without: Collection[str] = ()) -> Path | None:
    """The newest checkpoint with a completeness mark, its files not read; `without`: names of damaged ones."""
    found = (checkpoint.folder for checkpoint in find(folder) if checkpoint.folder.name not in without)
    return next((path for path in found if is_sealed(path)), None)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.partition("-")[2])


def _state_faults(checkpoint: Checkpoint) -> list[str]:
    """A whole folder under another step's name would resume at the wrong row."""
    step = trainer_state(checkpoint.folder).get("global_step", checkpoint.step)
    return [] if step == checkpoint.step else [f"{TRAINER_STATE}: is of step {step}"]


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer_state.json of a checkpoint; {} when it is absent or no JSON object."""
    try:
        state = read_json(checkpoint / TRAINER_STATE)
    except (FileNotFoundError, DamagedFile):
        return {}
    return state if isinstance(state, dict) else {}


def metrics_mark(path: Path) -> dict[str, Any]:
    """How far metrics.jsonl has come, to stand in a checkpoint's rhythm.json."""
    content = path.read_bytes() if path.exists() else b""
    return {"metrics_bytes": len(content), "metrics_sha256": hashlib.sha256(content).hexdigest()}


def metrics_until(path: Path, checkpoint: Path) -> bytes | None:
    """The lines of metrics.jsonl that the checkpoint knew; None when they are not there as they were."""
    size, digest = _metrics_mark_of(checkpoint)
    content = path.read_bytes()[:size] if path.exists() else b""
    return content if hashlib.sha256(content).hexdigest() == digest else None


def metrics_damaged(path: Path, checkpoint: Path) -> bool:
    """Whether lines that the checkpoint knew are missing or changed."""
    return _metrics_mark_of(checkpoint)[1] != "" and metrics_until(path, checkpoint) is None


def _metrics_mark_of(checkpoint: Path) -> tuple[int, str]:
    try:
        rhythm = read_json(checkpoint / RHYTHM)
        return rhythm["metrics_bytes"], rhythm["metrics_sha256"]
    except (FileNotFoundError, DamagedFile, KeyError, TypeError):
        return 0, ""


def rewind_metrics(path: Path, checkpoint: Path | None) -> None:
    """Drop the lines of metrics.jsonl after the checkpoint: the steps they tell of are trained again."""
    if not path.exists():
        return
    kept = metrics_until(path, checkpoint) if checkpoint else b""
    if kept is None:
        last = step_of(checkpoint) if checkpoint else -1
        records = [each for each in read_records(path) if isinstance(each.get("step"), int) and each["step"] <= last]
        kept = "".join(json_text(record, indent=None) + "\n" for record in records).encode()
    write_bytes(path, kept)


def saved_under(checkpoint: Path) -> str:
    """The engine that alone can go on from a checkpoint, with its processes; "" where any number of them can."""
    if not (checkpoint / "latest").is_file():
        return "FSDP" if any(checkpoint.glob("pytorch_model_fsdp*")) else ""
    splits = any(checkpoint.glob("*/zero_pp_rank_*_model_states.pt"))
    return f"DeepSpeed ZeRO-{3 if splits else 2} with {len(list(checkpoint.glob('*/*_optim_states.pt')))} processes"


def rotate(folder: Path, keep: int, *, protect: Collection[Path] = ()) -> list[Path]:
    """Delete the oldest whole checkpoints beyond `keep` and return them; call it once the new one is sealed.

    At least one is kept. Those in `protect` (such as the best) stay beyond the limit; unsealed ones don't count and
    aren't touched. Not `Trainer`'s own rotation: that one would also delete what was set aside as broken.
    """
    protected = {path.resolve() for path in protect}
    whole = [checkpoint.folder for checkpoint in find(folder) if is_sealed(checkpoint.folder)]
    surplus = [path for path in whole[max(keep, 1) :] if path.resolve() not in protected]
    for path in reversed(surplus):
        remove_folder(path)
    return surplus

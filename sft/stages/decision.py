"""What is to be done about a stage, judged by what lies in its folder. Reads only."""

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sft.settings.variants import value_text
from sft.stages import checkpoints
from sft.stages.changes import changes, gone_inputs
from sft.stages.lineage import holds_nothing, result_sha256
from sft.stages.manifest import Manifest, read_manifest
from sft.stages.paths import MANIFEST, METRICS
from sft.storage.json_files import DamagedFile
from sft.storage.seals import MARK

Decision = Literal["fresh", "resume", "complete", "refuse"]


@dataclass
class Verdict:
    """The decision and what it rests on. `broken`: damaged checkpoints newer than `checkpoint`, with their faults."""

    decision: Decision = "fresh"
    changed: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    manifest: Manifest = field(default_factory=Manifest)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    broken: list[tuple[Path, list[str]]] = field(default_factory=list)
    existed: bool = False

    def refuse(self, problem: str) -> "Verdict":
        self.decision = "refuse"
        self.problems.append(problem)
        return self


def traces(folder: Path) -> set[tuple[str, int]]:
    """What changes when another process works on a stage: its manifest, checkpoints and their marks, by time."""
    found = set()
    for path in (*folder.glob(MANIFEST), *folder.glob("checkpoint-*"), *folder.glob(f"checkpoint-*/{MARK}")):
        with contextlib.suppress(FileNotFoundError):  # it may be rotating them at this moment
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def unwritable(folder: Path) -> Path | None:
    """Which of the folder and its parent, where the lock stands, is there and can't be written by this user.

    Places that can't be made at all are a matter of the settings, which check them first.
    """
    places = [place for place in (folder, folder.parent) if place.is_dir()]
    return next((place for place in places if not os.access(place, os.W_OK | os.X_OK)), None)


def decide(folder: Path, start: Manifest, *, damaged: Collection[str] | None, again: str) -> Verdict:
    """Judge the folder of a stage for a start whose manifest would be `start`.

    `damaged`: checkpoints that another process found so; None reads them through. `again`: the command that trains the
    stage afresh.
    """
    verdict = Verdict(existed=folder.is_dir())
    if holds_nothing(folder):
        return verdict
    number = start.stage
    remedy = f"{again} moves it aside and trains again"
    try:
        manifest = read_manifest(folder, number)
    except DamagedFile as error:
        return verdict.refuse(f"{error}; {remedy}")
    if manifest is None:
        place = (
            f"SFT_OUT_LORA_DIR={str(folder).removesuffix(f'_stage{number}')}: {folder} holds files, but no {MANIFEST}"
        )
        return verdict.refuse(f"{place}, so it is not overwritten; choose another name, or {remedy}")
    verdict.manifest = manifest
    complete = manifest.status == "complete"
    _find_checkpoint(verdict, folder, damaged=() if complete else damaged)
    verdict.changed = changes(manifest, start, resuming=not complete)
    return (_judge_complete if complete else _judge_unfinished)(verdict, folder, start, remedy=remedy)


def _find_checkpoint(verdict: Verdict, folder: Path, *, damaged: Collection[str] | None) -> None:
    """Only who may set a damaged one aside reads them through; a completed stage does not go on from one."""
    if damaged is None:
        found = checkpoints.scan(folder)
        verdict.checkpoint, verdict.broken = found.newest, found.broken
    else:
        verdict.checkpoint = checkpoints.newest_sealed(folder, without=damaged)


def _judge_complete(verdict: Verdict, folder: Path, start: Manifest, *, remedy: str) -> Verdict:
    verdict.decision = "complete"
    gone = gone_inputs(verdict.manifest, start)
    verdict.warnings = [f"[WARNING] {name} is gone: not compared with what was trained on" for name in gone]
    if verdict.changed:
        remedy = f"{_to_write(verdict.manifest, start)}{remedy}"
        return _refuse_changed(verdict, f"{folder}: stage {start.stage} is complete", remedy)
    result = result_sha256(folder)
    if result is None or result[1] != verdict.manifest.adapter_sha256:
        what = f"its weights are not those that {MANIFEST} lists (damaged or replaced)"
        return verdict.refuse(f"{folder}: {what}; {remedy}")
    return verdict


def _to_write(manifest: Manifest, start: Manifest) -> str:
    """What an env file lacks of the variant that was made the stage."""
    now = start.values()
    tried = {} if start.tried() else manifest.tried()
    lines = [f"{name}={value_text(value)}" for name, value in tried.items() if now[name] != value]
    where = f"stage{start.stage}.env"
    return f"the stage was adopted from --try: write {' and '.join(lines)} into {where}; or " if lines else ""


def _judge_unfinished(verdict: Verdict, folder: Path, start: Manifest, *, remedy: str) -> Verdict:
    if not verdict.changed:
        verdict.decision = "resume"
        metrics = folder / METRICS
        if verdict.checkpoint and checkpoints.metrics_damaged(metrics, verdict.checkpoint):
            what = f"is not what it was at {verdict.checkpoint.name}; figures of the steps before it may be missing"
            verdict.warnings.append(f"[WARNING] {metrics}: {what}")
    elif verdict.checkpoint or verdict.broken:
        return _refuse_changed(verdict, f"{folder}: stage {start.stage} is partly trained", remedy)
    # Else: without a checkpoint nothing would be mixed or lost, so corrected settings simply start the stage.
    return verdict


def _refuse_changed(verdict: Verdict, state: str, remedy: str) -> Verdict:
    listed = "".join(f"\n  {change}" for change in verdict.changed)
    return verdict.refuse(f"{state}, but since then changed:{listed}\n  {remedy}")

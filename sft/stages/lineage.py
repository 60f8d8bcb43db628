"""What a stage is made from: the results of all stages before it, each verified before it is used."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sft.errors import Problems
from sft.stages import paths
from sft.stages.manifest import Manifest, ParentRecord, read_manifest
from sft.storage.json_files import DamagedFile
from sft.storage.lock import current_holder
from sft.storage.seals import damage, is_sealed, sha256

if TYPE_CHECKING:
    from sft.settings import Settings


@dataclass(frozen=True)
class Parent:
    """The result of an earlier stage: an adapter, or a whole model where all weights were trained."""

    stage: int
    folder: Path
    adapter_sha256: str
    kind: Literal["adapter", "model"] = "adapter"


@dataclass
class Lineage:
    """Parents in stage order, and what is to be said about them."""

    parents: tuple[Parent, ...] = ()
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is absent, or empty but for the log of a start that failed and hidden files."""
    return not folder.exists() or (
        folder.is_dir() and all(p.match(paths.ERROR_LOGS) or p.name.startswith(".") for p in folder.iterdir())
    )


def result_sha256(folder: Path) -> tuple[Literal["adapter", "model"], str] | None:
    """Kind and sha256 of the weights in a stage's folder, None without any.

    An adapter is one file. Of a whole model, whose weights may be split, it is the sha256 of the lines "name sha256".
    """
    if (folder / paths.ADAPTER_CONFIG).is_file():
        return ("adapter", sha256(folder / paths.ADAPTER)) if (folder / paths.ADAPTER).is_file() else None
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / paths.MODEL_CONFIG).is_file() or not weights:
        return None
    lines = "".join(f"{path.name} {sha256(path)}\n" for path in weights)
    return "model", hashlib.sha256(lines.encode()).hexdigest()


def find_lineage(settings: "Settings", inputs: Mapping[str, str]) -> Lineage:
    """The parents of a stage and everything wrong with them. Writes nothing; reads every parent's weights once."""
    lineage = Lineage()
    results: list[Parent] = []
    recorded: dict[int, list[ParentRecord]] = {}
    absent = []
    for number in range(1, settings.stage):
        folder = paths.stage_folder(settings.out_lora_dir, number)
        if holds_nothing(folder):
            absent.append(number)
            continue
        try:
            manifest = _finished_manifest(folder, number, settings)
            fresh = settings.command("--fresh", stage=number)
            results.append(_verified(folder, number, manifest, again=f"train it again with {fresh}"))
            lineage.warnings += _damaged_beside(folder)
        except Problems as found:
            lineage.problems += found.problems
            continue
        if manifest is None:
            lineage.warnings.append(
                f"[WARNING] {folder} has no {paths.MANIFEST}: nothing says what its adapter was trained on"
            )
        else:
            lineage.problems += _other_base(folder, manifest, settings=settings, inputs=inputs)
            recorded[number] = manifest.parents
    lineage.parents = since_last_model(results)
    _report_absent(lineage, absent, settings)
    if not lineage.problems:
        lineage.problems = _outdated(results, recorded, settings)
    return lineage


def since_last_model(results: list[Parent]) -> tuple[Parent, ...]:
    """The parents that count: a whole model holds everything trained before it."""
    models = [index for index, parent in enumerate(results) if parent.kind == "model"]
    return tuple(results[models[-1] if models else 0 :])


def _report_absent(lineage: Lineage, absent: list[int], settings: "Settings") -> None:
    """Stages before a whole model are not missed: it holds what they learnt."""
    whole = max((parent.stage for parent in lineage.parents if parent.kind == "model"), default=0)
    for number in (number for number in absent if number > whole):
        folder = paths.stage_folder(settings.out_lora_dir, number)
        text = f"Previous stage adapter not found at {folder}, starting from base model"
        if settings.strict:
            remedy = f"train it with {settings.command(stage=number)}, or run without strict mode"
            lineage.problems.append(f"{text}; strict mode forbids that: {remedy}")
        else:
            lineage.warnings.append(f"[WARNING] {text}")


def _finished_manifest(folder: Path, number: int, settings: "Settings") -> Manifest | None:
    again = settings.command(stage=number)
    try:
        manifest = read_manifest(folder, number)
    except DamagedFile as error:
        raise Problems([f"{error}; run {again} --fresh"]) from error
    if manifest is None or manifest.status == "complete":
        return manifest
    holder = current_holder(paths.lock_path(folder))
    if holder:
        raise Problems([f"{folder}: stage {number} is still being trained by {holder}; wait until it ends"])
    state = "failed" if manifest.status == "failed" else "was stopped before its end"
    raise Problems([f"{folder}: stage {number} {state}; run {again} again"])


def _verified(folder: Path, number: int, manifest: Manifest | None, *, again: str) -> Parent:
    result = result_sha256(folder)
    if result is None:
        pickled = f", only {paths.ADAPTER_PICKLE}, a pickle, and no pickle is ever loaded"
        there = pickled if (folder / paths.ADAPTER_PICKLE).exists() else ""
        raise Problems([f"{folder}: holds no {paths.ADAPTER_CONFIG} with {paths.ADAPTER}{there}; {again}"])
    if manifest is not None and manifest.adapter_sha256 != result[1]:
        what = f"its weights are not those that {paths.MANIFEST} lists (damaged or replaced)"
        raise Problems([f"{folder}: {what}; {again}"])
    return Parent(number, folder, result[1], result[0])


def _damaged_beside(folder: Path) -> list[str]:
    """Warnings about files of a complete stage other than its weights, which have been checked."""
    faults = damage(folder, leave=".safetensors") if is_sealed(folder) else []
    return [f"[WARNING] {folder}: damaged since it was completed: {fault}" for fault in faults]


def _other_base(folder: Path, manifest: Manifest, *, settings: "Settings", inputs: Mapping[str, str]) -> list[str]:
    before, old_name = manifest.inputs.get("SFT_BASE_MODEL"), manifest.base_model
    if before == inputs["SFT_BASE_MODEL"] if before else old_name == settings.base_model:
        return []
    how = f"was trained on {old_name}" if old_name != settings.base_model else "was trained before this model changed"
    return [f"SFT_BASE_MODEL={settings.base_model}: {folder} {how}; all stages of a ladder need one base model"]


def _outdated(results: list[Parent], recorded: Mapping[int, list[ParentRecord]], settings: "Settings") -> list[str]:
    """Parents that were trained on other stages than those there are now. A whole model does not miss its parents."""
    problems = []
    for parent in (parent for parent in results if parent.stage in recorded):
        before = [each for each in results if each.stage < parent.stage]
        there = {each.stage for each in before}
        then = {(each.stage, each.adapter_sha256) for each in recorded[parent.stage]}
        if parent.kind == "model":
            then = {(number, digest) for number, digest in then if number in there}
        now = {(each.stage, each.adapter_sha256) for each in since_last_model(before)}
        if then != now:
            what = f"stage {parent.stage} was trained on other earlier stages than those there are now"
            remedy = f"train it again with {settings.command('--fresh', stage=parent.stage)}"
            problems.append(f"{parent.folder}: {what}; {remedy}")
    return problems

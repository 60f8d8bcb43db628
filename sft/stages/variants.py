"""The variants of a stage on disk: which there are, which can be compared, one made the stage, others dropped."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import Problems
from sft.settings.rules import RESULT_NEUTRAL
from sft.settings.values import SourceRecord
from sft.settings.variants import chosen, variant_name
from sft.stages import paths
from sft.stages.changes import GLOBAL_BATCH
from sft.stages.lineage import holds_nothing
from sft.stages.manifest import Manifest, read_manifest
from sft.storage.atomic import remove_folder, set_aside, sync
from sft.storage.json_files import DamagedFile
from sft.storage.lock import Lock

if TYPE_CHECKING:
    from sft.stages.stage import Stage

_COMPARED = ("base_model", "parents", "inputs", "sources", "val_rows")


@dataclass(frozen=True)
class Variant:
    """One variant: its name, folder and manifest (blank where it can't be read). `adopted`: it is OUT_stageN by now."""

    name: str
    folder: Path
    manifest: Manifest
    adopted: bool = False

    @property
    def status(self) -> str:
        return self.manifest.status if self.manifest.stage else "unknown"


def find_variants(folder: Path, number: int) -> dict[str, Variant]:
    """Every variant of the stage of OUT_stageN by name; the stage itself where a variant was adopted."""
    places = {name: place for name, place in paths.variants_of(folder).items() if not holds_nothing(place)}
    found = {name: Variant(name, place, _manifest(place, number)) for name, place in places.items()}
    stage = _manifest(folder, number)
    if tried := stage.tried():
        name = variant_name(tried)
        found.setdefault(name, Variant(name, folder, stage, adopted=True))
    return found


def _manifest(folder: Path, number: int) -> Manifest:
    try:
        return read_manifest(folder, number) or Manifest()
    except (DamagedFile, NotADirectoryError):
        return Manifest()


def pick(text: str, option: str, variants: Mapping[str, Variant], folder: Path) -> Variant:
    """The one variant that `text` names.

    Raises:
        Problems: none of that name, or several.
    """
    names = chosen(text, variants)
    if len(names) == 1:
        return variants[names[0]]
    if not variants:
        raise Problems([f"{option} {text}: {folder} has no variants; train some with --try NAME=V1,V2"])
    what = "several variants could be meant" if names else "there is no such variant"
    raise Problems([f"{option} {text}: {what}; choose one of {', '.join(names or variants)}"])


def differences(one: Manifest, other: Manifest) -> list[str]:
    """What of two manifests keeps their stages from being compared as variants, by name."""
    apart = [name for name in _COMPARED if _content(getattr(one, name)) != _content(getattr(other, name))]
    free = RESULT_NEUTRAL | one.tried().keys() | other.tried().keys()
    before, after = one.values(), other.values()
    names = sorted((before.keys() & after.keys()) - free)
    return [*apart, *(name for name in names if before[name] != after[name])]


def _content(value: Any) -> Any:
    """Without what variants may differ in: the rows that were drawn, the rows of a step."""
    if isinstance(value, list):
        return [(each.id, each.fingerprint) if isinstance(each, SourceRecord) else each for each in value]
    if isinstance(value, dict):
        return {name: each for name, each in value.items() if name != GLOBAL_BATCH}
    return value


def siblings(stage: "Stage") -> Iterator[Path]:
    """Folders of other variants that began from the same models and are asked the same as this one."""
    if not stage.settings.variant:
        return
    own = paths.stage_folder(stage.settings.out_lora_dir, stage.number)
    for name, other in find_variants(own, stage.number).items():
        if name != stage.settings.variant and not differences(stage.manifest, other.manifest):
            yield other.folder


def adopt(variant: Variant, folder: Path, *, fresh: bool) -> Path | None:
    """Renames a complete variant to OUT_stageN and returns where an earlier OUT_stageN was moved (`fresh`).

    Raises:
        Problems: OUT_stageN is there, or in use.
    """
    if not fresh and not holds_nothing(folder):
        remedy = f"--adopt {variant.name} --fresh moves it aside first, and deletes nothing"
        raise Problems([f"--adopt {variant.name}: {folder} is there already; {remedy}"])
    lock = Lock(paths.lock_path(folder))
    lock.acquire()
    try:
        moved = set_aside(folder, "old") if folder.exists() else None
        variant.folder.rename(folder)
        sync(folder.parent)
    finally:
        lock.release()
    return moved


def drop(variants: list[Variant], folder: Path) -> None:
    """Deletes variants.

    Raises:
        Problems: one is the stage itself by now, or the stage is in use.
    """
    if kept := [each.name for each in variants if each.adopted]:
        raise Problems([f"--drop-tries {kept[0]}: was adopted, it is {folder} itself; nothing was dropped"])
    lock = Lock(paths.lock_path(folder))
    lock.acquire()
    try:
        for variant in variants:
            remove_folder(variant.folder)
    finally:
        lock.release()

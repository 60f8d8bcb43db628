"""What the stages before one were trained on, by their manifests; compared with what lies there now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.taught import Taught
from sft.errors import Problems
from sft.settings import Settings, Source, load_settings
from sft.settings.env_file import attribute_of
from sft.stages import paths
from sft.stages.changes import recorded_prints, recorded_sources, short
from sft.stages.fingerprints import is_same, source_fingerprint
from sft.stages.lineage import holds_nothing
from sft.stages.manifest import Manifest, read_manifest
from sft.storage.json_files import DamagedFile

if TYPE_CHECKING:
    from collections.abc import Iterator

# What decides which rows of its sources a stage is trained on.
_DRAWING = (
    "SFT_SEED", "SFT_VAL_RATIO", "SFT_SHUFFLE", "SFT_DEDUPLICATE", "SFT_DATASET_MIX_TOTAL_SIZE", "SFT_USE_UPSAMPLING",
    "SFT_UPSAMPLE_RULES",
)  # fmt: skip


def taught_before(settings: Settings, coming: Sequence[Settings] = ()) -> list[Taught]:
    """The stages whose rows come again under SFT_REPLAY, in order; none without it. Those of `coming` are not trained
    yet, but will be by the time this one starts.

    Raises:
        Problems: there is none, nothing says what one was trained on, or that has changed or is gone.
    """
    if not settings.replay:
        return []
    later = {other.stage: other for other in coming}
    found: list[Taught] = []
    problems: list[str] = []
    unclear = False
    for number in range(1, settings.stage):
        folder = paths.stage_folder(settings.out_lora_dir, number)
        if number in later:
            found.append(_to_be_taught(later[number], settings))
        elif not holds_nothing(folder):
            try:
                manifest = read_manifest(folder, number)
            except DamagedFile:
                unclear = True  # the lineage says so
                continue
            if manifest is None:
                problems.append(_unknown(folder, number, settings))
            elif manifest.status == "complete":
                sources, wrong = _sources(number, manifest, settings)
                problems += wrong
                found.append(_taught(number, manifest, sources, settings))
            else:
                unclear = True
    if not found and not problems and not unclear:
        there = paths.stage_folder(settings.out_lora_dir, settings.stage - 1)
        remedy = f"train it with {settings.command(stage=settings.stage - 1)}, or set SFT_REPLAY=0"
        problems = [f"{_given(settings)}: there is no earlier stage whose rows could come again ({there}); {remedy}"]
    if problems:
        raise Problems(problems)
    return [each for each in found if each.sources]


def _given(settings: Settings) -> str:
    return f"SFT_REPLAY={settings.replay:g}"


def _drawing(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """These settings, but drawing rows by the values of another stage: {attribute: value}."""
    return settings.model_copy(update=dict(values))


def _to_be_taught(other: Settings, settings: Settings) -> Taught:
    values = {name: getattr(other, name) for name in map(attribute_of, _DRAWING)}
    return Taught(other.stage, other.sources, _drawing(settings, values | _split_off(other.eval_dataset)))


def _split_off(evaluated: Any) -> dict[str, float]:
    """Where a stage has validation rows of their own, none are split off its sources."""
    return {"val_ratio": 0.0} if evaluated else {}


def _taught(number: int, manifest: Manifest, sources: tuple[Source, ...], settings: Settings) -> Taught:
    recorded, fields = manifest.values(), Settings.model_fields
    attributes = {name: attribute_of(name) for name in _DRAWING}
    values = {
        attribute: recorded[name] if name in recorded else fields[attribute].default
        for name, attribute in attributes.items()
    }
    return Taught(number, sources, _drawing(settings, values | _split_off(recorded.get("SFT_EVAL_DATASET"))))


def _trained_on(manifest: Manifest) -> "Iterator[tuple[Mapping[str, Any], str]]":
    """The sources of a manifest that rows were read from, as its settings name them, and their fingerprints. One that
    could not be loaded then has no rows, or no fingerprint."""
    named = recorded_sources(manifest)
    records = manifest.sources
    counted = [record.rows for record in records] if len(records) == len(named) else [None] * len(named)
    for each, rows, found in zip(named, counted, recorded_prints(named, records), strict=True):
        if found is not None and rows != 0:
            yield each, found


def _unknown(folder: Path, number: int, settings: Settings) -> str:
    what = f"nothing says what stage {number} was trained on: {folder} has no {paths.MANIFEST}"
    again = settings.command("--fresh", stage=number)
    return f"{_given(settings)}: {what}; {again} trains it again, or set SFT_REPLAY=0"


def _sources(number: int, manifest: Manifest, settings: Settings) -> tuple[tuple[Source, ...], list[str]]:
    """What a stage was trained on where it lies now, and what is wrong with it."""
    sources, problems = [], []
    for each, before in _trained_on(manifest):
        source = Source(**each)
        now = source_fingerprint(source)
        what = f"{_given(settings)}: stage {number} was trained on {source.id}"
        if is_same(before, now):
            sources.append(source)
        elif moved := _moved(before, number, settings):
            sources.append(source.model_copy(update={"id": moved}))
        elif now is None or (now.startswith("hub:") and not before.startswith("hub:")):
            problems.append(f"{what}, which is gone; bring it back, or set SFT_REPLAY=0")
        else:
            again = f"train the stage again with {settings.command('--fresh', stage=number)}"
            contents = f"{short(before)} → {short(now)}"
            remedy = f"bring back what it was, {again}, or set SFT_REPLAY=0"
            problems.append(f"{what}, whose content has changed since ({contents}); {remedy}")
    return tuple(sources), problems


def _moved(before: str, number: int, settings: Settings) -> str | None:
    """Where data of this content lies now, if the env file of the stage that was trained on it, or this one's, says."""
    overrides = [each for each in settings.overrides if not each.startswith("SFT_REPLAY=")]
    try:
        then = load_settings(number, env_dir=settings.env_dir, overrides=overrides).sources
    except Problems:
        then = ()
    return next((each.id for each in (*then, *settings.sources) if source_fingerprint(each) == before), None)

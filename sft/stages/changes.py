"""What determines a stage's result besides the program, and what of it is different from the last time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.settings.rules import RESULT_NEUTRAL, resume_neutral
from sft.settings.values import SourceRecord
from sft.stages.fingerprints import is_same, is_unresolved, model_fingerprint, source_fingerprint
from sft.stages.manifest import Manifest, ParentRecord
from sft.storage.seals import content_fingerprint

if TYPE_CHECKING:
    from sft.settings import Settings, Source

_BATCH = ("SFT_PER_DEVICE_TRAIN_BS", "SFT_GRAD_ACCUM")
_TRAINING_DATA = ("SFT_DATASET_ID", "SFT_DATASET_MIX")
_OTHER_DATA = ("SFT_EVAL_DATASET", "SFT_GEN_EVAL_DATASET")
# Files that a setting names, by path or as path:function.
_FILES = ("SFT_CHAT_TEMPLATE", "SFT_JSON_SCHEMA", "SFT_GEN_EVAL")
# Compared by content: models, data and files; by product: the batch. What has moved is still the same.
_COMPARED_APART = RESULT_NEUTRAL | {"SFT_BASE_MODEL", "SFT_DATASET_SPLIT", *_BATCH, *_TRAINING_DATA, *_OTHER_DATA}
GLOBAL_BATCH = "global batch"


def stage_inputs(settings: "Settings", processes: int | None = None) -> dict[str, str]:
    """What the settings only name: fingerprints of base model, files and evaluation rows; the global batch."""
    inputs = {"SFT_BASE_MODEL": model_fingerprint(settings.base_model, settings.model_revision)}
    record = settings.record()
    for name in _FILES:
        if (path := _file_of(record.get(name, {}).get("value"))) is not None:
            inputs[name] = content_fingerprint(path)
    for name, sources in zip(_OTHER_DATA, (settings.eval_sources, settings.gen_eval_sources), strict=True):
        prints = (source_fingerprint(source) for source in sources)
        inputs |= {f"{name} {place}": found for place, found in enumerate(prints, 1) if found}
    if processes:
        inputs[GLOBAL_BATCH] = str(settings.per_device_train_bs * settings.grad_accum * processes)
    return inputs


def _file_of(value: Any) -> Path | None:
    """The file in a setting's value, if it names one that is there."""
    places = (value, value.rpartition(":")[0]) if isinstance(value, str) else ()
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def source_record(source: "Source") -> SourceRecord:
    """A source as the manifest lists it before its rows have been counted; without fingerprint if it isn't there."""
    content = source_fingerprint(source)
    return SourceRecord(
        id=source.id, split=source.split, weight=source.weight, rows=None, drawn=None, fingerprint=content
    )


def counted_sources(start: Sequence[SourceRecord], counted: Sequence[SourceRecord]) -> list[SourceRecord]:
    """One record per source of the settings: the counts of those that were loaded, no rows for the others.

    `counted` has the loaded ones in the order of the settings, and after them any that the settings don't list.
    Fingerprints are those taken at the start; a hub data set that could not be loaded has none.
    """
    waiting, records = list(counted), []
    for source in start:
        if waiting and all(getattr(waiting[0], key) == getattr(source, key) for key in ("id", "split", "weight")):
            records.append(waiting.pop(0).model_copy(update={"fingerprint": source.fingerprint}))
        else:
            content = None if is_unresolved(source.fingerprint) else source.fingerprint
            records.append(source.model_copy(update={"rows": 0, "drawn": 0, "fingerprint": content}))
    return [*records, *waiting]


def other_rows(manifest: Manifest, now: Manifest) -> list[str]:
    """What was counted differently when the stage started, as "what: old → new"; nothing where nothing was counted."""
    found = []
    for name in ("train_rows", "val_rows"):
        before, after = getattr(manifest, name), getattr(now, name)
        if None not in (before, after) and before != after:
            found.append(f"{name}: {before} → {after}")
    for old, new in zip(manifest.sources, now.sources, strict=False):
        if None not in (old.rows, new.rows) and old.rows != new.rows:
            found.append(f"data {new.id}: {old.rows} rows → {new.rows} rows")
    (total, trained), (total_now, trained_now) = (
        (each.tokens.get("total"), each.tokens.get("trained")) for each in (manifest, now)
    )
    if total and total_now and not found and (total, trained) != (total_now, trained_now):
        found.append(f"tokens: {total} ({trained} trained) → {total_now} ({trained_now} trained)")
    return found


def changes(manifest: Manifest, now: Manifest, *, resuming: bool) -> list[str]:
    """Each difference that can change the result, as "what: old → new". `now`: the manifest a start would write now.

    A stage that goes on (`resuming`) needs all it had; one that is complete does not miss data that has vanished.
    """
    return [
        *_settings_changes(manifest, now, resuming=resuming),
        *_batch_changes(manifest, now, resuming=resuming),
        *_model_changes(manifest, now),
        *(text for name in _OTHER_DATA for text in _data_changes(name, manifest, now, resuming=resuming)),
        *_data_changes("", manifest, now, resuming=resuming),
        *_parent_changes(manifest.parents, now.parents),
    ]


def gone_inputs(manifest: Manifest, now: Manifest) -> list[str]:
    """Ids of data that was there last time and is not any more."""
    pairs = (pair for name in ("", *_OTHER_DATA) for pair in zip(_data(name, manifest), _data(name, now), strict=False))
    return [new.id for old, new in pairs if _is_gone(old, new)]


@dataclass(frozen=True)
class _Data:
    """A data set that the settings name: the setting, its id, what else stands beside the id, its fingerprint."""

    setting: str
    id: str
    options: dict[str, Any]
    fingerprint: str | None


def _data(name: str, manifest: Manifest) -> list[_Data]:
    """The data sets of a setting, "" for those trained on, by their place in it."""
    if not name:
        name = "SFT_DATASET_MIX" if manifest.values().get("SFT_DATASET_MIX") else "SFT_DATASET_ID"
        named = recorded_sources(manifest)
        prints = recorded_prints(named, manifest.sources)
    else:
        named = manifest.values().get(name) or []
        # Manifests written before places were counted name the id instead.
        keys = [(f"{name} {place}", f"{name} {each['id']}") for place, each in enumerate(named, 1)]
        prints = [manifest.inputs.get(key, manifest.inputs.get(other)) for key, other in keys]
    options = [{key: value for key, value in each.items() if key != "id"} for each in named]
    return [_Data(name, str(n["id"]), o, p) for n, o, p in zip(named, options, prints, strict=True)]


def recorded_sources(manifest: Manifest) -> list[Mapping[str, Any]]:
    """What a manifest's settings name to be trained on: the keys of each source."""
    values = manifest.values()
    one = {"id": values.get("SFT_DATASET_ID"), "split": values.get("SFT_DATASET_SPLIT") or "train"}
    return values.get("SFT_DATASET_MIX") or [one]


def recorded_prints(named: Sequence[Mapping[str, Any]], records: Sequence[SourceRecord]) -> list[str | None]:
    """By place. A manifest of before listed only what could be loaded: there each takes the next of its id."""
    if len(records) == len(named):
        return [record.fingerprint for record in records]
    waiting = list(records)
    return [waiting.pop(0).fingerprint if waiting and waiting[0].id == each["id"] else None for each in named]


def _data_changes(name: str, manifest: Manifest, now: Manifest, *, resuming: bool) -> Iterator[str]:
    old, new = _data(name, manifest), _data(name, now)
    if len(old) != len(new):
        setting = (new or old)[0].setting
        yield f"{setting}: {_shown([each.id for each in old] or None)} → {_shown([each.id for each in new] or None)}"
        return
    for before, after in zip(old, new, strict=True):
        label = f"data {after.id}" if not name else f"{name} {after.id}"
        for key in sorted(before.options.keys() | after.options.keys()):
            if before.options.get(key) != after.options.get(key):
                yield f"{label}: {key} {_shown(before.options.get(key))} → {_shown(after.options.get(key))}"
        moved = before.id != after.id
        if is_same(before.fingerprint, after.fingerprint) and (after.fingerprint or not moved):
            continue
        if not moved and not resuming and _is_gone(before, after):
            continue
        contents = f"content {short(before.fingerprint)} → {short(after.fingerprint)}"
        yield f"{after.setting}: {before.id} → {after.id} ({contents})" if moved else f"{label}: {contents}"


def _is_gone(old: _Data, new: _Data) -> bool:
    """Whether local data was there and is not any more; what then looks like a hub id was none before."""
    local = old.fingerprint is not None and not old.fingerprint.startswith("hub:")
    return old.id == new.id and local and (new.fingerprint is None or new.fingerprint.startswith("hub:"))


def _shown(value: Any) -> str:
    text = "unset" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def short(fingerprint: str | None) -> str:
    """A fingerprint as people are shown it."""
    kind, _, digest = (fingerprint or "not there").partition(":")
    return f"{kind}:{digest[:12]}" if kind in ("sha256", "folder", "model") else f"{fingerprint or 'not there'}"[:80]


def _settings_changes(manifest: Manifest, now: Manifest, *, resuming: bool) -> Iterator[str]:
    old, new = manifest.settings, now.settings
    neutral = _COMPARED_APART | (resume_neutral(manifest.values(), now.values()) if resuming else frozenset())
    for name, record in new.items():
        # A setting younger than the manifest changes something only where it is set.
        before = old[name].value if name in old else record.value if record.origin == "default" else None
        prints = manifest.inputs.get(name), now.inputs.get(name)
        if name in neutral or (prints[0] and prints[0] == prints[1]):
            continue
        if before != record.value:
            yield f"{name}: {_shown(before)} → {_shown(record.value)}"
        elif prints[0] != prints[1]:
            yield f"{name}: content {short(prints[0])} → {short(prints[1])}"


def _product(manifest: Manifest) -> int | None:
    size, steps = (manifest.values().get(name) for name in _BATCH)
    return size * steps if isinstance(size, int) and isinstance(steps, int) else None


def _batch_changes(manifest: Manifest, now: Manifest, *, resuming: bool) -> list[str]:
    """Micro-batch, accumulation and processes may trade against each other as long as a step sees the same rows.

    A completed stage may also be looked at with another number of processes than it was trained with.
    """
    before, after = _product(manifest), _product(now)
    old, new = manifest.inputs.get(GLOBAL_BATCH), now.inputs.get(GLOBAL_BATCH)
    if (old and old == new) or (before == after and not (resuming and old and new)):
        return []
    if before == after:
        return [f"rows per step: {old} → {new} (same settings, another number of processes)"]
    return [f"{' × '.join(_BATCH)}: {before} → {after}"]


def _model_changes(manifest: Manifest, now: Manifest) -> list[str]:
    old, new = manifest.inputs.get("SFT_BASE_MODEL"), now.inputs["SFT_BASE_MODEL"]
    if old is None or old == new:
        return []
    renamed = manifest.base_model != now.base_model
    names = f"{manifest.base_model} → {now.base_model}"
    return [f"SFT_BASE_MODEL: {names if renamed else f'content {short(old)} → {short(new)}'}"]


def _parent_changes(old: Sequence[ParentRecord], new: Sequence[ParentRecord]) -> list[str]:
    before = {parent.stage: parent.adapter_sha256 for parent in old}
    after = {parent.stage: parent.adapter_sha256 for parent in new}
    return [
        f"stage {stage}'s adapter: {(before.get(stage) or 'none')[:12]} → {(after.get(stage) or 'none')[:12]}"
        for stage in sorted(before.keys() | after.keys())
        if before.get(stage) != after.get(stage)
    ]

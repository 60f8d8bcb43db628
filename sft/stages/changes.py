"""What determines a stage's result besides the program, and what of it is different from the last time."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.sources.files import files_of_pattern, is_pattern
from sft.settings.rules import RESULT_NEUTRAL
from sft.storage.seals import content_fingerprint, sha256

if TYPE_CHECKING:
    from sft.settings import Settings, Source

_BATCH = ("SFT_PER_DEVICE_TRAIN_BS", "SFT_GRAD_ACCUM")
# Compared by content: SFT_BASE_MODEL; by product: the batch. A folder that moved is still the same model.
_COMPARED_APART = RESULT_NEUTRAL | {"SFT_BASE_MODEL", *_BATCH}
_GLOBAL_BATCH = "global batch"
_WHOLE = 16 * 1024 * 1024  # files up to here are read whole; of weights samples tell one model from another
_SAMPLE, _SAMPLES = 4096, 256  # bytes each, how many: 1 MiB of a file of any size, in milliseconds


def source_fingerprint(source: "Source") -> str:
    """`sha256:` of a local file, `folder:` of a folder or a pattern's files, `hub:<id>@<revision or main>` else."""
    path = Path(source.id).expanduser()
    if is_pattern(source.id) and (files := files_of_pattern(source.id)):
        lines = "".join(f"{each.suffix} {each.stat().st_size} {sha256(each)}\n" for each in files)
        return f"folder:{hashlib.sha256(lines.encode()).hexdigest()}"
    return content_fingerprint(path) if path.exists() else f"hub:{source.id}@{source.revision or 'main'}"


def _sampled_sha256(path: Path) -> str:
    """Digest of a large file's size and of 256 blocks of 4 KiB spread over it (1 MiB read, not 140 GB)."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as stream:
        for index in range(_SAMPLES):
            stream.seek((size - _SAMPLE) * index // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """`model:` of a local folder's configuration, tokenizer and weights; `hub:<id>@<revision or main>` otherwise.

    Files over 16 MiB are sampled: another training changes every block, a single flipped bit may go unseen.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return f"hub:{name}@{revision or 'main'}"
    kinds = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in kinds)
    digests = (f"{p.name} {(_sampled_sha256 if p.stat().st_size > _WHOLE else sha256)(p)}\n" for p in files)
    return f"model:{hashlib.sha256(''.join(digests).encode()).hexdigest()}"


def stage_inputs(settings: "Settings", processes: int | None = None) -> dict[str, str]:
    """What the settings only name: fingerprints of base model, template and evaluation rows; the global batch."""
    inputs = {"SFT_BASE_MODEL": model_fingerprint(settings.base_model, settings.model_revision)}
    template = settings.chat_template
    if template and Path(template).is_file():
        inputs["SFT_CHAT_TEMPLATE"] = content_fingerprint(Path(template))
    inputs |= {f"SFT_EVAL_DATASET {source.id}": source_fingerprint(source) for source in settings.eval_sources}
    inputs |= {f"SFT_GEN_EVAL_DATASET {source.id}": source_fingerprint(source) for source in settings.gen_eval_sources}
    if processes:
        inputs[_GLOBAL_BATCH] = str(settings.per_device_train_bs * settings.grad_accum * processes)
    return inputs


def changes(manifest: Mapping[str, Any], now: Mapping[str, Any], *, resuming: bool) -> list[str]:
    """Each difference that can change the result, as "what: old → new". `now`: the manifest a start would write now."""
    return [
        *_settings_changes(manifest["settings"], now["settings"]),
        *_batch_changes(manifest, now, resuming=resuming),
        *_input_changes(manifest, now),
        *_source_changes(manifest["sources"], now["sources"]),
        *_parent_changes(manifest["parents"], now["parents"]),
    ]


def gone_inputs(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Ids of local data that was fingerprinted last time and is not there any more."""
    pairs = _paired_sources(manifest["sources"], now["sources"])
    return [new["id"] for old, new in pairs if _is_gone(old["fingerprint"], new["fingerprint"])]


def _is_gone(old: str | None, new: str | None) -> bool:
    return bool(old and new) and new.startswith("hub:") and not old.startswith("hub:")  # type: ignore[union-attr]


def _shown(value: Any) -> str:
    text = "unset" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _short(fingerprint: str | None) -> str:
    kind, _, digest = (fingerprint or "none").partition(":")
    return f"{kind}:{digest[:12]}" if kind in ("sha256", "folder", "model") else f"{fingerprint or 'none'}"[:80]


def _settings_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for name, record in new.items():
        # A setting younger than the manifest changes something only where it is set.
        before = old[name]["value"] if name in old else record["value"] if record["origin"] == "default" else None
        if name not in _COMPARED_APART and before != record["value"]:
            found.append(f"{name}: {_shown(before)} → {_shown(record['value'])}")
    return found


def _product(settings: Mapping[str, Any]) -> int | None:
    values = [settings[name]["value"] for name in _BATCH if name in settings]
    return values[0] * values[1] if len(values) == 2 and all(isinstance(value, int) for value in values) else None


def _batch_changes(manifest: Mapping[str, Any], now: Mapping[str, Any], *, resuming: bool) -> list[str]:
    """Micro-batch, accumulation and processes may trade against each other as long as a step sees the same rows.

    A completed stage may also be looked at with another number of processes than it was trained with.
    """
    before, after = _product(manifest["settings"]), _product(now["settings"])
    old, new = manifest["inputs"].get(_GLOBAL_BATCH), now["inputs"].get(_GLOBAL_BATCH)
    if (old and old == new) or (before == after and not (resuming and old and new)):
        return []
    if before == after:
        return [f"rows per step: {old} → {new} (same settings, another number of processes)"]
    return [f"{' × '.join(_BATCH)}: {before} → {after}"]


def _input_changes(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name in sorted((manifest["inputs"].keys() & now["inputs"].keys()) - {_GLOBAL_BATCH}):
        old, new = manifest["inputs"][name], now["inputs"][name]
        if old == new or (name != "SFT_BASE_MODEL" and _is_gone(old, new)):
            continue
        renamed = name == "SFT_BASE_MODEL" and manifest["base_model"] != now["base_model"]
        names = f"{manifest['base_model']} → {now['base_model']}"
        found.append(f"{name}: {names if renamed else f'content {_short(old)} → {_short(new)}'}")
    return found


def _paired_sources(old: Sequence[Any], new: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    """Sources at the same place with the same id; any other difference shows in the settings."""
    return ((a, b) for a, b in zip(old, new, strict=False) if a["id"] == b["id"])


def _source_changes(old: Sequence[Any], new: Sequence[Any]) -> list[str]:
    return [
        f"data {b['id']}: content {_short(a['fingerprint'])} → {_short(b['fingerprint'])}"
        for a, b in _paired_sources(old, new)
        if a["fingerprint"] != b["fingerprint"] and not _is_gone(a["fingerprint"], b["fingerprint"])
    ]


def _parent_changes(old: Sequence[Any], new: Sequence[Any]) -> list[str]:
    before = {parent["stage"]: parent["adapter_sha256"] for parent in old}
    after = {parent["stage"]: parent["adapter_sha256"] for parent in new}
    return [
        f"stage {stage}'s adapter: {(before.get(stage) or 'none')[:12]} → {(after.get(stage) or 'none')[:12]}"
        for stage in sorted(before.keys() | after.keys())
        if before.get(stage) != after.get(stage)
    ]

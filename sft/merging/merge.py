"""Base model + adapters -> a verified folder, tensor by tensor, in float32, rounded once, published by rename."""

import errno
import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft.errors import RunFailed
from sft.merging.adapter_files import Adapter, LowRank, Update, read_adapter, updates_of
from sft.merging.fold import Folded, Output, write_all
from sft.merging.placement import Wanted, place
from sft.merging.plain import Places, UnknownLayout, base_places
from sft.merging.weights import (
    DTYPES,
    FLOATS,
    INDEX,
    NAMES,
    StoredTensor,
    create_shard,
    load,
    model_folder,
    read_config,
    read_header,
    shard_paths,
    write_index,
)
from sft.stages.paths import ADAPTER_CONFIG, MANIFEST, MODEL_CONFIG, TRAINING_CONFIG
from sft.stages.paths import MERGE_RECORD as RECORD
from sft.storage import atomic, json_files, seals

# What makes a model folder usable beside its weights.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*")
NOT_COPIED = {RECORD, INDEX, seals.MARK, MANIFEST, TRAINING_CONFIG, ADAPTER_CONFIG, MODEL_CONFIG}
LARGE_LOSS = 0.5  # a shorter update than this is mostly noise once rounded
SPARE_BYTES = 64 * 1024 * 1024  # tokenizer and other side files


@dataclass
class MergeRecord:
    """What a merge did. `max_abs_diff` and `kl` are filled by the verification on probe prompts (sft/merging/probe.py).

    `rounding_loss` is the length of the error that rounding made, as a share of the length of the update, over a
    sample of every changed tensor. `path` says who merged: `streaming`, or `peft` for what only PEFT can.
    """

    base_model: str
    base_revision: str | None
    adapters: list[dict[str, str]]
    dtype: str
    requested_dtype: str | None = None
    base_fingerprint: str | None = None
    path: str = "streaming"
    tensors_changed: int = 0
    rounding_loss: float | None = 0.0
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    max_abs_diff: float | None = None
    kl: float | None = None


def merge(
    base: str | Path,
    adapters: Sequence[Path],
    target: Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    fingerprint: str | None = None,
    trust_remote_code: bool = False,
    finish: Callable[[Path, MergeRecord], None] | None = None,
) -> MergeRecord:
    """Folds the adapters, in order, into the base model and publishes the result at `target`.

    `dtype` is a torch name (bfloat16, ...); None keeps that of each base tensor. `fingerprint`: what the base's content
    is known by (`is_current` asks for it). `finish` sees the complete folder
    before it is published; what it raises keeps it from being published. Raises Problems for a base or adapter that
    cannot be used, RunFailed when an adapter tensor has no place, an adapter changes nothing or the disk is full.
    """
    started = time.perf_counter()
    folder, commit = model_folder(str(base), revision)
    config = read_config(folder)
    loaded = [read_adapter(Path(adapter)) for adapter in adapters]
    changed = [name for adapter in loaded for name in adapter.tensors]
    identities = [{"path": str(adapter.folder), "sha256": adapter.sha256} for adapter in loaded]
    record = MergeRecord(str(base), commit, identities, dtype or "", dtype, fingerprint)
    with _disk_full_explained(target), atomic.published_folder(target) as partial:
        try:
            with base_places(folder, target, config, changed=changed, trust_remote_code=trust_remote_code) as (
                layout,
                shards,
            ):
                untied = _stream(layout, shards, adapters=loaded, partial=partial, record=record)
        except UnknownLayout as reason:
            from sft.merging.peft_merge import merge_with_peft

            record.path = "peft"
            record.warnings.append(f"merged by PEFT, with the whole model in memory: {reason}")
            untied = merge_with_peft(folder, loaded, partial, dtype=dtype, trust_remote_code=trust_remote_code)
        _write_side_files(
            folder, partial, _edited({"dtype": dtype, **config} if dtype else config, dtype, untied=untied)
        )
        record.dtype = record.dtype or _main_dtype(partial)
        record.seconds, record.peak_rss_bytes = time.perf_counter() - started, peak_rss_bytes()
        if finish:
            finish(partial, record)
        (partial / RECORD).write_text(json_files.json_text(asdict(record)) + "\n", encoding="utf-8")
        seals.seal(partial, digest="xxh3")
    if not finish:
        record.seconds = time.perf_counter() - started
    return record


@dataclass(frozen=True)
class Ingredients:
    """What a merged base is made from, by content: the base's fingerprint, each adapter's sha256, the format asked for.

    `dtype` None asks for that of the base, whatever it is.
    """

    base: str
    adapters: tuple[str, ...]
    dtype: str | None = None


def is_current(target: Path, ingredients: Ingredients) -> bool:
    """Whether a merged folder is whole and was made from exactly these, wherever they lay."""
    try:
        record = json_files.read_json(target / RECORD)
        found = Ingredients(
            record["base_fingerprint"], tuple(each["sha256"] for each in record["adapters"]), record["requested_dtype"]
        )
    except (FileNotFoundError, NotADirectoryError, json_files.DamagedFile, KeyError, TypeError):
        return False
    return found == ingredients and not (seals.is_sealed(target) and seals.damage(target))


def record_verification(target: Path, figures: dict[str, float]) -> None:
    """Adds `max_abs_diff` and `kl` (sft.merging.probe.verify) to a merged folder's merge.json."""
    record = json_files.read_json(target / RECORD)
    json_files.write_json(target / RECORD, record | {name: figures[name] for name in ("max_abs_diff", "kl")})
    seals.seal(target, digest="xxh3", only=RECORD)


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _disk_full_explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFailed(f"The disk is full: {target} could not be written. Free space and run again.") from error


def _stream(
    layout: Places,
    shards: dict[str, list[StoredTensor]],
    *,
    adapters: list[Adapter],
    partial: Path,
    record: MergeRecord,
) -> bool:
    """Writes the merged shards into `partial`; True when tied embeddings had to be parted."""
    updates = updates_of(adapters, layout)
    dtype = NAMES[getattr(torch, record.dtype)] if record.dtype else None
    wanted, untied = place(layout, shards, updates=updates, dtype=dtype)
    _check_space(partial, wanted)
    outputs: list[tuple[Wanted, Output]] = []
    for name, tensors in wanted.items():
        spots = create_shard(partial / name, [(each.name, each.dtype, each.source.shape) for each in tensors])
        outputs += [(w, Output(w.source, spot, w.terms, w.base)) for w, spot in zip(tensors, spots, strict=True)]
    folded = write_all([output for _, output in outputs])
    write_index(partial, {name: read_header(partial / name) for name in wanted})
    _conclude(record, adapters, updates=updates, outputs=outputs, folded=folded)
    return untied


def _check_space(partial: Path, wanted: dict[str, list[Wanted]]) -> None:
    weights = sum(DTYPES[w.dtype].itemsize * w.source.elements for tensors in wanted.values() for w in tensors)
    needed, free = weights + SPARE_BYTES, atomic.free_bytes(partial)
    if free < needed:
        raise RunFailed(
            f"The merged model needs {needed / 1e9:.2f} GB and {partial.parent} has {free / 1e9:.2f} GB free. "
            "Free space there or point SFT_OUT_LORA_DIR elsewhere."
        )


def _conclude(
    record: MergeRecord,
    adapters: list[Adapter],
    *,
    updates: dict[str, list[Update]],
    outputs: list[tuple[Wanted, Output]],
    folded: dict[str, list[Folded]],
) -> None:
    """Fills the record; RunFailed for an adapter whose merge changed no weight although it holds an update."""
    changed = {w.name for w, _ in outputs if any(each.changed for each in folded.get(w.name, []))}
    changed |= {w.name for w, output in outputs if w.adapters and output.is_copy}  # trained in full, taken over whole
    record.tensors_changed = len(changed)
    for number, adapter in enumerate(adapters):
        if _is_silent(number, updates):
            record.warnings.append(f"{adapter.folder} changes nothing: every B is zero, as before the first step")
        elif not any(number in w.adapters and w.name in changed for w, _ in outputs):
            raise RunFailed(
                f"{adapter.folder}: merging it changed no weight, its update is smaller than the merged number format "
                "can hold. Set SFT_MERGE_DTYPE=float32, or train longer or at a higher rate."
            )
    update = sum(each.update for results in folded.values() for each in results)
    lost = sum(each.lost for results in folded.values() for each in results)
    record.rounding_loss = (lost / update) ** 0.5 if update else 0.0
    if record.rounding_loss > LARGE_LOSS:
        record.warnings.append(
            f"rounding the merged weights adds an error {record.rounding_loss:.2f} times as long as the adapters' "
            "update; SFT_MERGE_DTYPE=float32 keeps all of it"
        )


def _is_silent(number: int, updates: dict[str, list[Update]]) -> bool:
    """True when the adapter consists of low-rank updates whose B is zero throughout."""
    mine = [update for found in updates.values() for update in found if update.adapter == number]
    return all(isinstance(u, LowRank) and u.magnitude is None and not load(u.b).any() for u in mine)


def _main_dtype(folder: Path) -> str:
    """The torch name of the number format most weights have."""
    sizes: Counter[str] = Counter()
    for path in shard_paths(folder):
        for tensor in read_header(path):
            sizes[tensor.dtype] += tensor.size if tensor.dtype in FLOATS else 0
    return str(DTYPES[max(sizes, key=lambda name: sizes[name])]).removeprefix("torch.")


def _edited(config: dict[str, Any], dtype: str | None, *, untied: bool) -> dict[str, Any]:
    """The base's config.json with the number format and the parted embeddings of the merged weights."""
    edited = {
        key: _edited(value, dtype, untied=False) if isinstance(value, dict) else value for key, value in config.items()
    }
    for key in {"dtype", "torch_dtype"} & edited.keys() if dtype else ():
        edited[key] = dtype
    if untied:
        edited["tie_word_embeddings"] = False
    return edited


def _write_side_files(folder: Path, partial: Path, config: dict[str, Any]) -> None:
    (partial / MODEL_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in sorted({path for pattern in SIDE_FILES for path in folder.glob(pattern)}):
        if path.name not in NOT_COPIED and path.is_file():
            shutil.copyfile(path, partial / path.name)
    if (templates := folder / "additional_chat_templates").is_dir():
        shutil.copytree(templates, partial / templates.name)

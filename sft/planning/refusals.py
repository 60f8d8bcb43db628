"""What a run would die of, as far as it is known before the first step: refused by a run, listed by `--check`."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from huggingface_hub import constants, try_to_load_from_cache
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging

from sft.data.losses import nothing_left
from sft.data.sources.load import load_source
from sft.data.sources.readers import SourceError
from sft.distributed.launch import launched
from sft.errors import Problems
from sft.evaluation.generation_evaluation import is_answered
from sft.merging.weights import read_header, shard_paths
from sft.models.fitness import blank, model_problems
from sft.models.model import LOAD_ERRORS, OTHER_SIZES, cut_away, lacking, load_config, load_problem, unfit
from sft.planning.machine import machine_problems
from sft.scoring.own import MeasureError, load_own
from sft.stages.launch_checks import launch_problems
from sft.stages.paths import MODEL_CONFIG
from sft.stages.safety_copy import mirror_problems

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sft.settings import Settings


def require_ready(settings: Settings) -> None:
    """Before tokenizer and rows are loaded.

    Raises:
        Problems: this machine, its caches or the model's files can't carry the stage.
    """
    machines = launched().processes > launched().local_processes
    if problems := refusals(settings):
        raise Problems(problems, every_rank=machines)


def refusals(settings: Settings) -> list[str]:
    """Everything that is wrong with the machine, its caches, the base model's files and the evaluation's data."""
    caches = list(cache_problems(settings))
    folder = Path(settings.base_model)
    damaged = list(file_problems(folder)) if folder.is_dir() else []
    unfit = [] if caches else model_problems(settings)
    fit = [] if unfit or damaged or not folder.is_dir() else weight_problems(folder, settings)
    return [
        *machine_problems(settings),
        *launch_problems(settings),
        *mirror_problems(settings),
        *caches,
        *damaged,
        *(unfit or fit),
        *measure_problems(settings),
        *([] if caches else question_problems(settings)),
        # Rows are read after the tokenizer: where the model already ends the run, their problems stand beside its own.
        *(required_sources(settings) if unfit else []),
    ]


def required_sources(settings: Settings) -> list[str]:
    """`failing_sources`, where the stage can't do without them."""
    failed = failing_sources(settings)
    return failed if settings.strict or len(failed) == len(settings.sources) else []


def failing_sources(settings: Settings) -> list[str]:
    """A text for each data set to train on that can't be loaded."""
    failed = []
    for source in settings.sources:
        try:
            load_source(source, processes=settings.num_proc)
        except SourceError as error:
            failed.append(f"[ERROR] Failed to load {source.id}: {error}")
        except Problems as found:
            failed += found.problems
    return failed


def cache_problems(settings: Settings) -> Iterator[str]:
    """Caches that must be written and can't be: clusters share them read-only."""
    rows = Path(datasets.config.HF_DATASETS_CACHE)
    if place := unwritable(rows):
        yield (
            f"HF_DATASETS_CACHE={rows}: the cache of prepared rows can't be written ({place} is read-only for this "
            "user); set HF_DATASETS_CACHE to a folder that can"
        )
    hub = Path(constants.HF_HUB_CACHE)
    name, revision = settings.base_model, settings.model_revision
    if Path(name).exists() or not unwritable(hub):
        return
    if not isinstance(try_to_load_from_cache(name, MODEL_CONFIG, revision=revision), str):
        yield (
            f"HF_HUB_CACHE={hub}: does not hold {name} and can't be written; set HF_HUB_CACHE to a folder that can, or "
            "SFT_BASE_MODEL to a folder"
        )


def unwritable(folder: Path) -> Path | None:
    """The folder, or what there is of its path, if this user can't write there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return None if os.access(there, os.W_OK | os.X_OK) else there


def file_problems(folder: Path) -> Iterator[str]:
    """Weight files of a local model that are cut off or missing: an interrupted copy or download."""
    indexes = [path for path in folder.glob("*.index.json") if path.name.startswith(("model.", "pytorch_model."))]
    faults = {path.name: "is damaged: it names no weights" for path in indexes if not _shards(path)}
    named = {name for path in indexes for name in _shards(path)}
    faults |= {name: "is missing" for name in sorted(named) if not (folder / name).is_file()}
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        if fault := (_cut_off(path) if path.suffix == ".safetensors" else _broken_archive(path)):
            faults[path.name] = fault
    for name, fault in faults.items():
        yield f"SFT_BASE_MODEL={folder}: {name} {fault}; copy or download the model again"


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _cut_off(path: Path) -> str:
    """What is wrong with a safetensors file: 8 bytes with the length of the header, the header, then the numbers."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length.to_bytes(8, "little") == b"version ":
            return "is a Git LFS pointer and no weights: run git lfs pull there"
        if size < 8 or length > size - 8:
            return f"is cut off at {size:,} bytes"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is damaged: its header can't be read"
    expected = 8 + length + max(ends, default=0)
    if size == expected:
        return ""
    return f"{'is cut off' if size < expected else 'is too long'}: {size:,} bytes of {expected:,}"


def _broken_archive(path: Path) -> str:
    """torch's files are zip archives (since 1.6), whose list of contents stands at the end."""
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"
    return "is cut off" if archive and not zipfile.is_zipfile(path) else ""


def weight_problems(folder: Path, settings: Settings) -> Iterator[str]:
    """Weights of a local model that are not those of its architecture: transformers would fill what is missing with
    random numbers, and train on. Only names and shapes are read, through the library's own renaming."""
    config = load_config(settings)
    if getattr(config, "quantization_config", None) is not None:
        yield from _quantised_problems(config, folder)
        return
    paths = shard_paths(folder)
    if not paths:
        if not any(folder.glob("pytorch_model*.bin")):
            yield from unfit(folder, "holds no weights (model.safetensors)").problems
        return
    found = {} if launched().splits_weights else _compared(paths, config, settings)
    if found.get("mismatched_keys"):
        yield from unfit(folder, OTHER_SIZES).problems
    elif found.get("missing_keys"):
        yield from unfit(folder, lacking(found["missing_keys"])).problems
    elif cut := cut_away(found.get("unexpected_keys", ()), blank(config, settings)):
        yield from unfit(folder, cut).problems


def _compared(paths: list[Path], config: PretrainedConfig, settings: Settings) -> dict[str, Any]:
    """What transformers says of names and shapes when it loads them, without a number being read."""
    stored = {tensor.name: torch.empty(tensor.shape, device="meta") for path in paths for tensor in read_header(path)}
    try:
        with _silent_loading():
            loaded: Any = type(blank(config, settings)).from_pretrained(
                None, config=config, state_dict=stored, device_map={"": "meta"}, output_loading_info=True,
                ignore_mismatched_sizes=True, dtype=torch.float32,
            )  # fmt: skip
    except (*LOAD_ERRORS, RuntimeError):
        return {}  # a renaming that needs numbers: the run's own loading decides
    return loaded[1]


@contextmanager
def _silent_loading() -> Iterator[None]:
    """Without the library's report, which a person would read as the run's."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _quantised_problems(config: PretrainedConfig, folder: Path) -> Iterator[str]:
    """Weights that were quantised by a method whose package or device is not here."""
    stored = config.quantization_config
    if not AutoHfQuantizer.supports_quant_method(stored):
        return
    try:
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment(device_map={"": "cpu"})
    except (ImportError, RuntimeError) as error:
        yield from load_problem("the model", str(folder), error).problems


def measure_problems(settings: Settings) -> Iterator[str]:
    """A measure of one's own that can't be asked: its file is run here for the first time."""
    try:
        load_own(settings.gen_eval)
    except MeasureError as error:
        yield f"SFT_GEN_EVAL={settings.gen_eval}: {error}"


def question_problems(settings: Settings) -> Iterator[str]:
    """Data sets of the generation evaluation that can't be loaded or give nothing to ask: a run reads them when it has
    begun to write."""
    for source in settings.gen_eval_sources if settings.gen_eval != "none" else ():
        setting = "SFT_GEN_EVAL_DATASET"
        try:
            rows = load_source(source, processes=settings.num_proc)
        except SourceError as error:
            yield f"{setting}={source.id}: {error}"
            continue
        except Problems as found:
            yield from found.problems
            continue
        yield from nothing_left(setting, [rows], settings)
        if len(rows.dataset) and not any(map(is_answered, rows.dataset["messages"])):
            yield f"{setting}={source.id}: no row has a question and an answer to compare with; give it rows with both"

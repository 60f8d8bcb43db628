"""A LoRA adapter as it lies on disk: which parameters it changes and by what, in PEFT's arithmetic.

Factors are read when a shard needs them and kept no longer, so that a large adapter costs no memory.
"""

import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.errors import Problems, RunFailed
from sft.merging.plain import Places, UnknownLayout
from sft.merging.weights import StoredTensor, load, read_header
from sft.stages.paths import ADAPTER as WEIGHTS
from sft.stages.paths import ADAPTER_CONFIG as CONFIG
from sft.stages.paths import ADAPTER_PICKLE as PICKLED
from sft.storage.seals import sha256

PREFIX = "base_model.model."
EMBEDDINGS = {"embed_tokens", "lm_head"}  # PEFT's EMBEDDING_LAYER_NAMES
PARTS = r"lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
LORA_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{PARTS})(\.default)?(\.weight)?$")
# Settings under which an adapter is more than W + scaling * B A (DoRA is handled): PEFT merges these itself.
SPECIAL = (
    *("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication"),
    *("lora_bias", "lora_ga_config", "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora"),
    *("velora_config", "megatron_config"),
)


@dataclass(frozen=True)
class LowRank:
    """W + scaling * B A for one parameter; `experts` > 1 where A and B hold the factors of a stack of experts."""

    adapter: int
    a: StoredTensor
    b: StoredTensor
    scaling: float
    transposed: bool = False
    experts: int = 1
    magnitude: StoredTensor | None = None


@dataclass(frozen=True)
class Replacement:
    """A parameter trained in full (modules_to_save): `value` takes the place of the base's."""

    adapter: int
    value: StoredTensor


Update = LowRank | Replacement


@dataclass(frozen=True)
class Adapter:
    """One adapter folder: its configuration, its tensors, the file's sha256."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    sha256: str


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder; Problems when there is none or it cannot be folded into weights."""
    if not (folder / CONFIG).is_file():
        raise Problems([f"{folder}: holds no adapter ({CONFIG} is missing); name the folder of a finished stage"])
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("bias", "none") != "none":
        raise Problems([f'{folder}: bias="{config["bias"]}" cannot be merged; train the adapter with bias="none"'])
    if not (folder / WEIGHTS).is_file():
        advice = "save it again with save_pretrained" if (folder / PICKLED).is_file() else "train the stage again"
        raise Problems([f"{folder}: {WEIGHTS} is missing; {advice}"])
    tensors = {tensor.name: tensor for tensor in read_header(folder / WEIGHTS)}
    if not tensors:
        raise RunFailed(f"{folder / WEIGHTS} holds no tensors: the stage saved nothing. Train it again.")
    return Adapter(folder, config, tensors, sha256(folder / WEIGHTS))


def is_plain(adapter: Adapter) -> bool:
    """True when the adapter is LoRA or DoRA and changes nothing but weights."""
    config = adapter.config
    initialised = config.get("init_lora_weights", True) in (True, False, "gaussian")
    # Where head and embedding are saved in full, PEFT ties those; else it makes one pair of factors serve both.
    saved = {name.rsplit(".", 1)[-1] for name in config.get("modules_to_save") or ()} & EMBEDDINGS
    tied = bool(config.get("ensure_weight_tying")) and not saved
    plain = config.get("peft_type") == "LORA" and initialised and not tied
    return plain and not any(config.get(name) for name in SPECIAL)


def updates_of(adapters: Iterable[Adapter], layout: Places) -> dict[str, list[Update]]:
    """Parameter (or, for experts stored one by one, checkpoint key) -> its updates in the order of the adapters.

    Raises UnknownLayout where PEFT has to do it, RunFailed naming every adapter tensor that has no place in the model.
    """
    updates: dict[str, list[Update]] = defaultdict(list)
    for number, adapter in enumerate(adapters):
        if not is_plain(adapter):
            raise UnknownLayout(f"{adapter.folder} is not plain LoRA")
        homeless = _place(number, adapter, layout=layout, updates=updates)
        if homeless:
            raise RunFailed(
                f"{adapter.folder}: {len(homeless)} adapter tensors have no place in the base model: "
                f"{', '.join(homeless[:8])}{', ...' if len(homeless) > 8 else ''}. Was it trained on another model?"
            )
    return dict(updates)


def _place(number: int, adapter: Adapter, *, layout: Places, updates: dict[str, list[Update]]) -> list[str]:
    """Adds the updates of one adapter; the names of its tensors that have no place."""
    homeless = []
    for module, parts in _modules(adapter.tensors).items():
        parameter = _target(module, adapter.config, layout)
        if parameter is None:
            homeless += [tensor.name for tensor in parts.values()]
        else:
            updates[parameter].append(_low_rank(number, adapter, parameter=parameter, parts=parts, layout=layout))
    for name, tensor in adapter.tensors.items():
        if not LORA_KEY.match(name):
            parameter = _full_name(name, layout)
            if parameter is None:
                homeless.append(name)
            else:
                updates[parameter].insert(_first_of(number, updates[parameter]), Replacement(number, tensor))
    return homeless


def _first_of(number: int, updates: list[Update]) -> int:
    """The position before the updates of adapter `number`: a saved base layer comes before its low-rank update."""
    return sum(update.adapter < number for update in updates)


def _modules(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := LORA_KEY.match(name):
            modules[match["module"].removeprefix(PREFIX)][match["part"].replace("embedding_", "")] = tensor
    return dict(modules)


def _target(module: str, config: dict[str, Any], layout: Places) -> str | None:
    """The parameter a pair of factors belongs to, None when there is none."""
    plain = re.sub(r"(\.base_layer)+$", "", module)
    depth = module.count(".base_layer")
    if layout.is_matrix(plain):
        return f"{plain}.weight"
    owner = layout.module(plain)
    if owner is None:
        return _stored_alone(f"{plain}.weight", layout)
    wanted = [f"{plain}.{name}" for name, _ in owner.named_parameters(recurse=False)]
    wanted = [name for name in wanted if _is_targeted(name, config.get("target_parameters") or ())]
    if depth < len(wanted):  # PEFT wraps in the order of registration: the last parameter is the outermost
        return wanted[-1 - depth]
    if wanted or not list(owner.parameters(recurse=False)):
        return None
    raise UnknownLayout(f"{plain} is a {type(owner).__name__}")


def _stored_alone(key: str, layout: Places) -> str | None:
    """A weight by its name on disk: for experts trained one by one where they were kept so."""
    if key in layout.keys:
        return key
    renamed, conversion = layout.parameter_name(key)
    if conversion is not None:
        raise UnknownLayout(f"{key} is fused into {renamed}")
    return renamed if renamed in layout.parameters else None


def _is_targeted(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _full_name(name: str, layout: Places) -> str | None:
    """The parameter that a tensor saved in full stands for."""
    plain = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".base_layer.", ".")
    return plain if plain in layout.parameters else None


def _low_rank(
    number: int, adapter: Adapter, *, parameter: str, parts: dict[str, StoredTensor], layout: Places
) -> LowRank:
    where = f"{adapter.folder}: {parameter}"
    if missing := {"lora_A", "lora_B"} - parts.keys():
        raise RunFailed(f"{where} has no {missing.pop()}: the adapter file is incomplete. Train the stage again.")
    a, b = parts["lora_A"], parts["lora_B"]
    shape = layout.shape(parameter)
    if len(a.shape) != 2 or len(b.shape) != 2 or len(shape) not in (2, 3):
        raise UnknownLayout(f"{where} is neither a matrix nor a stack of matrices")
    experts = shape[0] if len(shape) == 3 else 1
    transposed = layout.is_transposed(parameter)
    if (b.shape[0], a.shape[1]) != (tuple(reversed(shape[-2:])) if transposed else tuple(shape[-2:])):
        raise RunFailed(f"{where} is {shape} in the base model, the adapter's factors are {b.shape} and {a.shape}.")
    scaling = _scaling(adapter.config, parameter, rank=a.shape[0] // experts, where=where)
    return LowRank(number, a, b, scaling, transposed, experts, parts.get("lora_magnitude_vector"))


def _scaling(config: dict[str, Any], parameter: str, *, rank: int, where: str) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, with PEFT's per-module patterns."""
    module = parameter.removesuffix(".weight")
    names = [parameter] if _is_targeted(parameter, config.get("target_parameters") or ()) else [module]
    expected = _pattern_value(config.get("rank_pattern") or {}, names[0], config["r"])
    if expected != rank:
        raise RunFailed(f"{where} has rank {rank} but {CONFIG} says {expected}; the two files do not belong together.")
    alpha = _pattern_value(config.get("alpha_pattern") or {}, names[0], config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


@functools.lru_cache(maxsize=16)
def factors(update: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """A as (experts, r, in) and B as (experts, out, r), float32, in the order PEFT lays experts out."""
    a, b = load(update.a), load(update.b)
    stacked = b.reshape(b.shape[0], -1, update.experts).permute(2, 0, 1)
    return a.reshape(update.experts, -1, a.shape[1]), stacked.contiguous()

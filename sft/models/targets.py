"""Where a stage's adapter goes: the target modules in this architecture, and what they don't reach."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from sft.errors import Problems
from sft.models.saved import is_named, saved_keywords, saved_problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.settings import Settings

# transformers 5 keeps the experts of a mixture fused: by the usual names, the parameter that holds them.
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_CARRIERS = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d)
# PEFT refuses these: the fused kernels of Mamba layers take their weights past any adapter.
_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_PAST_ADAPTERS = re.compile(r"(.*\.)?(out_proj|conv1d)")
NAME = "SFT_LORA_TARGET_MODULES"


@dataclass(frozen=True)
class Targets:
    """What an architecture offers: modules that can carry an adapter by full name, others, fused experts.

    `converted`: PEFT itself moves the usual names to the fused experts, away from other modules of these names.
    """

    carriers: tuple[str, ...]
    others: tuple[str, ...]
    experts: tuple[str, ...]
    converted: bool
    towers: tuple[str, ...] = field(default=())

    def fits(self, target: str) -> bool:
        """Whether an adapter can go on what is called so."""
        fused = bool(self.experts) and (target in _FUSED or (self.converted and target == "gate"))
        return fused or _any(target, self.carriers)

    def names(self) -> list[str]:
        """Last parts of the names that can be given."""
        names = {name.rsplit(".", 1)[-1] for name in self.carriers if not name.endswith("embed_tokens")}
        return sorted(names | (set(_FUSED) if self.experts else set()))


def _any(target: str, names: tuple[str, ...]) -> bool:
    return any(is_named(name, target) for name in names)


def targets_of(model: PreTrainedModel) -> Targets:
    """What adapters can go on in a model, which may be without memory."""
    towers = tuple(_towers(model))
    head = model.get_output_embeddings()
    carriers: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if name and not name.startswith(towers or ("\n",)):
            carries = isinstance(module, _CARRIERS) or type(module).__name__ == "Conv1D"
            (carriers if carries and module is not head and not _past_adapters(model, name) else others).append(name)
    experts = tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.rsplit(".", 1)[-1] in _FUSED.values() and ".experts." in f".{name}"
    )
    probe = LoraConfig(target_modules=list(_FUSED))
    convert_peft_config_for_transformers(probe, model, None)
    return Targets(tuple(carriers), tuple(others), experts, bool(probe.target_parameters), towers)


def _past_adapters(model: PreTrainedModel, name: str) -> bool:
    return model.config.model_type in _MAMBA and _PAST_ADAPTERS.fullmatch(name) is not None


def _towers(model: PreTrainedModel) -> Iterator[str]:
    """Prefixes of what text never passes: the parts for images and sound of a model with a text model inside."""
    if model.config.get_text_config() is model.config:
        return
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} | {id(model.get_output_embeddings())}
    around = {id(module) for module in model.modules() if any(child is decoder for child in module.modules())}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if id(module) not in inside | around and id(parent) in around:
            yield name


def adapter_config(model: PreTrainedModel, settings: Settings) -> LoraConfig | None:
    """The LoRA configuration of the stage; None for full fine-tuning.

    Raises:
        Problems: a target does not exist in the model or can't carry an adapter.
    """
    if not settings.use_lora:
        return None
    offered = targets_of(model)
    if problems := adapter_problems(model, settings):
        raise Problems(problems)
    targets: list[str] = list(settings.lora_target_modules)
    keywords: dict[str, Any] = {"target_modules": "all-linear" if targets == ["all-linear"] else targets}
    if offered.experts and not offered.converted:
        keywords |= _expert_targets(offered, targets, settings)
    if offered.towers:
        keywords["exclude_modules"] = rf"({'|'.join(map(re.escape, offered.towers))})(\..*)?"
    elif targets == ["all-linear"] and model.config.model_type in _MAMBA:
        keywords["exclude_modules"] = _PAST_ADAPTERS.pattern
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.lora_rslora,
        use_dora=settings.lora_dora,
        **keywords,
        **saved_keywords(model, settings, offered.towers),
    )


def _expert_targets(offered: Targets, targets: list[str], settings: Settings) -> dict[str, Any]:
    """As PEFT does for the mixtures it knows: gate and up are one matrix, with twice the rank."""
    wanted = set(_FUSED.values()) if targets == ["all-linear"] else {_FUSED[t] for t in targets if t in _FUSED}
    if not wanted:
        return {}
    there = {name.rsplit(".", 1)[-1] for name in offered.experts} & wanted
    keywords: dict[str, Any] = {"target_parameters": sorted(f"experts.{name}" for name in there)}
    if targets != ["all-linear"]:
        keywords["target_modules"] = [t for t in targets if t not in _FUSED or _any(t, offered.carriers)]
    if "gate_up_proj" in there:
        twice = {"rank_pattern": 2 * settings.lora_r, "alpha_pattern": 2 * settings.lora_alpha}
        keywords |= {name: {r".*\.experts\.gate_up_proj": value} for name, value in twice.items()}
    return keywords


def adapter_problems(model: PreTrainedModel, settings: Settings) -> list[str]:
    """What is wrong with the names of targets and of modules trained in full."""
    offered, targets = targets_of(model), settings.lora_target_modules
    in_full = saved_problems(
        model, settings, towers=offered.towers, targets=lambda name: any(is_named(name, each) for each in targets)
    )
    return [*target_problems(offered, settings, type(model).__name__), *in_full]


def target_problems(offered: Targets, settings: Settings, kind: str) -> Iterator[str]:
    """Names that a person wrote and that fit nothing; defaults only where none of them fits."""
    targets = tuple(settings.lora_target_modules)
    if not settings.use_lora:
        return
    if targets == ("all-linear",):
        yield from _expert_problems(offered, settings)
        return
    wrong = [target for target in targets if not offered.fits(target)]
    if settings.origins.get(NAME, "default") == "default" and len(wrong) < len(targets):
        wrong = []
    for target in wrong:
        if target == "all-linear":
            yield f"{NAME}={','.join(targets)}: all-linear stands alone; leave the other names out"
            continue
        if _any(target, offered.others):
            yield (
                f"{NAME}={','.join(targets)}: {target} can't carry an adapter in {kind}; "
                f"choose among {', '.join(offered.names())}, or use all-linear"
            )
            continue
        close = get_close_matches(target.lower(), offered.names(), n=1)
        yield (
            f"{NAME}={','.join(targets)}: {kind} has no {target}{f' (did you mean {close[0]}?)' if close else ''}; "
            f"it has {', '.join(offered.names())}, or use all-linear"
        )
    yield from _expert_problems(offered, settings)


def _expert_problems(offered: Targets, settings: Settings) -> Iterator[str]:
    named = set(_FUSED if settings.lora_target_modules == ("all-linear",) else settings.lora_target_modules)
    wanted = named & set(_FUSED) if offered.experts else set()
    if len(wanted & {"gate_proj", "up_proj"}) == 1:
        yield (
            f"{NAME}={','.join(settings.lora_target_modules)}: gate_proj and up_proj are one matrix in this model's "
            "experts; name both or neither"
        )
    if wanted and settings.lora_dropout:
        yield f"SFT_LORA_DROPOUT={settings.lora_dropout}: adapters on experts know no dropout; set it to 0"
    if wanted and settings.lora_dora:
        yield "SFT_LORA_DORA=1: adapters on experts know no DoRA; leave it out, or gate_proj, up_proj and down_proj"


def target_notes(model: PreTrainedModel, settings: Settings) -> list[str]:
    """What a person should know of the targets in this model: warnings, [] where there are none."""
    if not settings.use_lora:
        return []
    offered, targets = targets_of(model), tuple(settings.lora_target_modules)
    found = []
    missing = [target for target in targets if target != "all-linear" and not offered.fits(target)]
    if missing and not list(target_problems(offered, settings, "")):  # else they are a problem already
        found.append(f"this model has no {', '.join(missing)}; it has {', '.join(offered.names())} ({NAME})")
    reached = targets == ("all-linear",) or set(targets) & set(_FUSED)
    if offered.experts and not reached:
        found.append(
            "only attention is trained in this mixture of experts, whose knowledge lies in the experts: add gate_proj, "
            f"up_proj, down_proj to {NAME}"
        )
    if offered.experts and offered.converted and reached:
        left = sorted({re.sub(r"\d+", "N", n) for n in offered.carriers if n.rsplit(".", 1)[-1] in _FUSED})
        if left:
            found.append(f"gate_proj, up_proj and down_proj reach the routed experts alone, not {', '.join(left)}")
    return [f"[WARNING] {text}" for text in found]

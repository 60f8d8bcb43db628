"""Modules trained in full beside the adapter and kept with it: SFT_LORA_MODULES_TO_SAVE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sft.distributed.launch import launched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.settings import Settings

NAME = "SFT_LORA_MODULES_TO_SAVE"


def is_named(name: str, wanted: str) -> bool:
    """Whether a module's full name is this one or ends with it."""
    return name == wanted or name.endswith(f".{wanted}")


def quantised_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Modules that bitsandbytes quantises, with their weight: linear layers, not embeddings, norms, the output head or
    experts kept in one tensor."""
    kept = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            yield name, module.weight


def _offered(model: PreTrainedModel, towers: tuple[str, ...]) -> list[str]:
    """Full names of modules that hold weights themselves; stacks of experts are no module to train in full."""
    found = []
    for name, module in model.named_modules():
        weights = list(module.parameters())
        whole = weights and not list(module.children()) and all(weight.ndim <= 2 for weight in weights)
        if whole and not name.startswith(towers or ("\n",)):
            found.append(name)
    return found


def _tied(model: PreTrainedModel) -> list[str]:
    """The modules that share the embedding's weights, the embedding first; [] where none does."""
    embeddings = model.get_input_embeddings()
    own = next(name for name, module in model.named_modules() if module is embeddings)
    pairs: dict[str, str] = dict(model.all_tied_weights_keys)
    others = [name.removesuffix(".weight") for name, source in pairs.items() if source == f"{own}.weight"]
    return [own, *others] if others else []


def saved_problems(
    model: PreTrainedModel, settings: Settings, *, towers: tuple[str, ...], targets: Callable[[str], bool]
) -> Iterator[str]:
    """Names that fit nothing, or what can't be trained in full. `targets`: whether a module's full name carries an
    adapter as well."""
    wanted = settings.lora_modules_to_save
    if not wanted or not settings.use_lora:
        return
    offered, kind = _offered(model, towers), type(model).__name__
    quantised = {name for name, _ in quantised_layers(model)} if settings.quantised else ()
    tied = _tied(model)
    names = sorted({name.rsplit(".", 1)[-1] for name in offered if name not in quantised})
    given = f"{NAME}={','.join(wanted)}"
    for each in wanted:
        fitting = [name for name in offered if is_named(name, each)]
        together = [*fitting, *(tied if set(fitting) & set(tied) else ())]
        if not fitting and any(is_named(name, each) for name, _ in model.named_modules()):
            yield f"{given}: {each} can't be trained in full in {kind}; choose among {', '.join(names)}"
        elif not fitting:
            close = get_close_matches(each.lower(), names, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            yield f"{given}: {kind} has no {each}{hint}; it has {', '.join(names)}"
        elif launched().sharding == "fsdp" and set(fitting) & set(tied):
            yield (
                f"{given}: {each} shares its weights ({' and '.join(tied)}), which FSDP tears apart once they are"
                " trained in full; launch with ddp.yaml, zero2.yaml or zero3.yaml, or leave it out"
            )
        elif any(name in quantised for name in fitting):
            yield f"{given}: {each} is quantised and can't be trained in full; choose among {', '.join(names)}"
        elif both := next((name for name in together if targets(name)), ""):
            target = both.rsplit(".", 1)[-1]
            yield f"{given}: {target} is among SFT_LORA_TARGET_MODULES as well; leave it out of one of the two"


def saved_keywords(model: PreTrainedModel, settings: Settings, towers: tuple[str, ...]) -> dict[str, Any]:
    """What PEFT's configuration says of them.

    PEFT takes every name that ends with a given text ("norm" is also the end of input_layernorm): it gets whole names
    where that is more. A head and an embedding that are one matrix stay one, whichever of the two is named.
    """
    if not settings.lora_modules_to_save:
        return {}
    offered, tied = _offered(model, towers), _tied(model)
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    kept: list[str] = []
    as_one = False
    for each in settings.lora_modules_to_save:
        fitting = [name for name in offered if is_named(name, each)]
        if set(fitting) & set(tied):
            as_one, fitting = True, [name for name in fitting if name not in tied]
        elif fitting == [name for name in every if name.endswith(each)]:
            fitting = [each]
        kept += [name for name in fitting if name not in kept]
    if as_one:
        return {"modules_to_save": [tied[0], *kept], "ensure_weight_tying": True}
    return {"modules_to_save": kept}


def saved_in_full(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    """{full name: (what is trained, what it began as)}."""
    return {
        name: (wrapper.modules_to_save["default"], wrapper.original_module)
        for name, wrapper in model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
    }


def keep_saved_exact(model: torch.nn.Module) -> None:
    """Modules trained in full in float32 and as they were loaded, whatever the rest of the model is kept in.

    Around them everything stays in the model's type: what comes in is cast outside of autocast, what goes out always.
    """
    for trained, original in saved_in_full(model).values():
        before = next(original.parameters()).dtype
        for mine, theirs in zip(trained.parameters(), original.parameters(), strict=False):  # a tied head has no own
            mine.data = theirs.data.to(torch.float32, copy=True)
        if before != torch.float32:
            trained.register_forward_pre_hook(_in_its_own_type)
            trained.register_forward_hook(lambda module, inputs, output, before=before: _cast(output, before))


def _in_its_own_type(module: torch.nn.Module, inputs: Any) -> Any:
    weight = next(module.parameters())
    return inputs if torch.is_autocast_enabled(weight.device.type) else _cast(inputs, weight.dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(one, values)

"""Where a parameter of the model in memory lies in the checkpoint on disk.

The two differ: transformers renames keys and fuses expert weights while loading (and splits them again while saving).
The model is built without memory (meta device) and transformers' own conversion tables are asked.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from sft.errors import Problems
from sft.merging.plain import Place, UnknownLayout
from sft.merging.weights import StoredTensor, convert_pickles, read_header, shard_paths


def meta_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a folder without its weights; Problems when transformers cannot build it."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise Problems(
            [f"SFT_BASE_MODEL={folder}: is no causal language model transformers can build: {error}"]
        ) from error


@contextmanager
def base_layout(
    folder: Path, target: Path, *, trust_remote_code: bool = False
) -> Iterator[tuple[Layout, dict[str, list[StoredTensor]]]]:
    """The layout of the base model in `folder`, and its tensors by the name of the file a merge writes them to.

    PyTorch pickles are first rewritten beside `target`, for as long as the context lasts.
    """
    paths = shard_paths(folder)
    with ExitStack() as stack:
        if not paths:
            pickles = sorted(folder.glob("pytorch_model*.bin"))
            if not pickles:
                raise Problems(
                    [f"SFT_BASE_MODEL={folder}: holds no model weights (*.safetensors); name a model folder"]
                )
            scratch = target.with_name(f"{target.name}.partial-{os.getpid()}-1")
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            paths = convert_pickles(pickles, scratch)
        shards = {path.name.replace("pytorch_model", "model"): read_header(path) for path in paths}
        stored = [tensor for tensors in shards.values() for tensor in tensors]
        yield Layout(meta_model(folder, trust_remote_code=trust_remote_code), stored), shards


class Layout:
    """Parameter names of `model` to the places that hold them on disk, and which parameters share one."""

    def __init__(self, model: PreTrainedModel, stored: Iterable[StoredTensor]) -> None:
        self.keys = {tensor.name: tensor for tensor in stored}
        self.model = model
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._meta = dict(model.state_dict(keep_vars=True))
        self.places: dict[str, list[Place]] = {}
        self._unknown: set[str] = set()
        self._find(self.keys)

    def is_matrix(self, name: str) -> bool:
        """Whether an adapter's pair of factors belongs to the weight of this module."""
        owner = self.module(name)
        return isinstance(owner, nn.Linear | nn.Embedding) or type(owner).__name__ == "Conv1D"

    def module(self, name: str) -> nn.Module | None:
        """The module of the model, None where there is none."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def parameter_name(self, key: str) -> tuple[str, str | None]:
        """The name in memory of a name on disk, and the pattern of the conversion it goes through, if any."""
        prefix = self.model.base_model_prefix
        return rename_source_key(key, self._renamings, self._converters, prefix, self._meta)

    def whereabouts(self, parameter: str) -> list[Place]:
        """Where a parameter lies on disk; [] when it is not there, UnknownLayout when its conversion is a rare one."""
        if parameter in self._unknown:
            raise UnknownLayout(f"the checkpoint stores {parameter} in a form that is not plain")
        return self.places.get(parameter, [])

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape in memory of a parameter, or of a checkpoint key that is none."""
        found = self.parameters.get(parameter)
        return self.keys[parameter].shape if found is None else tuple(found.shape)

    def is_transposed(self, parameter: str) -> bool:
        """True when the weight is stored (in, out), so that an adapter's B A has to be turned."""
        module, _, leaf = parameter.rpartition(".")
        if parameter not in self.parameters:
            return False
        owner = self.model.get_submodule(module)
        if isinstance(owner, nn.Embedding | Conv1D):
            return leaf == "weight"
        return bool(getattr(owner, "is_transposed", False)) and len(self.shape(parameter)) == 3

    def _find(self, stored: dict[str, StoredTensor]) -> None:
        by_pattern = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}
        collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key in sorted(stored, key=dot_natural_key):
            parameter, pattern = self.parameter_name(key)
            if pattern is None:
                self.places[parameter] = [Place(key)]
            else:
                collected[parameter][pattern].append(key)
        for parameter, keys in collected.items():
            converter = by_pattern[next(iter(keys))]
            if self._is_expert_stack(converter):
                self.places[parameter] = list(_expert_places(converter.source_patterns, keys, stored))
            else:
                self._unknown.update(self._outputs(converter, parameter))

    @staticmethod
    def _is_expert_stack(converter: WeightConverter) -> bool:
        """True for experts stacked along dimension 0 and joined, gate before up, along their rows."""
        stack, *joins = converter.operations
        return (
            len(converter.target_patterns) == 1
            and isinstance(stack, MergeModulelist)
            and stack.dim == 0
            and (not joins if len(converter.source_patterns) == 1 else len(joins) == 1)
            and all(type(join) is Concatenate and join.dim == 1 for join in joins)
        )

    @staticmethod
    def _outputs(converter: WeightConverter, parameter: str) -> list[str]:
        """The names in memory a conversion makes; `parameter` is the first of them."""
        first, *others = converter.target_patterns
        return [parameter, *(parameter.replace(first, other) for other in others)]


def _expert_places(patterns: list[str], keys: dict[str, list[str]], stored: dict[str, StoredTensor]) -> Iterable[Place]:
    first_row = 0
    for pattern in patterns:
        names = keys[pattern]
        for expert, key in enumerate(names):
            yield Place(key, expert, first_row)
        first_row += stored[names[0]].shape[0]

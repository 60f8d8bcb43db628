"""Where parameters lie on disk, for models whose files are known to hold them under their names in memory.

Most merges are of this kind, and for them transformers, whose import takes longer than torch's, is not asked at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sft.merging.weights import StoredTensor, read_header, shard_paths

# tests/test_merge.py compares each of them with what transformers says.
KINDS = frozenset(
    {"gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}
    | {"smollm3"}
)
_MATRIX = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>[\w.]+)\.(lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?"
)
_STORED = re.compile(r"model\.(?!language_model)[\w.]+|lm_head\.weight")


class UnknownLayout(Exception):
    """This adapter cannot be placed on the checkpoint tensor by tensor; PEFT itself has to merge it."""


@dataclass(frozen=True)
class Place:
    """One tensor on disk that holds a parameter: all of it, or rows `first_row`... of its slice `expert`."""

    key: str
    expert: int | None = None
    first_row: int = 0


class Places(Protocol):
    """What a merge asks of a layout: `PlainLayout` here, for all other models `sft.merging.layout.Layout`."""

    @property
    def keys(self) -> Mapping[str, StoredTensor]: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    @property
    def tied(self) -> Mapping[str, str]: ...

    def is_matrix(self, name: str) -> bool: ...

    def module(self, name: str) -> Any: ...

    def parameter_name(self, key: str) -> tuple[str, str | None]: ...

    def whereabouts(self, parameter: str) -> list[Place]: ...

    def shape(self, parameter: str) -> tuple[int, ...]: ...

    def is_transposed(self, parameter: str) -> bool: ...


class PlainLayout:
    """Matrices of attention and feed-forward layers, each under its own name, (out, in) as it is in memory."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.keys = self.parameters = stored
        self.tied: dict[str, str] = {}  # of tied pairs nothing is changed here

    def is_matrix(self, name: str) -> bool:
        """Whether an adapter's pair of factors belongs to the weight of this module."""
        tensor = self.keys.get(f"{name}.weight")
        return _MATRIX.fullmatch(name) is not None and tensor is not None and len(tensor.shape) == 2

    def module(self, name: str) -> None:
        """Never asked: whatever is no matrix has another layout."""

    def parameter_name(self, key: str) -> tuple[str, str | None]:
        """Of a key on disk, which it is itself."""
        return key, None

    def whereabouts(self, parameter: str) -> list[Place]:
        """One tensor."""
        return [Place(parameter)]

    def shape(self, parameter: str) -> tuple[int, ...]:
        """As on disk."""
        return self.keys[parameter].shape

    def is_transposed(self, parameter: str) -> bool:
        """They never are."""
        return False


def plain_layout(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], changed: Iterable[str]
) -> PlainLayout | None:
    """Where model, files and all tensors of adapters, called `changed`, are of the plain kind; None where transformers
    has to say."""
    layout = PlainLayout(stored)
    known = config.get("model_type") in KINDS and "auto_map" not in config and all(map(_STORED.fullmatch, stored))
    factors = map(_FACTOR.fullmatch, changed)
    fits = known and all(match is not None and layout.is_matrix(match["module"]) for match in factors)
    return layout if fits else None


@contextmanager
def base_places(
    folder: Path, target: Path, config: Mapping[str, Any], *, changed: Iterable[str], trust_remote_code: bool
) -> Iterator[tuple[Places, dict[str, list[StoredTensor]]]]:
    """The layout of the base model in `folder` as adapters with these tensors need it, and its tensors by the name of
    the file a merge writes them to."""
    shards = {path.name.replace("pytorch_model", "model"): read_header(path) for path in shard_paths(folder)}
    layout = plain_layout(config, {each.name: each for found in shards.values() for each in found}, changed)
    if shards and layout is not None:
        yield layout, shards
        return
    from sft.merging.layout import base_layout

    with base_layout(folder, target, trust_remote_code=trust_remote_code) as asked:
        yield asked

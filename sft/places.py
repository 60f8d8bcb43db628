"""Where parameters lie in a checkpoint on disk, for the many models where that is plain; sft/layout.py knows the rest.

No transformers here: importing it takes longer than merging a model of a billion parameters.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sft.weights import Stored

# Dense architectures that transformers loads without renaming, transposing or fusing anything in their layers. A test
# asks transformers whether that is still so.
PLAIN_MODELS = frozenset({
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "granite", "cohere"),
    *("phi3", "starcoder2", "stablelm"),
})  # fmt: skip
LAYER_MATRIX = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+")


class UnknownLayout(Exception):
    """This adapter cannot be placed on the checkpoint tensor by tensor; PEFT itself has to merge it."""


@dataclass(frozen=True)
class Place:
    """One tensor on disk that holds a parameter: all of it, or rows `first_row`... of its slice `expert`."""

    key: str
    expert: int | None = None
    first_row: int = 0


class PlainLayout:
    """A checkpoint whose keys name the parameters and whose matrices are (out, in)."""

    def __init__(self, stored: Iterable[Stored]) -> None:
        self.keys = {tensor.name: tensor for tensor in stored}
        self.parameters: dict[str, Any] = {}  # those known beyond the checkpoint's keys
        self.tied: dict[str, str] = {}

    def module(self, name: str) -> nn.Module | None:
        """The module of the model, None where there is none, or no model."""
        return None

    def parameter_name(self, key: str) -> tuple[str, str | None]:
        """The name in memory of a name on disk, and the pattern of the conversion it goes through, if any."""
        return key, None

    def whereabouts(self, parameter: str) -> list[Place]:
        """Where a parameter lies on disk; [] when it is not there, UnknownLayout when its conversion is a rare one."""
        return [Place(parameter)] if parameter in self.keys else []

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape in memory of a parameter, or of a checkpoint key that is none."""
        return self.keys[parameter].shape

    def is_transposed(self, parameter: str) -> bool:
        """True when the weight is stored (in, out), so that an adapter's B A has to be turned."""
        return False


def is_plain(config: dict[str, Any], modules: Iterable[str], keys: Iterable[str]) -> bool:
    """True when the modules that adapters change are matrices in the layers of a model known to be plain."""
    known = set(keys)
    ours = config.get("model_type") in PLAIN_MODELS and not config.get("auto_map")
    return ours and all(LAYER_MATRIX.fullmatch(module) and f"{module}.weight" in known for module in modules)

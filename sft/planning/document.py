"""The JSON document of `--check --json` (contract section 2)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sft.settings.values import SourceRecord

# Bytes per device. `total` holds the larger of `activations` and `generation`.
MEMORY = ("weights", "adapter", "optimizer", "gradients", "activations", "generation", "total", "available")

# What is said of a source; the manifest also says what it is known by.
SOURCE = ("id", "split", "weight", "rows", "validation_rows", "drawn")


@dataclass
class Tokens:
    """Tokens of the training rows."""

    total: int | None = None
    trained: int | None = None
    longest_row: int | None = None


@dataclass
class Steps:
    """Rows of an optimizer step on all devices, steps of an epoch and of the stage."""

    global_batch: int | None = None
    per_epoch: int | None = None
    total: int | None = None


@dataclass
class Lineage:
    """What would be done about the stage, its parents ({"stage", "adapter_sha256"}) and what has changed."""

    decision: str | None = None
    parents: list[dict[str, Any]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def _unknown_memory() -> dict[str, Any]:
    return dict.fromkeys((*MEMORY, "activations_by"))


def _unknown_isolation() -> dict[str, Any]:
    return {"difference": None, "kept_apart": None}


@dataclass
class Document:
    """Everything `--check` finds out, in the order of its JSON; without a value where nothing is known (yet)."""

    stage: int | None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: list[SourceRecord] = field(default_factory=list)
    train_rows: int | None = None
    val_rows: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    upsampling: list[dict[str, Any]] = field(default_factory=list)
    replay: list[dict[str, Any]] = field(default_factory=list)
    tokens: Tokens = field(default_factory=Tokens)
    masked_loss: dict[str, Any] | None = None
    steps: Steps = field(default_factory=Steps)
    memory: dict[str, Any] = field(default_factory=_unknown_memory)
    time: float | None = None
    unread: dict[str, list[str]] = field(default_factory=dict)
    isolation: dict[str, Any] = field(default_factory=_unknown_isolation)
    lineage: Lineage = field(default_factory=Lineage)
    problems: list[str] = field(default_factory=list)
    on: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """As plain JSON values; `on` only where a machine was named with --on."""
        sources = [{name: getattr(source, name) for name in SOURCE} for source in self.sources]
        found = asdict(self) | {"sources": sources}
        return {name: value for name, value in found.items() if name != "on" or value is not None}

    def add_problems(self, texts: Sequence[str]) -> None:
        """Lists what is not listed yet."""
        self.problems += [text for text in dict.fromkeys(texts) if text not in self.problems]


def print_documents(documents: Sequence[Document]) -> None:
    """One JSON document on stdout: the object of a stage, or a list for several stages."""
    records = [document.record() for document in documents]
    content = records[0] if len(records) == 1 else records
    print(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False))

"""The JSON document of `--check --json` (contract section 2): its keys, and what it is when settings are broken."""

import json
from collections.abc import Sequence
from typing import Any

# Bytes per device. `total` holds the larger of `activations` and `generation`.
MEMORY = ("weights", "adapter", "optimizer", "gradients", "activations", "generation", "total", "available")
# What is known of the time: in all, of a step, the speed, what it was measured on or why it was not.
TIME = ("seconds", "step_seconds", "tokens_per_second", "measured_on", "reason")


def blank_document(stage: int | None, problems: Sequence[str] = ()) -> dict[str, Any]:
    """All keys, without a value where nothing is known yet."""
    return {
        "stage": stage,
        "settings": {},
        "sources": [],
        "train_rows": None,
        "val_rows": None,
        "dropped": {},
        "upsampling": [],
        "tokens": {"total": None, "trained": None, "longest_row": None},
        "masked_loss": None,
        "steps": {"global_batch": None, "per_epoch": None, "total": None},
        "memory": dict.fromkeys((*MEMORY, "activations_by")),
        "time": dict.fromkeys(TIME),
        "unread": {},
        "lineage": {"decision": None, "parents": [], "changed": []},
        "problems": list(problems),
    }


def print_documents(documents: Sequence[dict[str, Any]]) -> None:
    """One JSON document on stdout: the object of a stage, or a list for several stages."""
    content = documents[0] if len(documents) == 1 else list(documents)
    print(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False))

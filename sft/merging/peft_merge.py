"""The merge that PEFT does itself, with the whole model in memory in float32: for adapters that are more than B A."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sft.errors import RunFailed
from sft.merging.adapter_files import Adapter
from sft.merging.weights import read_config
from sft.stages.paths import MODEL_CONFIG


def merge_with_peft(
    folder: Path, adapters: list[Adapter], target: Path, *, dtype: str | None, trust_remote_code: bool
) -> bool:
    """Writes the merged weights into `target`; True when the embeddings are no longer tied."""
    config = read_config(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code, low_cpu_mem_usage=True
    )
    for adapter in adapters:
        before = _fingerprint(model)
        try:
            model = PeftModel.from_pretrained(model, adapter.folder).merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise RunFailed(f"{adapter.folder}: PEFT cannot merge this adapter: {error}") from error
        if _fingerprint(model) == before:
            raise RunFailed(f"{adapter.folder}: merging it changed no weight.")
    kind = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    model.to(getattr(torch, kind)).save_pretrained(target)
    saved = json.loads((target / MODEL_CONFIG).read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings", True)) and saved.get("tie_word_embeddings") is False


def _fingerprint(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """Two sums per parameter, enough to see that something changed."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    return {name: (weight.sum().item(), weight.square().sum().item()) for name, weight in weights.items()}

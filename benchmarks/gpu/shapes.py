"""Random models of real shapes, tiny ones of the same kinds in a rehearsal; quantised as the loader does it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from benchmarks.gpu.job import Job
from sft.models.model import quantization, weight_dtype
from sft.models.stand_in import shortened
from sft.programs.benchmark import random_model
from sft.programs.benchmark_shapes import model_config

QWEN, LLAMA, GEMMA = "Qwen/Qwen3-4B-Instruct-2507", "meta-llama/Llama-3.1-8B-Instruct", "google/gemma-2-2b-it"
QWEN25, MISTRAL = "Qwen/Qwen2.5-7B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2"
MIXTURE, LARGE = "unsloth/Qwen3-30B-A3B-Instruct-2507", "meta-llama/Llama-2-70b-hf"


def shape(job: Job, name: str, layers: int | None = None) -> Any:
    """The configuration of a real model, or of a tiny one of its kind."""
    config = model_config(name)
    if job.rehearse:
        small = {
            "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
            "num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
        }  # fmt: skip
        known = config.to_dict()
        for key, value in small.items():
            if key in known:
                setattr(config, key, value)
        layers = 2 if layers is None else layers // 3
    config.eos_token_id = config.pad_token_id = 0
    return shortened(config, layers) if layers else config


class Drawn:
    """A tensor of a checkpoint that is drawn when the loader reaches for it: 70 billion weights need no room."""

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, device

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return {torch.bfloat16: "BF16", torch.float32: "F32"}[self.dtype]

    def __getitem__(self, part: Any) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device).normal_(std=0.02)[part]


def built(job: Job, config: Any, settings: Any) -> Any:
    """A random model as `load_model` would have read it: quantised matrix by matrix, onto the device."""
    dtype = weight_dtype(settings)
    if quantization(settings) is None:
        return random_model(config, dtype)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {name: Drawn(weight, job.device) for name, weight in blank.state_dict().items()}
    return type(blank).from_pretrained(
        None, config=config, state_dict=weights, quantization_config=quantization(settings), dtype=dtype,
        device_map={"": PartialState().device},
    )  # fmt: skip

"""Adapters on fused experts over two stages: base + B1 A1 + B2 A2 in every expert, and the answers PEFT gives."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from sft.merging.merge import merge
from sft.models.targets import adapter_config
from tests.test_merge import peft_merge

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
FEW: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, **SIZES}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt_oss": GptOssConfig(head_dim=8, max_position_embeddings=64, **FEW),
    "mixtral": MixtralConfig(**FEW),
    "qwen3_moe": Qwen3MoeConfig(head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, **SIZES),
}
EXPERTS = ("gate_proj", "up_proj", "down_proj")
# Rank, alpha and targets of the stages: they differ, as in a ladder; the second leaves out part of the first's.
STAGES: tuple[dict[str, Any], ...] = (
    {"lora_r": 3, "lora_alpha": 6, "lora_target_modules": ("q_proj", *EXPERTS)},
    {"lora_r": 2, "lora_alpha": 5, "lora_target_modules": ("v_proj", "down_proj"), "lora_rslora": True},
)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(base: Path, folder: Path, settings: Any, seed: int) -> Path:
    """The stage's own adapter, all of it away from its beginning."""
    model = loaded(base)
    adapted = get_peft_model(model, adapter_config(model, settings))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(folder)
    return folder


def add(weights: dict[str, torch.Tensor], adapter: Path, settings: Any, *, transposed: bool) -> None:
    """B A onto every matrix, expert by expert and rank by rank, in float64, from the adapter's file."""
    factors = load_file(adapter / "adapter_model.safetensors")
    for key in (name for name in factors if "lora_A" in name):
        a, b = factors[key].double(), factors[key.replace("lora_A", "lora_B")].double()
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace(".base_layer", "")
        fused = len(b) == 2 * FEW["intermediate_size"]  # gate and up: twice the rank, twice the alpha
        rank, alpha = (1 + fused) * settings.lora_r, (1 + fused) * settings.lora_alpha
        scaling = alpha / (rank**0.5 if settings.lora_rslora else rank)
        if not module.endswith(".experts"):
            weights[f"{module}.weight"] += scaling * b @ a
            continue
        stack = weights[f"{module}.{'gate_up_proj' if fused else 'down_proj'}"]
        for expert, k in itertools.product(range(4), range(rank)):
            outer = torch.outer(b[:, 4 * k + expert], a[rank * expert + k])
            stack[expert] += scaling * (outer.T if transposed else outer)


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_stages_on_experts_are_the_sum_of_both(kind: str, tmp_path: Path, make_settings: Any):
    """Every weight: base + B1 A1 + B2 A2 to float32's rounding; PEFT's own merge to the bit; and the answers of the
    second stage's adapter on the merged base of the first."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind]).float().save_pretrained(tmp_path / "base")
    weights = {name: t.double() for name, t in loaded(tmp_path / "base").state_dict().items()}
    adapters, start = [], tmp_path / "base"
    for number, values in enumerate(STAGES, start=1):
        settings = make_settings(**values)
        adapters.append(trained(start, tmp_path / f"adapter{number}", settings, number))
        add(weights, adapters[-1], settings, transposed=kind == "gpt_oss")
        record = merge(tmp_path / "base", adapters, tmp_path / f"merged{number}")
        assert (record.path, record.warnings) == ("streaming", [])
        ids = torch.arange(20).reshape(2, 10)
        expected = PeftModel.from_pretrained(loaded(start), adapters[-1])(ids).logits
        start = tmp_path / f"merged{number}"
        torch.testing.assert_close(loaded(start)(ids).logits, expected, rtol=0, atol=1e-5)
    merged = loaded(start).state_dict()
    torch.testing.assert_close({name: t.double() for name, t in merged.items()}, weights, rtol=0, atol=1e-6)
    by_peft = peft_merge(tmp_path / "base", adapters, "float32")
    assert [name for name, tensor in by_peft.items() if not torch.equal(tensor, merged[name])] == []

"""The merge against PEFT's own float32 merge, bit for bit, on models small enough to build in a moment."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sft.merge import merge

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = LlamaConfig(intermediate_size=80, num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
QWEN3 = Qwen3Config(intermediate_size=80, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, **SIZES)
GPT2 = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
MOE_SIZES = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}
QWEN3_MOE = Qwen3MoeConfig(intermediate_size=40, num_key_value_heads=2, **MOE_SIZES, **SIZES)
MIXTRAL = MixtralConfig(intermediate_size=20, num_key_value_heads=2, num_local_experts=4, **SIZES)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(config: PretrainedConfig, folder: Path, dtype: str = "bfloat16", shard: str = "40KB") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 1, scale: float = 0.05, **settings) -> Path:
    """An adapter with every factor (and DoRA magnitude) away from its initial value."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) * scale
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else parameter.data + noise
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_merge(base: Path, adapters: list[Path], dtype: str) -> dict[str, torch.Tensor]:
    """PEFT's result: everything loaded in float32, one adapter after the other, rounded once."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.to(getattr(torch, dtype)).state_dict()


def assert_same_as_peft(base: Path, adapters: list[Path], target: Path, dtype: str = "bfloat16") -> None:
    expected = peft_merge(base, adapters, dtype)
    merged = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert merged.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(merged[name], expected[name])]
    assert different == []


CASES = {
    "llama": (LLAMA, {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "head and embeddings": (LLAMA, {"r": 3, "lora_alpha": 4, "target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "rslora": (LLAMA, {"r": 5, "lora_alpha": 4, "target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        LLAMA,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "dora": (LLAMA, {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_dora": True}),
    "saved in full": (LLAMA, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "qwen3, tied": (QWEN3, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "gpt2": (GPT2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 dora": (GPT2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "experts": (QWEN3_MOE, {"r": 3, "lora_alpha": 4, "target_modules": LINEAR}),
    "experts and router": (QWEN3_MOE, {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}),
    "down only": (QWEN3_MOE, {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
    "mixtral": (MIXTRAL, {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "w1", "w2", "w3"]}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_one_adapter_gives_the_bits_of_pefts_float32_merge(tmp_path, case, dtype):
    """Every kind of adapter and layout: all tensors equal PEFT's, computed in float32 and rounded once."""
    config, settings = CASES[case]
    base = make_base(config, tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    record = merge(base, [adapter], tmp_path / "merged")
    assert_same_as_peft(base, [adapter], tmp_path / "merged", dtype)
    assert (record.path, record.warnings, record.dtype) == ("streaming", [], dtype)


@pytest.mark.parametrize("config", [LLAMA, GPT2, QWEN3_MOE], ids=["llama", "gpt2", "qwen3_moe"])
def test_three_adapters_in_order_are_rounded_once(tmp_path, config):
    """A lineage is folded from the original base in float32: the bits of PEFT's merges in a row, not rounded between."""
    base = make_base(config, tmp_path / "base")
    targets = ["c_attn", "c_fc"] if config is GPT2 else LINEAR
    adapters = [
        make_adapter(
            base, tmp_path / f"adapter{n}", seed=n, r=2 + n, lora_alpha=7, target_modules=targets, use_dora=dora
        )
        for n, dora in ((1, False), (2, config is not QWEN3_MOE), (3, False))
    ]
    merge(base, adapters, tmp_path / "merged")
    assert_same_as_peft(base, adapters, tmp_path / "merged")

"""One adapter for all stages: exact by concatenation, shortened with its error said, found again by plain PEFT."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config, Qwen3MoeConfig

from sft.errors import Problems
from sft.merging.combine import combine, shortened
from sft.merging.merge import merge

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "dense": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mixture": Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "transposed": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
}
ATTENTION = {"dense": ["q_proj", "v_proj"], "mixture": ["q_proj", "o_proj"], "transposed": ["c_attn"]}
MORE: dict[str, dict] = {
    "dense": {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "alpha_pattern": {"q_proj": 3}},
    "mixture": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "transposed": {"target_modules": ["c_attn", "c_fc"]},
}
LAST: dict[str, dict] = {
    "dense": {"target_modules": r"model\.layers\.1\..*up_proj"},
    "mixture": {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    "transposed": {"target_modules": ["c_proj"]},
}


def save_base(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int, **settings: object) -> Path:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def save_ladder(name: str, folder: Path) -> tuple[Path, list[Path]]:
    """Three stages: ranks 2, 3 and 2, the second with rsLoRA, each with targets of its own."""
    base = save_base(name, folder / "base")
    first = save_adapter(base, folder / "first", 1, r=2, lora_alpha=4, target_modules=ATTENTION[name])
    second = save_adapter(base, folder / "second", 2, r=3, lora_alpha=5, use_rslora=True, **MORE[name])
    third = save_adapter(base, folder / "third", 3, r=2, lora_alpha=1, **LAST[name])
    return base, [first, second, third]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12)).logits


@pytest.mark.parametrize("name", MODELS)
def test_one_adapter_answers_as_the_ladder(name: str, tmp_path: Path):
    """Loaded by plain PEFT on the untouched base: the logits of the base that all adapters were merged into."""
    base, adapters = save_ladder(name, tmp_path)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    merge(base, adapters, tmp_path / "merged")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    target = tmp_path / "combined"
    target.mkdir()
    found = combine(base, adapters, target)
    assert max(found.ranks.values()) == 5
    assert found.errors == {}
    combined = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), target)
    assert (logits(combined) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
    assert (plain - expected).abs().max() > 0.1
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_a_lower_rank_is_the_nearest_and_its_error_is_said(tmp_path: Path):
    """Against torch's SVD of the whole product; the error is what the singular values left out say."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 20), torch.randn(3, 12, 5)
    shorter_a, shorter_b, error = shortened(a, b, 2)
    whole = b @ a
    u, values, v = torch.linalg.svd(whole, full_matrices=False)
    nearest = u[..., :2] @ torch.diag_embed(values[..., :2]) @ v[..., :2, :]
    assert (shorter_a.shape, shorter_b.shape) == ((3, 2, 20), (3, 12, 2))
    assert torch.allclose(shorter_b @ shorter_a, nearest, atol=1e-4)
    assert error == pytest.approx(((whole - nearest).norm() / whole.norm()).item(), abs=1e-4)
    base, adapters = save_ladder("dense", tmp_path)
    (tmp_path / "short").mkdir()
    found = combine(base, adapters, tmp_path / "short", rank=4)
    assert max(found.ranks.values()) == 4
    assert set(found.errors) == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert all(0 < error < 1 for error in found.errors.values())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "short")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "is a DoRA adapter"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "holds modules that were trained in full"),
    ],
)
def test_what_is_no_sum_of_low_rank_updates_is_refused(settings: dict, reason: str, tmp_path: Path):
    """DoRA and modules trained in full: named, with what to do instead; nothing is written."""
    base = save_base("dense", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", 1, r=2, **settings)
    (tmp_path / "out").mkdir()
    with pytest.raises(Problems, match=reason):
        combine(base, [adapter], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []

"""Where adapters go: every kind of expert, no tower, no name that fits nothing; and what a person is told."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from sft.errors import Problems
from sft.models.targets import adapter_config, target_notes
from tests.architectures import CONFIGS, tiny_config

MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": CONFIGS["qwen3_moe"] | {"mlp_only_layers": [0]},
    "gpt_oss": CONFIGS["gpt_oss"],
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1,
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4,
    },
}  # fmt: skip
# Modules of the targets' names that PEFT leaves out where it moves them to the experts.
LEFT_OUT = {
    "qwen3_moe": ["model.layers.N.mlp.gate_proj"],
    "glm4_moe": ["model.layers.N.mlp.gate_proj", "model.layers.N.mlp.shared_experts.gate_proj"],
    "deepseek_v3": ["model.layers.N.mlp.gate_proj", "model.layers.N.mlp.shared_experts.gate_proj"],
}  # fmt: skip


def blank(kind: str, **values: Any) -> Any:
    base = tiny_config("qwen3").to_dict()
    kept = {name: base[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(kept | heads | values)))


@pytest.mark.parametrize("kind", MIXTURES)
def test_default_targets_reach_the_experts_of_every_mixture_or_it_is_said(kind: str, make_settings: Any):
    """Both fused matrices of each layer with experts; dense and shared ones too, or the warning names them."""
    settings = make_settings()
    model = blank(kind, **MIXTURES[kind])
    notes = target_notes(model, settings)
    left_out = LEFT_OUT.get(kind, [])
    assert all(name in " ".join(notes) for name in left_out)
    assert bool(notes) is bool(left_out)
    layers = sum(name.endswith("experts.down_proj") for name, _ in model.named_parameters())
    adapted = get_peft_model(model, adapter_config(model, settings), low_cpu_mem_usage=True)
    ranks = [p.shape[0] for name, p in adapted.named_parameters() if ".experts." in name and "lora_A" in name]
    experts, rank = 4, settings.lora_r
    # gate and up are one matrix with twice the rank
    assert sorted(ranks) == sorted([experts * rank, experts * 2 * rank] * layers)


def test_attention_alone_in_a_mixture_is_a_warning(make_settings: Any):
    """Its knowledge lies in the experts."""
    notes = target_notes(blank("qwen3_moe", **CONFIGS["qwen3_moe"]), make_settings(lora_target_modules=("q_proj",)))
    assert notes == [
        "[WARNING] only attention is trained in this mixture of experts, whose knowledge lies in the experts: add "
        "gate_proj, up_proj, down_proj to SFT_LORA_TARGET_MODULES"
    ]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_proj", "v_porj"), "Qwen3ForCausalLM has no v_porj (did you mean v_proj?); it has down_proj, gate_proj"),
        (("q_proj", "lm_head"), "lm_head can't carry an adapter in Qwen3ForCausalLM"),
        (("q_proj", "input_layernorm"), "input_layernorm can't carry an adapter in Qwen3ForCausalLM"),
        (("zzz",), "Qwen3ForCausalLM has no zzz; it has"),
        (("Q_proj",), "Qwen3ForCausalLM has no Q_proj (did you mean q_proj?); it has"),
        (("all-linear", "q_proj"), "SFT_LORA_TARGET_MODULES=all-linear,q_proj: all-linear stands alone"),
    ],
)
def test_a_name_that_a_person_wrote_and_that_fits_nothing_is_refused(targets: Any, said: str, make_settings: Any):
    """One misspelt among good ones as well."""
    settings = make_settings(lora_target_modules=targets, origins={"SFT_LORA_TARGET_MODULES": "stage1.env"})
    with pytest.raises(Problems) as found:
        adapter_config(blank("qwen3"), settings)
    assert said in found.value.problems[0]
    assert target_notes(blank("qwen3"), settings) == []  # it is a problem: no warning says it again


@pytest.mark.parametrize(
    "targets", [("all-linear",), ("self_attn.q_proj",), ("model.layers.0.mlp.up_proj",), ("embed_tokens",)]
)
def test_names_longer_than_the_last_part_are_taken(targets: Any, make_settings: Any):
    """As PEFT takes them: by the end of the name."""
    settings = make_settings(lora_target_modules=targets, origins={"SFT_LORA_TARGET_MODULES": "stage1.env"})
    assert adapter_config(blank("qwen3"), settings) is not None


def test_defaults_that_a_model_does_not_have_are_named(make_settings: Any):
    """Phi-3 joins q, k and v, and gate and up."""
    model = blank("phi3", pad_token_id=0)
    assert adapter_config(model, make_settings()) is not None
    assert target_notes(model, make_settings()) == [
        "[WARNING] this model has no q_proj, k_proj, v_proj, gate_proj, up_proj; it has down_proj, gate_up_proj, "
        "o_proj, qkv_proj (SFT_LORA_TARGET_MODULES)"
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora_target_modules": ("gate_proj",)}, "gate_proj and up_proj are one matrix in this model's experts"),
        ({"lora_dropout": 0.1}, "SFT_LORA_DROPOUT=0.1: adapters on experts know no dropout"),
        ({"lora_dora": True}, "SFT_LORA_DORA=1: adapters on experts know no DoRA"),
        (
            {"lora_dropout": 0.1, "lora_target_modules": ("all-linear",)},
            "SFT_LORA_DROPOUT=0.1: adapters on experts know no dropout",
        ),
        ({"lora_dora": True, "lora_target_modules": ("all-linear",)}, "SFT_LORA_DORA=1: adapters on experts know no"),
    ],
)
def test_what_adapters_on_experts_do_not_know_is_refused(values: Any, said: str, make_settings: Any):
    """PEFT would end in a ValueError when the model is loaded."""
    with pytest.raises(Problems) as found:
        adapter_config(blank("qwen3_moe", **CONFIGS["qwen3_moe"]), make_settings(**values))
    assert said in found.value.problems[0]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_a_vision_tower_gets_no_adapter(targets: Any, make_settings: Any):
    """Gemma 3 with its tower: text never passes it."""
    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    settings = make_settings(lora_target_modules=targets)
    adapted = get_peft_model(model, adapter_config(model, settings), low_cpu_mem_usage=True)
    places = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert places
    assert all("language_model" in name for name in places), places


@pytest.mark.parametrize("kind", ["mamba2", "falcon_h1"])
def test_layers_whose_weights_pass_any_adapter_get_none(kind: str, make_settings: Any):
    """PEFT refuses out_proj of Mamba layers, with all-linear as well: there it is left out, by name a problem."""
    model = blank(kind, **CONFIGS[kind])
    every = adapter_config(model, make_settings(lora_target_modules=("all-linear",)))
    adapted = get_peft_model(model, every, low_cpu_mem_usage=True)
    places = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    assert "in_proj" in places
    assert not places & {"out_proj", "conv1d"}
    settings = make_settings(
        lora_target_modules=("in_proj", "out_proj"), origins={"SFT_LORA_TARGET_MODULES": "stage1.env"}
    )
    with pytest.raises(Problems, match="out_proj can't carry an adapter"):
        adapter_config(blank(kind, **CONFIGS[kind]), settings)

"""Models merged without asking transformers: transformers itself says that they are as plain as assumed."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from sft.merging.layout import LAYER_MATRIX, PLAIN_MODELS, is_plain


@pytest.mark.parametrize("model_type", sorted(PLAIN_MODELS))
def test_plain_models_load_without_conversion_and_have_only_linear_layers(model_type):
    """No renaming, no fusing; what an adapter can name in a layer is a Linear (or has no matrix)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    assert get_model_conversion_mapping(model, add_legacy=False) == []
    found = {name: module for name, module in model.named_modules() if LAYER_MATRIX.fullmatch(name)}
    matrices = {name for name, module in found.items() if getattr(module, "weight", None) is not None}
    assert {type(found[name]) for name in matrices if found[name].weight.ndim == 2} == {nn.Linear}
    assert "model.layers.0.self_attn.o_proj" in matrices or "model.layers.0.self_attn.dense" in matrices


def test_plain_is_only_what_is_known_to_be():
    """An embedding, a head, another architecture, own code or a module that is not on disk: transformers is asked."""
    llama, module = {"model_type": "llama"}, "model.layers.3.self_attn.q_proj"
    keys = [f"{module}.weight", "lm_head.weight", "model.layers.3.mlp.experts.0.up_proj.weight"]
    assert is_plain(llama, [module], keys)
    assert not is_plain(llama, [module, "lm_head"], keys)
    assert not is_plain(llama, ["model.layers.4.self_attn.q_proj"], keys)
    assert not is_plain(llama, ["model.layers.3.mlp.experts.0.up_proj"], keys)
    assert not is_plain(llama | {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, [module], keys)
    assert not is_plain({"model_type": "qwen3_moe"}, [module], keys)

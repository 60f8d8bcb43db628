"""Adapted linear layers as one operation: results and gradients of PEFT's own path, and what is left out."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sft.models.fused import FusedLinear, fuse_adapters

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_bias": True,
}  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default}


def adapted(**values: Any) -> Any:
    """A small Llama with adapters whose second factor isn't zero, fused, without noise in its weights."""
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2))
    model = get_peft_model(base, LoraConfig(**{"target_modules": "all-linear", "r": 4, "lora_alpha": 12} | values))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    fuse_adapters(model)
    return model.train()


def as_peft(model: Any) -> Any:
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = Linear
    return model


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of 12 tokens and the gradients of a fixed sum of them."""
    logits = model(input_ids=torch.arange(12)[None], use_cache=False).logits
    (logits.float() * torch.arange(50).sin()).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def products_backward(model: Any) -> int:
    loss = model(input_ids=torch.arange(12)[None], use_cache=False).logits.sum()
    with Products() as seen:
        loss.backward()
    return seen.count


def test_results_and_gradients_are_pefts():
    """float32, with biases: within 1e-6 of the largest number of each tensor."""
    fused, plain = adapted(), as_peft(adapted())
    assert sum(type(module) is FusedLinear for module in fused.modules()) == 21
    (logits, ours), (expected, theirs) = gradients(fused), gradients(plain)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert ours.keys() == theirs.keys() and len(ours) == 42
    for name, gradient in theirs.items():
        atol = 2e-6 * gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=atol, msg=name)


def test_bfloat16_is_as_near_to_float32_as_pefts():
    """Under autocast: gradients no further from the exact ones than PEFT's, by a tenth."""
    _, exact = gradients(as_peft(adapted()))
    far = {}
    for name, model in (("ours", adapted()), ("peft", as_peft(adapted()))):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            _, found = gradients(model)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        far[name] = sum(float((found[each] - exact[each]).norm() / exact[each].norm()) for each in exact)
    assert far["ours"] <= 1.1 * far["peft"]


@pytest.mark.parametrize("values", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_a_plain_adapter_goes_pefts_way(values: dict[str, Any]):
    """Dropout, DoRA and biases of adapters: bit for bit PEFT's results and gradients."""
    found = []
    for model in (adapted(**values), as_peft(adapted(**values))):
        torch.manual_seed(5)
        found.append(gradients(model))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[1][1])


def test_switched_off_or_merged_the_layer_is_the_base():
    """`disable_adapter` and a merge as with PEFT."""
    model, plain = adapted(), as_peft(adapted())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        before = model(input_ids=ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-4 * before.abs().max().item())


def test_nothing_is_computed_below_the_first_adapter():
    """Gradients end there. A projection takes five products, of them two for the gradient of its input, which the three
    of the first adapted layer that read the embeddings, or layers without adapters, leave out; the head takes one."""
    every = products_backward(adapted())
    last = products_backward(adapted(target_modules=PROJECTIONS, layers_to_transform=[2]))
    assert (every, last) == (3 * 7 * 5 - 3 * 2 + 1, 7 * 5 - 3 * 2 + 1)

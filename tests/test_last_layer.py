"""The last layer at wanted positions only: losses and gradients of the whole layer, in every architecture."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sft.models.last_layer import LastLayer
from tests.architectures import CONFIGS, tiny_model

WANTED = torch.tensor([2, 3, 8])
GROUPED = ("qwen3_moe", "gpt_oss", "qwen3_next", "granitemoehybrid")  # torch has no grouped products in float64
LEFT_OUT = {"qwen3": 3, "mistral": 3, "gemma2": 3, "gemma3_text": 3, "qwen3_moe": 2, "gpt_oss": 2}


def seen(model: Any, last: LastLayer | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of the wanted positions of 12 tokens, and all weights' gradients of a fixed sum of them."""
    model.zero_grad()
    inputs = {"input_ids": torch.arange(20, 32)[None], "use_cache": False, "logits_to_keep": WANTED}
    if last is None:
        logits = model(**inputs).logits
    else:
        with last.at(WANTED, 12):
            logits = model(**inputs).logits
    (logits * torch.arange(64).sin()).sum().backward()
    return logits.detach(), [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "mamba2"])
def test_logits_and_gradients_are_those_of_the_whole_layer(kind: str):
    """Within 1e-10 of the largest number of each tensor in float64, 1e-5 in float32; the usual parts are found."""
    model = tiny_model(kind)
    last = LastLayer(model)
    assert len(last.parts) == LEFT_OUT.get(kind, len(last.parts))
    near = 1e-5 if kind in GROUPED else 1e-10
    model.to(torch.float32 if kind in GROUPED else torch.float64)
    (expected, theirs), (found, ours) = seen(model, None), seen(model, last)
    torch.testing.assert_close(found, expected, rtol=0, atol=near * expected.abs().max().item())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=near * max(other.abs().max().item(), 1e-2))


def test_adapted_parts_see_the_wanted_tokens_alone():
    """Adapters on query, output and feed-forward of the last layer get 3 tokens, all others 12."""
    base = tiny_model("qwen3")
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2))
    last, tokens = LastLayer(base), {}
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda _, inputs, __, name=name: tokens.update({name: inputs[0].shape[1]}))
    seen(model, last)
    few = {name.split(".")[-3] for name, count in tokens.items() if count == 3}
    assert few == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".layers.1." in name for name, count in tokens.items() if count == 3)
    assert sum(count == 12 for count in tokens.values()) == 7 + 2


class Shifting(nn.Module):
    """A feed-forward part that reads the position before, as RWKV's does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + x.roll(1, dims=1))


def test_a_part_that_reads_other_positions_is_found_out():
    """Its logits would be others: nothing is left out then."""
    model = tiny_model("qwen3")
    model.model.layers[-1].mlp = Shifting(model.model.layers[-1].mlp)
    assert LastLayer(model).parts == []


@pytest.mark.parametrize("wanted", [[], list(range(12)), list(range(11))])
def test_nothing_changes_where_nothing_is_to_be_gained(wanted: list[int]):
    """No wanted position, all, and nearly all: no hooks."""
    model = tiny_model("qwen3")
    last = LastLayer(model)
    with last.at(torch.tensor(wanted, dtype=torch.int64), 12):
        assert not any(part._forward_hooks for part in last.parts)
    assert LastLayer(model, checkpointing=True).parts == []

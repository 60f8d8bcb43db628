"""Cross-entropy per token: values and gradients of torch's own, in less memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from sft.planning.activations import Tally
from sft.training import loss
from sft.training.loss import token_cross_entropy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_losses_and_gradients_are_those_of_torch(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch):
    """Weighted tokens, one of weight 0, several parts of which the last is short; large logits do not overflow."""
    monkeypatch.setattr(loss, "_AT_ONCE", 300)
    torch.manual_seed(0)
    hidden, matrix = torch.randn(11, 16, dtype=dtype) * 3, torch.randn(100, 16, dtype=dtype)
    targets, weights = torch.randint(100, (11,)), torch.rand(11)
    weights[4] = 0.0
    found = []
    for function in (token_cross_entropy, lambda logits, t: cross_entropy(logits.float(), t, reduction="none")):
        states = hidden.clone().requires_grad_()
        losses = function(states @ matrix.T, targets)
        (losses * weights).sum().backward()
        found.append((losses.detach(), states.grad.float()))
    (losses, gradient), (expected, expected_gradient) = found
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=0, atol=tolerance * expected_gradient.abs().max().item()
    )


def test_no_token_is_no_loss():
    """A micro-batch whose rows are all masked."""
    states = torch.randn(0, 8, requires_grad=True)
    token_cross_entropy(states * 1, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert states.grad.shape == (0, 8)


def test_it_keeps_one_tensor_of_the_size_of_the_logits():
    """At the peak of forward and backward; torch's own keeps four for bfloat16 logits, counted in their bytes."""
    module = torch.nn.Linear(8, 5000, bias=False, dtype=torch.bfloat16)
    states, targets = torch.randn(2000, 8, dtype=torch.bfloat16, requires_grad=True), torch.randint(5000, (2000,))
    module.weight.requires_grad = False
    size = 2 * 2000 * 5000
    peaks = []
    for function in (token_cross_entropy, lambda logits, t: cross_entropy(logits.float(), t, reduction="none")):
        with Tally(module) as tally:
            function(module(states), targets).sum().backward()
        peaks.append(tally.peak / size)
    assert 1.0 <= peaks[0] < 1.8
    assert peaks[1] > 4

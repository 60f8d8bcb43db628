"""Cross-entropy per token: values and gradients of torch's own, in less memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from sft.planning.activations import Tally
from sft.training import loss
from sft.training.loss import LossScale, source_losses, token_cross_entropy


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


def test_float16_may_overflow_while_it_looks_for_its_scale():
    """The scaler skips those steps; twenty in a row, or a scale under 1, mean that something else is wrong."""
    scale = LossScale()
    infinite = torch.tensor(float("inf"))
    assert not scale.may_skip(torch.tensor(3.0), 65536.0)
    assert all(scale.may_skip(infinite, 65536.0) for _ in range(19))
    assert not scale.may_skip(infinite, 65536.0)
    assert not scale.may_skip(1.0, 65536.0)  # a good step begins the count anew
    assert scale.may_skip(float("nan"), 65536.0)
    assert not scale.may_skip(infinite, 0.5)


def test_float16_finds_its_scale_where_the_first_steps_overflow():
    """With torch's own scaler at 2 to the 24th: skipped steps change nothing and the weight is trained afterwards."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    allowed, skipped = LossScale(), 0
    for _ in range(12):
        optimizer.zero_grad()
        gradient = (scaler.scale(torch.tensor(1.0)).half() * 4.0).float()  # overflows above 65,504
        weight.grad = gradient.reshape(1)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([weight], 1e9)
        skipped += allowed.may_skip(norm, scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    assert skipped == 11
    assert weight.item() == pytest.approx(0.6)


def test_the_loss_of_each_source():
    """Two of three sources have validation rows: 6 / 3 and 4 / 1, together 10 / 4; one alone has no own figure."""
    sums = torch.tensor([[6.0, 3.0], [0.0, 0.0], [4.0, 1.0]], dtype=torch.float64)
    assert source_losses(sums, ["a", "b", "c"]) == {"eval_loss": 2.5, "eval_loss/a": 2.0, "eval_loss/c": 4.0}
    assert source_losses(sums[:2], ["a", "b"]) == {"eval_loss": 2.0}
    assert source_losses(sums[2:], []) == {"eval_loss": 4.0}

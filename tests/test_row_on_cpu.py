"""Attention of a row on a CPU against float64: lengths around its blocks, windows, grouped heads, number formats."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sft.models import row_on_cpu
from sft.models.attention import attend
from sft.models.row_on_cpu import row_on_cpu as attention

FAR = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


def states(tokens: int, dtype: torch.dtype, groups: int = 2) -> list[torch.Tensor]:
    """Query of 4 heads, key and value of fewer, value narrower; as a model has them, tokens first in memory."""
    random = torch.Generator().manual_seed(tokens)
    shapes = ((4, 16), (4 // groups, 16), (4 // groups, 8))
    found = [torch.randn(1, tokens, heads, size, generator=random).to(dtype) for heads, size in shapes]
    return [each.transpose(1, 2).detach().requires_grad_(True) for each in found]


def exact(parts: list[torch.Tensor], window: int, scale: float) -> torch.Tensor:
    tokens = parts[0].shape[2]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True, scale=scale)


def with_gradients(result: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [result, *torch.autograd.grad((result.double() * weights).sum(), parts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("tokens", "window"), [(16, 99), (64, 99), (65, 99), (150, 150), (150, 1), (150, 20), (150, 64), (150, 100)]
)
def test_results_and_gradients_are_those_of_float64(tokens: int, window: int, groups: int, dtype: torch.dtype):
    """By norm, 1e-6 of what float64 gives in float32 and 6e-3, three times its rounding, in bfloat16."""
    parts = states(tokens, dtype, groups)
    precise = [each.detach().double().requires_grad_(True) for each in parts]
    found = with_gradients(attention(*parts, window=window, scale=0.3), parts)
    for mine, other in zip(found, with_gradients(exact(precise, window, 0.3), precise), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - other).norm() <= FAR[dtype] * other.norm()


def test_few_scores_at_once_change_nothing_but_their_order(monkeypatch: pytest.MonkeyPatch):
    """Heads one after the other, as in long rows."""
    parts = states(100, torch.float32)
    together = with_gradients(attention(*parts, window=100, scale=None), parts)
    monkeypatch.setattr(row_on_cpu, "_SCORES", 1)
    one_by_one = with_gradients(attention(*parts, window=100, scale=None), parts)
    for mine, other in zip(one_by_one, together, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("mixed", [False, True])
def test_a_row_is_bit_for_bit_what_it_is_alone(mixed: bool):
    """Rows of 20, 5 and 70 tokens joined, each in its own way by its own length; also under autocast."""
    lengths = [20, 5, 70]
    parts = states(sum(lengths), torch.float32)
    how: dict[str, Any] = {"scaling": 0.3}
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        joined, _ = attend(torch.nn.Module(), *parts, None, row_lengths=lengths, **how)
        rows = zip(*(each.split(lengths, dim=2) for each in parts), strict=True)
        alone = [attend(torch.nn.Module(), *row, None, row_lengths=[row[0].shape[2]], **how)[0] for row in rows]
    assert torch.equal(joined, torch.cat(alone, dim=1))
    assert joined.dtype == (torch.bfloat16 if mixed else torch.float32)

"""Attention row by row against float64, and the arguments of the kernel that takes all rows at once on a GPU."""

from typing import Any

import pytest
import torch

from sft.models import attention
from sft.models.attention import attend, row_ends

LENGTHS = [5, 1, 9, 3]


def states(heads: int, dtype: torch.dtype = torch.float32, size: int = 16) -> torch.Tensor:
    torch.manual_seed(heads)
    return torch.randn(1, heads, sum(LENGTHS), size, dtype=torch.float64).to(dtype)


def reference(query: Any, key: Any, value: Any, window: int | None, scale: float) -> torch.Tensor:
    """Softmax in float64 over an explicit mask of all tokens, (1, tokens, heads, size)."""
    key, value = (each.double().repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    rows = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    places = torch.arange(len(rows))
    distance = places[:, None] - places
    seen = (rows[:, None] == rows) & (distance >= 0) & (distance < (window or len(rows)))
    scores = (query.double() @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 8, 100])
def test_rows_with_windows_and_grouped_heads_are_as_in_float64(window: int | None, groups: int):
    """Output and gradients within 1e-5: windows shorter than a row, that divide it or not, and longer ones."""
    parts = [states(heads).requires_grad_(True) for heads in (4, 4 // groups, 4 // groups)]
    how: dict[str, Any] = {"row_lengths": LENGTHS, "sliding_window": window, "scaling": 0.3}
    found, _ = attend(torch.nn.Module(), *parts, None, **how)
    expected = reference(*parts, window, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found * weights).sum(), parts)
    theirs = torch.autograd.grad((expected * weights).sum(), parts)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU whose kernel keeps what it is asked and answers with the query."""
    asked: list[Any] = []

    def varlen(query: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        asked.append((query, *arguments, keywords))
        return query

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "takes_varlen", lambda query, value: query.dtype in (torch.bfloat16, torch.float16))
    return asked


@pytest.mark.parametrize(("window", "reach"), [(None, (-1, 0)), (4, (3, 0)), (9, (-1, 0)), (100, (-1, 0))])
def test_a_gpu_takes_all_rows_in_one_kernel(window: int | None, reach: tuple[int, int], kernel: list[Any]):
    """Its window counts the tokens before, transformers' the token itself as well; grouped heads as they are."""
    parts = [states(heads, torch.bfloat16) for heads in (4, 2, 2)]
    ends = row_ends(LENGTHS)
    how: dict[str, Any] = {"row_lengths": LENGTHS, "row_ends": ends, "sliding_window": window, "scaling": 0.3}
    found, _ = attend(torch.nn.Module(), *parts, None, **how)
    assert torch.equal(found, parts[0].transpose(1, 2))
    ((query, key, value, first, second, longest, longest_key, keywords),) = kernel
    assert (query.shape, key.shape, value.shape) == ((18, 4, 16), (18, 2, 16), (18, 2, 16))
    assert first is second is ends
    assert ends.dtype == torch.int32
    assert ends.tolist() == [0, 5, 6, 15, 18]
    assert (longest, longest_key) == (9, 9)
    assert keywords == {"scale": 0.3, "window_size": reach, "enable_gqa": True}


def test_a_torch_that_asks_nothing_about_groups_is_told_nothing(kernel: list[Any], monkeypatch: pytest.MonkeyPatch):
    """2.11, where the argument would be a TypeError in the first step on a GPU."""
    monkeypatch.setattr(attention, "_TOLD_OF_GROUPS", False)
    attend(torch.nn.Module(), *[states(h, torch.bfloat16) for h in (4, 2, 2)], None, row_lengths=LENGTHS)
    assert kernel[0][-1].keys() == {"scale", "window_size"}


def test_dropout_and_a_cap_do_not_go_through_the_kernel(kernel: list[Any]):
    """It knows neither: rows one after the other, or an error that the probe hears."""
    parts = [states(2, torch.bfloat16) for _ in range(3)]
    attend(torch.nn.Module(), *parts, None, row_lengths=LENGTHS, dropout=0.1)
    with pytest.raises(attention.RowsUnknown):
        attend(torch.nn.Module(), *parts, None, row_lengths=LENGTHS, softcap=30.0)
    assert kernel == []


def test_under_autocast_states_in_float32_become_halves(kernel: list[Any]):
    """Norms kept in float32 leave query and key in it, which the kernel does not take."""
    parts = [states(2), states(2), states(2, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        attend(torch.nn.Module(), *parts, None, row_lengths=LENGTHS)
    assert [each.dtype for each in kernel[0][:3]] == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "taken"),
    [
        ((8, 0), torch.bfloat16, 128, True), ((9, 0), torch.float16, 256, True), ((7, 5), torch.float16, 128, False),
        ((8, 0), torch.float32, 128, False), ((8, 0), torch.bfloat16, 264, False), ((8, 0), torch.bfloat16, 20, False),
    ],
)  # fmt: skip
def test_which_states_the_kernel_takes(capability: Any, dtype: Any, size: int, taken: bool, monkeypatch: Any):
    """Ampere and later, two number formats, heads up to 256 in steps of 8."""

    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self) -> None:
            self.shape, self.dtype = (1, 4, 18, size), dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    one: Any = OnGpu()
    assert attention.takes_varlen(one, one) is taken

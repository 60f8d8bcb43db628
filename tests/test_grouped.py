"""Products in groups: which kernel where, no wait for the device, and our Triton kernels against plain products."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sft.models import experts, grouped
from tests.test_experts import adapted, routed

# What makes the host wait for the device, or hides that it does.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "unique", "_grouped_mm", "masked_select")


@pytest.mark.parametrize(
    ("capability", "dtype", "way"),
    [
        ((8, 0), torch.bfloat16, "triton"),
        ((8, 6), torch.bfloat16, "triton"),
        ((8, 9), torch.float16, "triton"),
        ((9, 0), torch.bfloat16, "torch"),
        ((9, 0), torch.float32, "triton"),
        ((10, 0), torch.bfloat16, "torch"),
        ((12, 0), torch.bfloat16, "triton"),
    ],
)
def test_torchs_kernel_only_where_it_has_one(capability: Any, dtype: Any, way: str, monkeypatch: pytest.MonkeyPatch):
    """bfloat16 on Hopper and Blackwell servers; on Ampere it is a loop over experts with a wait in every layer."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(grouped, "triton_missing", list)
    weight: Any = SimpleNamespace(is_cuda=True, device="cuda", dtype=dtype)
    assert grouped.way_of(weight) == way
    monkeypatch.setattr(grouped, "triton_missing", lambda: ["a C compiler"])
    assert grouped.way_of(weight) == ("loop" if way == "triton" else "torch")


def test_a_run_says_how_experts_are_multiplied(monkeypatch: pytest.MonkeyPatch):
    """One sentence for all layers, none for a model without adapters on experts."""
    model = routed(adapted())
    assert experts.products(model) == "Experts with adapters: torch's kernel for products in groups"
    monkeypatch.setattr(experts, "way_of", lambda weight: "triton")
    assert experts.products(model) == "Experts with adapters: a Triton kernel for products in groups"
    assert experts.products(adapted(targets=["q_proj"])) == ""


class Ops(TorchDispatchMode):
    """Counts the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def of_each_expert(ends: torch.Tensor, rows: int) -> torch.Tensor:
    """(experts, rows): 1.0 where a row is the expert's."""
    row, begin = torch.arange(rows), torch.cat([ends.new_zeros(1), ends[:-1]])
    return ((row >= begin[:, None]) & (row < ends[:, None])).float()


def dense_rows(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Every row through every expert, and nine tenths thrown away: what a kernel may be compared with."""
    return torch.einsum("er,ri,eio->ro", of_each_expert(ends, len(x)).to(x.dtype), x, matrices)


def dense_columns(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.einsum("er,ir,ro->eio", of_each_expert(ends, len(right)).to(left.dtype), left, right)


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["down_proj"]])
def test_a_layer_with_our_kernels_waits_for_nothing_and_gives_what_pefts_does(
    targets: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Forward and backward of a mixture's layer, router included, as on an A100: none of the operations that make the
    host wait, and PEFT's numbers within 1e-5. Dense products stand in for the kernels, which need a GPU."""
    model = adapted(8, targets)
    other = routed(model)
    monkeypatch.setattr(grouped, "way_of", lambda weight: "triton")
    kernels = SimpleNamespace(rows=dense_rows, columns=dense_columns)
    monkeypatch.setitem(sys.modules, "sft.models.grouped_kernels", kernels)  # type: ignore[arg-type]
    monkeypatch.setattr("sft.models.grouped_kernels", kernels, raising=False)
    hidden = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for each in (model, other):
        x = hidden.clone().requires_grad_()
        with Ops() as ops:
            found = each.get_base_model().model.layers[0].mlp(x)
            (found[0] if isinstance(found, tuple) else found).square().sum().backward()
        trained = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        results.append((found.detach(), x.grad, trained))
    assert {name: ops.counts[name] for name in WAITS if ops.counts[name]} == {}
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-5, atol=1e-5)
    assert results[0][2].keys() == results[1][2].keys()
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], gradient, rtol=1e-5, atol=1e-4, msg=name)


INTERPRETED = """
import torch
from sft.models import grouped_kernels
from tests.test_grouped import dense_columns, dense_rows
torch.manual_seed(0)
for counts, ins, outs in (([5, 0, 90, 1], 40, 24), ([0, 3, 0, 0, 2], 16, 130), ([700, 3], 70, 20)):
    for dtype, close in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        x, y = torch.randn(sum(counts), ins).to(dtype), torch.randn(sum(counts), outs).to(dtype)
        w = (torch.randn(len(counts), outs, ins) / ins**0.5).to(dtype).transpose(1, 2)
        found, wanted = grouped_kernels.rows(x, w, ends), dense_rows(x.float(), w.float(), ends)
        torch.testing.assert_close(found.float(), wanted, rtol=close, atol=close)
        found, wanted = grouped_kernels.columns(x.T, y, ends), dense_columns(x.T.float(), y.float(), ends)
        torch.testing.assert_close(found.float(), wanted, rtol=close, atol=close * wanted.abs().max().item())
print("equal")
"""

COMPILED = """
from triton.compiler import ASTSource, compile
from triton.backends.compiler import GPUTarget
from sft.models.grouped_kernels import columns_kernel, rows_kernel
pointers = {"x", "matrices", "out", "left", "right"}
for kernel, sizes in (
    (rows_kernel, {"EXPERTS": 128, "ROWS": 64, "INS": 64, "OUTS": 128}),
    (columns_kernel, {"ROWS": 32, "INS": 64, "OUTS": 128}),
):
    for dtype in ("bf16", "fp16", "fp32"):
        kinds = {n: f"*{dtype}" if n in pointers else "*i32" if n == "ends" else "i32" for n in kernel.arg_names}
        kinds |= dict.fromkeys(sizes, "constexpr")
        if dtype == "fp32":
            sizes = sizes | {"INS": 32}
        places = {(kernel.arg_names.index(n),): value for n, value in sizes.items()}
        for card in (80, 86, 89, 90, 100, 120):
            built = compile(ASTSource(kernel, kinds, places), target=GPUTarget("cuda", card, 32))
            limit = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[card] * 1024
            assert built.asm["cubin"] and built.metadata.shared <= limit, (card, dtype, built.metadata.shared)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("program", "interpret", "last"), [(INTERPRETED, "1", "equal"), (COMPILED, "0", "compiled")])
def test_the_kernels_give_what_plain_products_do_and_compile(program: str, interpret: str, last: str, tmp_path: Path):
    """Empty groups, sizes that no block divides, in Triton's interpreter, which multiplies bfloat16 as integers and
    needs a numpy that makes numbers of arrays; then compiled without a device for Ampere to Blackwell, in all three
    number formats, within each card's shared memory."""
    pytest.importorskip("triton")
    if interpret == "1" and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton's interpreter wants numpy below 2.4")
    variables = {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith(last), done.stderr[-2000:]

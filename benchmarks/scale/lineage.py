"""A lineage of adapters folded at once, as the program does, beside folding each into the merge before it.

`python -m benchmarks.scale.lineage`: seconds, and how far the bfloat16 weights are from the sum computed in float64,
as a share of the length of all updates together.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.merging import SIZES, make, matrices, write_adapter
from benchmarks.tables import amount, grid
from sft.merging.merge import merge

SCALING = 2.0  # alpha 32 over rank 16, as benchmarks.merging writes them


def measure(folder: Path, adapters: int, sizes: tuple[int, ...] = SIZES["small"]) -> dict[str, Any]:
    """The figures of one lineage of different random adapters; `folder` is empty."""
    make(folder, sizes)
    chain = [write_adapter(folder / f"adapter{number}", sizes, seed=number + 1) for number in range(adapters)]
    started = time.perf_counter()
    merge(folder / "base", chain, folder / "at_once")
    at_once = time.perf_counter() - started
    model, started = folder / "base", time.perf_counter()
    for number, adapter in enumerate(chain):
        merge(model, [adapter], folder / f"step{number}")
        model = folder / f"step{number}"
    one_by_one = time.perf_counter() - started
    return {
        "adapters": adapters, "seconds": at_once, "error": error(folder / "at_once", folder, chain, sizes),
        "one_by_one_seconds": one_by_one, "one_by_one_error": error(model, folder, chain, sizes),
    }  # fmt: skip


def error(merged: Path, folder: Path, chain: list[Path], sizes: tuple[int, ...]) -> float:
    """Length of (merged - exact) over length of the updates, over all matrices with adapters."""
    hidden, wide, layers, *_ = sizes
    found, base = tensors(merged), tensors(folder / "base")
    factors = [tensors(adapter) for adapter in chain]
    off = updated = 0.0
    for name in (f"model.layers.{layer}.{each}" for layer in range(layers) for each in matrices(hidden, wide)):
        update = torch.zeros(found[f"{name}.weight"].shape, dtype=torch.float64)
        for each in factors:
            a, b = (each[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
            update += SCALING * (b @ a)
        exact = base[f"{name}.weight"].double() + update
        off += (found[f"{name}.weight"].double() - exact).square().sum().item()
        updated += update.square().sum().item()
    return (off / updated) ** 0.5


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def main(numbers: list[int]) -> None:
    figures = []
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix="staged_sft_lineage_"))
        try:
            figures.append(measure(folder, number))
        finally:
            shutil.rmtree(folder)
    head = ["adapters", "at once", "error", "one by one", "error"]
    rows = [[str(f["adapters"]), amount(f["seconds"], "s"), f"{f['error']:.2e}", amount(f["one_by_one_seconds"], "s"),
             f"{f['one_by_one_error']:.2e}"] for f in figures]  # fmt: skip
    print(grid(head, rows))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.lineage", description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8])
    main(parser.parse_args().adapters)

"""Item 6: cost as work grows. Each table ends with the exponent between its last two rows: 1 is linear."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from benchmarks.common import Bench, answer, child, progress, resident_bytes
from benchmarks.inputs import tiny_model
from benchmarks.merging import SIZES, make, merge_ours
from benchmarks.tables import amount

LENGTHS = (256, 512, 1024, 2048, 4096)
ROWS = (1_000, 10_000, 100_000, 1_000_000)
ADAPTERS = (1, 2, 4, 8)
SOURCES = (1, 2, 4, 8, 16, 32)


def measure(bench: Bench) -> dict[str, Any]:
    """Four tables; each point the median of the rounds in a process of its own."""
    folder = bench.folder("growth")
    model = bench.model if bench.full else tiny_model(folder / "model", bench.rows, hidden=256, layers=6)
    child("growth", "make", folder)
    cache = {"HF_DATASETS_CACHE": str(bench.folder("cache"))}
    spent = f"{'SmolLM2-135M' if bench.full else 'a small model'}, rows of this length joined to 4,096 tokens"
    tables = [
        table(f"Training step over sequence length ({spent})", "tokens a row", LENGTHS,
              lambda n: child("growth", "step", model, n), rounds=bench.rounds, against="row"),
        table("Splitting, mixing and upsampling over rows", "rows", ROWS,
              lambda n: child("labels", "mix", n, **cache), rounds=bench.rounds),
        table("Merging over adapters in the lineage", "adapters", ADAPTERS,
              lambda n: child("growth", "merge", folder, n), rounds=bench.rounds),
        table("Mixing 100,000 rows over sources", "sources", SOURCES,
              lambda n: child("labels", "mix", 100_000, n, **cache), rounds=bench.rounds),
    ]  # fmt: skip
    shown = [{key: each[key] for key in ("title", "head", "rows")} for each in tables]
    return {"title": "Growth", "comparisons": [], "tables": shown, "figures": [each["points"] for each in tables]}


def table(
    title: str, what: str, sizes: Sequence[int], run: Callable[[int], Any], *, rounds: int, against: str = ""
) -> dict[str, Any]:
    """Seconds and memory at every size. `against` "row": per row of a fixed number of tokens."""
    points = []
    for size in sizes:
        progress(f"{title}: {size:,}")
        runs = [run(size).figures() for _ in range(rounds)]
        points.append(
            {name: median(found[name] for found in runs) for name in ("seconds", "extra_bytes")} | {"size": size}
        )
    rows = [[f"{p['size']:,}", amount(p["seconds"], "s"), amount(p["extra_bytes"], "bytes"), ""] for p in points]
    for row, before, after in zip(rows[1:], points, points[1:], strict=False):
        exponent = math.log(after["seconds"] / before["seconds"]) / math.log(after["size"] / before["size"])
        row[3] = f"{exponent:.2f}"
    return {"title": title, "head": [what, "seconds", "memory", "exponent"], "rows": rows, "points": points}


# In a child


def train_step(model: Path, length: int, *, total: int = 4096) -> dict[str, float]:
    """Forward and backward of `total` tokens in rows of `length`, joined: seconds and memory of the step."""
    import torch

    from benchmarks.training import TARGETS
    from benchmarks.training_peers import adapted_model
    from sft.models.isolation import keep_rows_apart
    from sft.models.last_layer import lighter_on_a_cpu
    from sft.training.loss import token_cross_entropy

    loaded, adapted = adapted_model(model, "float32", TARGETS.split(","))
    keep_rows_apart(loaded, SimpleNamespace(attn="auto", torch_compile=False))
    last_layer = lighter_on_a_cpu(adapted.train(), checkpointing=False)
    ids = torch.randint(0, 1000, (1, total), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(total)[None] % length
    trained = (positions[0] >= length // 2).nonzero()[:, 0]
    before, seconds, peak = resident_bytes(), [], 0
    for _ in range(2):
        started = time.perf_counter()
        with last_layer.at(trained - 1, total):
            logits = adapted(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=trained - 1).logits
        loss = token_cross_entropy(logits.squeeze(0), ids[0, trained]).sum()
        del logits
        peak = max(peak, resident_bytes())
        loss.backward()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "extra_bytes": peak - before}


def merge_many(folder: Path, adapters: int) -> dict[str, float]:
    found = merge_ours(folder, adapters)
    shutil.rmtree(folder / "ours")
    return {"seconds": found["seconds"], "extra_bytes": found["peak_bytes"] - found["imported_bytes"]}


def main(name: str, folder: Path, *rest: str) -> None:
    if name == "make":
        answer(make(folder, SIZES["small"]))
    elif name == "step":
        answer(train_step(folder, int(rest[0])))
    else:
        answer(merge_many(folder, int(rest[0])))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

"""`python -m benchmarks [--full] [ITEM ...]`: tables for people, one JSON document last."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import evaluation, growth, labels, merging, start, tables, training
from benchmarks.common import Bench, conditions, load_average, progress
from benchmarks.inputs import benchmark_model, benchmark_rows
from benchmarks.scale import preparation

ITEMS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "start": start.measure,
    "labels": labels.measure,
    "preparation": preparation.measure,
    "training": training.measure,
    "merging": merging.measure,
    "evaluation": evaluation.measure,
    "growth": growth.measure,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"only these of {', '.join(ITEMS)}")
    parser.add_argument("--full", action="store_true", help="five rounds and sizes of real work: about two hours")
    parser.add_argument("--rounds", type=int, help="alternating rounds (5)")
    parser.add_argument("--model", type=Path, help="a folder with SmolLM2-135M-Instruct (default: made from the extra)")
    parser.add_argument(
        "--llamafactory",
        type=Path,
        metavar="PYTHON",
        help="the Python of an environment with LLaMA-Factory: train with it too",
    )
    parser.add_argument(
        "--scratch", type=Path, help="where models and outputs of the runs go (default: a temporary folder)"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON document there")
    options = parser.parse_args()
    unknown = sorted(set(options.items) - set(ITEMS))
    if unknown:
        parser.error(f"no such item: {', '.join(unknown)}; there are {', '.join(ITEMS)}")
    return options


def main(options: argparse.Namespace) -> None:
    scratch = Path(options.scratch or tempfile.mkdtemp(prefix="staged_sft_bench_")).resolve()
    os.environ.setdefault("HF_DATASETS_CACHE", str(scratch / "datasets"))
    try:
        model, real = (options.model.resolve(), True) if options.model else benchmark_model(scratch)
        rounds = options.rounds or 5
        bench = Bench(options.full, rounds, scratch, model, benchmark_rows(scratch), real, options.llamafactory)
        report: dict[str, Any] = {"conditions": conditions(bench), "items": {}}
        for name in options.items or ITEMS:
            report["items"][name] = run(name, bench)
        text = json.dumps(report, indent=1)
        if options.output:
            options.output.write_text(text + "\n", encoding="utf-8")
        print(text)
    finally:
        if not options.scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def run(name: str, bench: Bench) -> dict[str, Any]:
    """One item: measured, shown as a table, returned with the load of the machine before and after."""
    progress(f"{name} ...")
    before, started = load_average(), time.monotonic()
    result = ITEMS[name](bench)
    print(f"\n{result['title']}", flush=True)
    if result["comparisons"]:
        print(f"\n{tables.comparisons(result['comparisons'])}", flush=True)
    for table in result.get("tables", []):
        print(f"\n{table['title']}\n\n{tables.grid(table['head'], table['rows'])}", flush=True)
    print(flush=True)
    return result | {"load_average": [before, load_average()], "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    sys.exit(main(arguments()))

#!/usr/bin/env python3
"""Measure the training step of a model with random weights: nothing is downloaded. run_benchmark.sh starts it.

Writes results/<UTC time>_<model>_<nodes>node/summary.json: tokens per second (in all and per device), step time, peak
memory, the model's operations against the device's measured matrix rate, cost of evaluation and checkpoints, and every
condition. MODEL is a name of configs/benchmark_models.json, a model folder or a hub id.
"""

import argparse
import tempfile
from pathlib import Path

from sft.errors import Problems
from sft.programs.command_line import run_program, whole_number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--nodes", type=whole_number, default=1, help="machines this run is spread over (1)")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="where results go (results)"
    )
    parser.add_argument("--seq-len", type=whole_number, default=512, help="tokens of a row (512)")
    parser.add_argument("--micro-batch", type=whole_number, default=4, help="rows per device and micro-batch (4)")
    parser.add_argument("--accumulation", type=whole_number, default=1, help="micro-batches of a step (1)")
    parser.add_argument("--steps", type=whole_number, default=10, help="measured steps (10)")
    parser.add_argument("--warmup", type=whole_number, default=3, help="steps before them (3)")
    parser.add_argument("--lora-r", type=int, default=16, help="rank of the adapter; 0 trains every weight (16)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: bfloat16 on GPUs"
    )
    return parser.parse_args()


def table(summary: dict) -> str:
    """The main figures for people."""
    return (
        f"{summary['model']}: {summary['processes']} x {summary['device']}, {summary['distributed']}\n"
        f"  tokens/s            {summary['tokens_per_second']:>14,.0f}\n"
        f"  tokens/s per device {summary['tokens_per_second_per_device']:>14,.0f}\n"
        f"  seconds per step    {summary['step_seconds']:>14,.3f}\n"
        f"  peak memory, GB     {summary['peak_memory_bytes'] / 1e9:>14,.2f}\n"
        f"  of the matrix rate  {summary['flops_share']:>14.1%}"
    )


def measured(options: argparse.Namespace) -> dict:
    """The figures and their conditions, on every process."""
    import torch

    from sft.programs import benchmark

    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    names = ("seq_len", "accumulation", "steps", "warmup", "lora_r", "checkpointing", "micro_batch")
    load = benchmark.Load(dtype=dtype, **{name: getattr(options, name) for name in names})
    with tempfile.TemporaryDirectory() as folder:
        return benchmark.measure(options.model, load, Path(folder))


def write(options: argparse.Namespace, figures: dict) -> None:
    """summary.json in its own folder; the table for people, then one line of JSON."""
    from sft.storage import atomic, json_files

    summary = {"model": options.model, "nodes": options.nodes, "time": atomic.utc_stamp()} | figures
    target = options.results / f"{summary['time']}_{Path(options.model).name}_{options.nodes}node"
    if target.exists():
        raise Problems([f"{target}: exists already and is not overwritten"])
    with atomic.published_folder(target) as folder:
        json_files.write_json(folder / "summary.json", summary)
    print(f"{table(summary)}\n  written to {target / 'summary.json'}")
    print(json_files.json_text(summary, indent=None))


def main() -> None:
    options = arguments()
    if options.lora_r < 0:
        raise Problems([f"--lora-r {options.lora_r}: a rank is 1 or more, 0 trains every weight"])
    from sft.environment import offline_unless_reachable, silence_libraries, silence_torch

    offline_unless_reachable()
    silence_libraries()
    silence_torch()
    figures = measured(options)
    import torch
    from accelerate import PartialState

    if PartialState().is_main_process:
        write(options, figures)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(run_program(main))

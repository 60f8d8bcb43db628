"""`python -m benchmarks.memory [SHAPE ...]`: peaks of training steps on the CPU beside the estimates of --check.

Each shape in a process of its own: a random model, its adapter, the largest pass forward and backward and an AdamW
step; what the process held at most (VmHWM) less what it held before there was a model, libraries being loaded.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft.heap import return_freed_memory, return_holes, tight_environment

LLAMA = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
# name -> configuration, lengths of the rows joined into the pass, number format, gradient checkpointing
SHAPES: dict[str, tuple[dict[str, Any], list[int], str, bool]] = {
    "dense": (LLAMA, [256, 256], "float32", False),
    "large vocabulary": (LLAMA | {"vocab_size": 98304, "num_hidden_layers": 4}, [256, 256], "float32", False),
    "long row": (LLAMA | {"num_hidden_layers": 4}, [2048], "float32", False),
    "packed": (LLAMA | {"num_hidden_layers": 6}, [64] * 16, "bfloat16", False),
    "checkpointed": (LLAMA | {"num_hidden_layers": 12}, [512, 512], "float32", True),
    "mixture": (
        {
            "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
            "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "norm_topk_prob": True,
        }, [256, 256], "float32", False,
    ),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 16384},
        [256, 256], "float32", False,
    ),
    "windows": (
        {
            "model_type": "gemma3_text", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16384,
            "sliding_window": 128,
        }, [512, 256], "bfloat16", False,
    ),
}  # fmt: skip
FIGURES = ("estimate", "measured", "tensors", "libraries")
TINY = {
    "hidden_size": 64, "n_embd": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "n_layer": 2, "vocab_size": 256,
}  # fmt: skip
TRAINED = 2  # every second token of a row
GIVEN = {"gpt2": ("c_attn", "c_proj", "c_fc")}


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(SHAPES))
    if unknown:
        sys.exit(f"no such shape: {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    found = []
    print(
        f"{'shape':<18}{'format':>10}{'estimate':>10}{'measured':>10}{'ratio':>8}{'tensors':>10}{'libraries':>10}   MiB"
    )
    for name in names or SHAPES:
        found.append(beside(name))
        estimate, measured, tensors, libraries = (found[-1][key] / 2**20 for key in FIGURES)
        print(
            f"{name:<18}{SHAPES[name][2]:>10}{estimate:>10,.0f}{measured:>10,.0f}{estimate / measured:>8.3f}"
            f"{tensors:>10,.0f}{libraries:>10,.0f}",
            flush=True,
        )
    print(json.dumps(found))


def beside(name: str) -> dict[str, Any]:
    """Estimate and peak of a shape, in bytes, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", name]
    environ = tight_environment(os.environ)  # as train.py has it
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return {"shape": name} | json.loads(done.stdout.splitlines()[-1])


def one(name: str) -> dict[str, Any]:
    """In this process; a step of a tiny model of the kind goes before, so that what libraries load late is there."""
    from sft.environment import silence_libraries, silence_torch

    silence_libraries()
    silence_torch()

    import torch
    from transformers import AutoConfig

    from sft.planning.activations import BatchShape
    from sft.planning.memory import estimate
    from sft.settings import Settings

    values, lengths, dtype, checkpointing = SHAPES[name]
    torch.manual_seed(0)
    scratch = Path(tempfile.gettempdir())
    more = {"lora_target_modules": GIVEN[name]} if name in GIVEN else {}
    settings = Settings(stage=1, env_dir=scratch, base_model="x/y", out_lora_dir=scratch / "out", dtype=dtype, **more)
    first = resident("VmRSS")
    train(AutoConfig.for_model(**values | TINY), settings, [8, 8], checkpointing=checkpointing)
    settle()
    base = resident("VmRSS")
    config = AutoConfig.for_model(**values)
    tensors = train(config, settings, lengths, checkpointing=checkpointing)
    peak = resident("VmHWM")
    trains = sum(length - length // TRAINED for length in lengths)
    batch = BatchShape(sum(lengths), trains, rows=len(lengths))
    need = estimate(config, settings, batch, checkpointing=checkpointing, available=0)
    return {
        "estimate": need.training, "measured": peak - base, "libraries": base - first, "tensors": tensors,
        "parts": need.record(),
    }  # fmt: skip


def train(config: Any, settings: Any, lengths: list[int], *, checkpointing: bool) -> int:
    """Two steps of a random model; the bytes of all its tensors that lived at once in a third, counted as they come and
    go."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from sft.models.isolation import keep_rows_apart
    from sft.models.model import compute_dtype, weight_dtype
    from sft.planning.activations import Tally, with_adapter
    from sft.planning.step_time import timed_passes
    from sft.training.batches import join_rows

    rows = [
        {"position": number, "epoch": 0, "input_ids": np.full(length, 7, np.int64),
         "labels": np.r_[np.full(length // TRAINED, -100), np.full(length - length // TRAINED, 7)].astype(np.int64)}
        for number, length in enumerate(lengths)
    ]  # fmt: skip
    batch = join_rows([rows])
    names = ("input_ids", "position_ids", "labels", "row_ends", "row_lengths")
    bare = AutoModelForCausalLM.from_config(config, dtype=weight_dtype(settings))
    isolation = keep_rows_apart(bare, settings)
    model = with_adapter(bare, settings).train()
    if checkpointing:
        return_freed_memory(sparingly=True)
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        bare.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for _ in range(2):
        timed_passes(model, isolation.passes({name: batch[name] for name in names}), compute_dtype(settings))
        optimizer.step()
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.zero_()  # kept, as those that earlier passes of a step leave
    with Tally(model) as tally:
        timed_passes(model, isolation.passes({name: batch[name] for name in names}), compute_dtype(settings))
    kept = sum(parameter.nbytes for parameter in model.parameters()) + 3 * sum(p.nbytes for p in trained)
    return kept + tally.peak


def settle() -> None:
    """Gives free memory back and begins the peak anew."""
    gc.collect()
    return_holes()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def resident(line: str) -> int:
    """A line of /proc/self/status in bytes."""
    for text in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if text.startswith(line):
            return int(text.split()[1]) * 1024
    raise LookupError(line)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2])))
    else:
        main(sys.argv[1:])

"""Item 4, merging: base and adapter to a published, verified folder, beside copying that folder and beside PEFT."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Bench, alternate, answer, child, comparison, limit, peak_resident_bytes, resident_bytes

# hidden, feed-forward, layers, vocabulary, elements per shard
SIZES = {
    "small": (768, 3072, 12, 32_000, 40_000_000),
    "large": (2048, 8192, 16, 128_256, 160_000_000),  # 1.24 billion parameters, the shape of Llama-3.2-1B
    # By hand (`python -m benchmarks.merging make FOLDER 7b`, then `ours FOLDER`): Mistral-7B, and four layers of a 70B.
    "7b": (4096, 14336, 32, 32_000, 1_000_000_000),
    "70b-layers": (8192, 28672, 4, 128_256, 2_500_000_000),
}
RANK = 16


def measure(bench: Bench) -> dict[str, Any]:
    """The table of the item."""
    folder = bench.folder("merging")
    made = child("merging", "make", folder, "large" if bench.full else "small").figures()

    def run(name: str) -> dict[str, float]:
        finished = child("merging", name, folder)
        shutil.rmtree(folder / name)
        return finished.figures() | {"whole_seconds": finished.seconds}

    figures = alternate({name: lambda name=name: run(name) for name in ("ours", "copy", "peft")}, bench.rounds)
    middle = {name: found["median"] for name, found in figures.items()}
    ours, copy, peft = middle["ours"], middle["copy"], middle["peft"]
    beyond = (ours["peak_bytes"] - ours["imported_bytes"]) / 1e9
    lines = [
        comparison("merge", ours["seconds"], copy["seconds"], unit="s", against="copy and sync", target="<= 2.0"),
        comparison("merge", ours["seconds"], peft["seconds"], unit="s", against="merge_and_unload + save_pretrained"),
        comparison(
            "merge as a command", ours["whole_seconds"], peft["whole_seconds"], unit="s", target="<= 0.18",
            against="the same with start-up",
        ),
        comparison("peak memory", ours["peak_bytes"], peft["peak_bytes"], unit="bytes", against="PEFT's process"),
        limit("memory beyond the interpreter and torch", beyond, "<= 1.5", unit="GB"),
    ]  # fmt: skip
    size = f"{made['parameters'] / 1e9:.2f} billion parameters, {made['bytes'] / 1e9:.2f} GB in {made['shards']} shards"
    return {"title": f"Merge: bfloat16, {size}, LoRA r {RANK}", "comparisons": lines, "figures": figures, "made": made}


# In a child


def shapes(sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, its output head tied."""
    hidden, wide, layers, words, _ = sizes
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    for number in range(layers):
        layer = f"model.layers.{number}."
        found |= {f"{layer}{name}.weight": shape for name, shape in matrices(hidden, wide).items()}
        found |= {f"{layer}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def matrices(hidden: int, wide: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
    }  # fmt: skip


def make(folder: Path, sizes: tuple[int, ...]) -> dict[str, float]:
    """A base model of random bfloat16 weights in several shards, and `adapter` of LoRA on all its matrices."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    shards, parameters = write_shards(base, sizes)
    hidden, wide, layers, words, _ = sizes
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256,
        "vocab_size": words, "tie_word_embeddings": True, "dtype": "bfloat16", "head_dim": 64,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    write_adapter(folder / "adapter", sizes)
    size = sum(path.stat().st_size for path in base.iterdir())
    return {"parameters": parameters, "bytes": size, "shards": shards}


def write_shards(base: Path, sizes: tuple[int, ...]) -> tuple[int, int]:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    parts: list[dict[str, Any]] = [{}]
    elements = parameters = 0
    for name, shape in shapes(sizes).items():
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        if elements and elements + tensor.numel() > sizes[-1]:
            parts.append({})
            elements = 0
        parts[-1][name] = tensor
        elements, parameters = elements + tensor.numel(), parameters + tensor.numel()
    names = [f"model-{number + 1:05}-of-{len(parts):05}.safetensors" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, base / name, metadata={"format": "pt"})
    index = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    text = json.dumps({"metadata": {"total_size": 2 * parameters}, "weight_map": index})
    (base / "model.safetensors.index.json").write_text(text)
    return len(parts), parameters


def write_adapter(folder: Path, sizes: tuple[int, ...], *, seed: int = 1) -> Path:
    """LoRA of rank 16 on every matrix in the layers, both factors random."""
    import torch
    from safetensors.torch import save_file

    hidden, wide, layers, *_ = sizes
    torch.manual_seed(seed)
    tensors = {}
    for number in range(layers):
        for name, (rows, columns) in matrices(hidden, wide).items():
            key = f"base_model.model.model.layers.{number}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(name.split(".")[1] for name in matrices(hidden, wide)),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merge_ours(folder: Path, adapters: int = 1) -> dict[str, float]:
    from sft.merging.merge import merge

    imported, started = resident_bytes(), time.perf_counter()
    merge(folder / "base", [folder / "adapter"] * adapters, folder / "ours")
    return {"seconds": time.perf_counter() - started, "imported_bytes": imported, "peak_bytes": peak_resident_bytes()}


def copy(folder: Path) -> dict[str, float]:
    """What no merge can be faster than by much: the same bytes read, written and pushed to the disk."""
    started = time.perf_counter()
    shutil.copytree(folder / "base", folder / "copy")
    for path in (folder / "copy").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak_resident_bytes()}


def merge_peft(folder: Path) -> dict[str, float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    imported, started = resident_bytes(), time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder / "peft")
    return {"seconds": time.perf_counter() - started, "imported_bytes": imported, "peak_bytes": peak_resident_bytes()}


def main(name: str, folder: Path, *rest: str) -> None:
    if name == "make":
        answer(make(folder, SIZES[rest[0]]))
    else:
        answer({"ours": merge_ours, "copy": copy, "peft": merge_peft}[name](folder))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

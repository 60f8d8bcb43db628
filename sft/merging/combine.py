"""The adapters of a ladder as one LoRA for the untouched base: W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2].

Exact in that form, whatever ranks, scalings and targets the stages have: ranks add up. `rank` shortens it to the best
approximation of that rank (Eckart-Young), with the error said.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sft.errors import Problems
from sft.merging.adapter_files import PREFIX, Adapter, LowRank, Update, factors, is_plain, read_adapter, updates_of
from sft.merging.layout import Layout, base_layout
from sft.merging.plain import UnknownLayout
from sft.merging.weights import model_folder
from sft.stages.paths import ADAPTER, ADAPTER_CONFIG
from sft.storage import json_files

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Combined:
    """What came out: rank by parameter, and by parameter the length of what a lower rank left out, as a share of the
    update's length (0 where nothing was left out)."""

    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def combine(
    base: str | Path,
    adapters: Sequence[Path],
    folder: Path,
    *,
    rank: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Combined:
    """Writes adapter_model.safetensors (float32) and adapter_config.json into `folder`.

    Raises:
        Problems: an adapter is more than low-rank updates (DoRA, modules trained in full), or not plain LoRA.
    """
    read = [read_adapter(adapter) for adapter in adapters]
    for adapter in read:
        _refuse_what_does_not_add_up(adapter)
    source, _ = model_folder(str(base), revision)
    try:
        with base_layout(source, folder, trust_remote_code=trust_remote_code) as (layout, _):
            updates = updates_of(read, layout)
    except UnknownLayout as error:
        raise Problems([f"--as-adapter: {error}; leave it away and serve the merged model"]) from error
    found = Combined()
    tensors: dict[str, torch.Tensor] = {}
    for parameter, parts in updates.items():
        a, b = _joined(parts)
        if rank is not None and rank < a.shape[1]:
            a, b, found.errors[parameter] = shortened(a, b, rank)
        found.ranks[parameter] = a.shape[1]
        tensors |= _named(parameter, (a, b), layout, updates)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    json_files.write_json(folder / ADAPTER_CONFIG, _config(read, found, layout, base=str(base)))
    return found


def _refuse_what_does_not_add_up(adapter: Adapter) -> None:
    reason = ""
    if adapter.config.get("use_dora"):
        reason = "is a DoRA adapter, whose magnitudes are not low-rank updates"
    elif adapter.config.get("modules_to_save"):
        reason = "holds modules that were trained in full (SFT_LORA_MODULES_TO_SAVE)"
    elif not is_plain(adapter):
        reason = "is not plain LoRA"
    if reason:
        raise Problems([f"--as-adapter: {adapter.folder} {reason}; leave --as-adapter away and serve the merged model"])


def _joined(updates: Iterable[Update]) -> Factors:
    """A (experts, ranks, in) and B (experts, out, ranks), each stage's scaling inside its B."""
    parts = [update for update in updates if isinstance(update, LowRank)]
    pairs = [factors(part) for part in parts]
    return (
        torch.cat([a for a, _ in pairs], dim=1),
        torch.cat([part.scaling * b for part, (_, b) in zip(parts, pairs, strict=True)], dim=2),
    )


def shortened(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The product B A of that rank that is nearest to it, and the length of the difference as a share of B A's.

    The singular values of B A are those of the small matrix between the orthogonal parts of B and A.
    """
    left, inner_left = torch.linalg.qr(b)
    right, inner_right = torch.linalg.qr(a.mT)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
    root = values[..., :rank].sqrt()
    left_out = values[..., rank:].square().sum().sqrt() / values.square().sum().sqrt().clamp(min=1e-30)
    shorter_b = left @ (u[..., :, :rank] * root[..., None, :])
    shorter_a = (right @ (v.mT[..., :, :rank] * root[..., None, :])).mT
    return shorter_a.contiguous(), shorter_b.contiguous(), left_out.item()


def _named(parameter: str, pair: Factors, layout: Layout, updates: dict[str, list[Update]]) -> dict[str, torch.Tensor]:
    """The two tensors under the names by which PEFT finds them again."""
    a, b = pair
    owner, _, name = parameter.rpartition(".")
    module = layout.module(owner)
    if a.shape[0] > 1 or len(layout.shape(parameter)) == 3:
        # PEFT wraps a module once for each of its parameters, the last one outermost.
        wanted = [each for each, _ in module.named_parameters(recurse=False) if f"{owner}.{each}" in updates]  # type: ignore[union-attr]
        owner += ".base_layer" * (len(wanted) - 1 - wanted.index(name))
        b = b.permute(1, 2, 0)
        flat = {"lora_A.weight": a.reshape(-1, a.shape[2]), "lora_B.weight": b.reshape(b.shape[0], -1)}
    elif isinstance(module, nn.Embedding):
        flat = {"lora_embedding_A": a[0], "lora_embedding_B": b[0]}
    else:
        flat = {"lora_A.weight": a[0], "lora_B.weight": b[0]}
    return {f"{PREFIX}{owner}.{part}": tensor.contiguous() for part, tensor in flat.items()}


def _config(adapters: Sequence[Adapter], found: Combined, layout: Layout, *, base: str) -> dict[str, Any]:
    """The last stage's configuration with the union of the targets; alpha equals the rank everywhere: B is scaled."""
    stacks = sorted(parameter for parameter in found.ranks if len(layout.shape(parameter)) == 3)
    by_name: dict[str, int] = {
        name if name in stacks else name.removesuffix(".weight"): rank for name, rank in found.ranks.items()
    }
    usual = Counter(by_name.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in by_name.items() if rank != usual}
    modules = sorted(set(by_name) - set(stacks))
    return adapters[-1].config | {
        "base_model_name_or_path": base, "r": usual, "lora_alpha": usual, "use_rslora": False, "lora_dropout": 0.0,
        "rank_pattern": others, "alpha_pattern": others, "inference_mode": True, "init_lora_weights": True,
        "target_modules": _short_names(modules, layout), "target_parameters": stacks or None, "exclude_modules": None,
    }  # fmt: skip


def _short_names(modules: Sequence[str], layout: Layout) -> list[str]:
    """q_proj where every q_proj of the model is among the modules, else the whole names."""
    chosen = set(modules)
    same: dict[str, set[str]] = defaultdict(set)
    for name, module in layout.model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D":
            same[name.rpartition(".")[2]].add(name)
    short = {name for name, all_of_it in same.items() if all_of_it <= chosen}
    return sorted({name.rpartition(".")[2] if name.rpartition(".")[2] in short else name for name in chosen})

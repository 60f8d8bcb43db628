"""train.py under FSDP2 on the CPU, saying at the end which number formats losses, gradients and their sums had."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed

import train
from sft import cli
from sft.training.trainer import StagedTrainer
from tests import fsdp_on_cpu

assert fsdp_on_cpu.connect_as_gpu
seen: dict[str, set[str]] = {"losses": set(), "loss": set(), "summed": set(), "computed": set()}
pass_losses, compute_loss = StagedTrainer.pass_losses, StagedTrainer.compute_loss
# What FSDP2 adds gradients up with: torch 2.13's name, or the one before it.
NAME = next(name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch.distributed, name))
reduce = getattr(torch.distributed, NAME)


def watched_losses(self: Any, model: Any, **inputs: Any) -> torch.Tensor:
    losses = pass_losses(self, model, **inputs)
    seen["losses"].add(str(losses.dtype))
    return losses


def watched_loss(self: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
    loss = compute_loss(self, *arguments, **keywords)
    seen["loss"].add(str(loss.dtype))
    return loss


def watched_reduce(*arguments: Any, **keywords: Any) -> Any:
    given = (*arguments, *keywords.values())
    seen["summed"] |= {str(each.dtype) for each in given if isinstance(each, torch.Tensor)}
    return reduce(*arguments, **keywords)


def computed(module: Any, inputs: Any, output: torch.Tensor) -> None:
    seen["computed"].add(str(output.dtype))


StagedTrainer.pass_losses = watched_losses  # type: ignore[method-assign]
StagedTrainer.compute_loss = watched_loss  # type: ignore[method-assign]
setattr(torch.distributed, NAME, watched_reduce)
torch.nn.modules.module.register_module_forward_hook(
    lambda module, inputs, output: computed(module, inputs, output) if isinstance(module, torch.nn.Linear) else None
)

if __name__ == "__main__":
    code = cli.command_line(train.main)
    print(f"FORMATS { ({name: sorted(found) for name, found in seen.items()}) }", flush=True)
    sys.exit(code)

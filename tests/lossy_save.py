"""train.py for a test: the library writes zeros in place of one lora_B whenever it saves."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from sft import cli


def lossy(save: Callable[..., None]) -> Callable[..., None]:
    """`Trainer._save` that loses the first up_proj's lora_B."""

    def saved(self: Trainer, output_dir: Any = None, state_dict: Any = None) -> None:
        save(self, output_dir, state_dict)
        if not self.args.should_save:
            return
        path = Path(output_dir) / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if "up_proj.lora_B" in name)
        save_file(tensors | {name: torch.zeros_like(tensors[name])}, path)

    return saved


if __name__ == "__main__":
    Trainer._save = lossy(Trainer._save)  # type: ignore[method-assign]
    sys.exit(cli.command_line(train.main))

"""train.py for a test: DeepSpeed in float16 on the CPU, which it refuses there, from a loss scale that overflows."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

import train
from sft import cli

begin = DynamicLossScaler.__init__


def begin_too_high(self: Any, init_scale: float, *arguments: Any, **keywords: Any) -> None:
    # Without patience for the first overflow, each of them halves the scale.
    begin(self, 2.0**24, *arguments, **keywords | {"delayed_shift": 1})


DynamicLossScaler.__init__ = begin_too_high
CPU_Accelerator.is_fp16_supported = lambda self: True
CPU_Accelerator.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.float16]

if __name__ == "__main__":
    sys.exit(cli.command_line(train.main))

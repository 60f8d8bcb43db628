"""train.py for a test: accelerate takes FSDP for GPUs only, so it is told that these gloo processes have some."""

import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from sft import cli

connect = PartialState.__init__


def connect_as_gpu(self: PartialState, cpu: bool = False, **keywords: Any) -> None:
    first = not PartialState._shared_state
    connect(self, True, **keywords)
    if first:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = connect_as_gpu  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(cli.command_line(train.main))

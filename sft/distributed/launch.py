"""What accelerate, torchrun or deepspeed say in the environment of the processes they start together."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp"]


class Launched(NamedTuple):
    """This process among those that were started together, and how they share out the model.

    `offload`: what is kept in CPU memory, a set of "optimizer" and "parameters".
    """

    rank: int
    processes: int
    local_processes: int = 1
    sharding: Sharding = "none"
    deepspeed: bool = False
    offload: frozenset[str] = frozenset()

    @property
    def splits_weights(self) -> bool:
        """Whether no process holds all of the model."""
        return self.sharding in ("zero3", "fsdp")

    @property
    def first_of_machine(self) -> bool:
        """Whether this is the first process of its machine; launchers number those of one machine in a row."""
        return self.rank % self.local_processes == 0


def launched(environ: Mapping[str, str] | None = None) -> Launched:
    """What the launcher put into the environment (None: the real one); one process alone without a launcher."""
    environ = os.environ if environ is None else environ
    processes = int(environ.get("WORLD_SIZE", "1"))
    local = int(environ.get("LOCAL_WORLD_SIZE", str(processes)))
    place = int(environ.get("RANK", "0")), processes, local
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        stage, offload = _deepspeed(environ)
        names: dict[int, Sharding] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return Launched(*place, names.get(stage, "none"), deepspeed=True, offload=offload)
    if environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        kept = frozenset({"optimizer", "parameters"}) if environ.get("FSDP_OFFLOAD_PARAMS") == "true" else frozenset()
        return Launched(*place, "fsdp", offload=kept)
    return Launched(*place)


def _deepspeed(environ: Mapping[str, str]) -> tuple[int, frozenset[str]]:
    """ZeRO stage and what is off-loaded, from DeepSpeed's own file where there is one, else from accelerate's."""
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if Path(path).is_file():
        zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
        devices = {"optimizer": zero.get("offload_optimizer"), "parameters": zero.get("offload_param")}
        moved = frozenset(name for name, place in devices.items() if _is_moved((place or {}).get("device")))
        return int(zero.get("stage", 0)), moved
    keys = {"optimizer": "OPTIMIZER", "parameters": "PARAM"}
    moved = frozenset(
        name for name, key in keys.items() if _is_moved(environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{key}_DEVICE"))
    )
    return int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), moved


def _is_moved(device: Any) -> bool:
    return device in ("cpu", "nvme")

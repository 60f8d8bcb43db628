"""What a stage needs of each device, from the model's configuration: nothing is loaded, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from sft.distributed.launch import Launched, launched
from sft.evaluation.at_once import AnswerBatch, cache_bytes
from sft.models.model import compute_dtype
from sft.models.saved import quantised_layers
from sft.planning.activations import BatchShape, Device, activation_bytes, blank_model, with_adapter
from sft.planning.document import MEMORY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from sft.settings import Settings

# One absmax per 64 weights: 4 bytes, or 1 byte and one float32 per 256 of them under double quantisation.
_NF4, _NF4_DOUBLE, _INT8 = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256), 1.0
# Copies of the trained parameters an optimizer keeps; the first name that is part of the optimizer's name counts.
_STATES = {"ademamix": 3, "grokadamw": 3, "adamw": 2, "adafactor": 0, "lomo": 0, "free_sgd": 1, "sgd": 0, "radam": 2}
_STATES |= {"lion": 1, "rmsprop": 1, "adagrad": 1}
# What there is besides tensors. On a CPU: buffers of kernels, in half precision 14 MiB more, and holes freed blocks
# leave in the heap as sft/heap.py has it, more where layers run again (docs/log.md: eight shapes). On a GPU: cuBLAS's
# workspace, and NCCL's buffers where there are several.
_CPU_BUFFERS, _CPU_HALVES, _CPU_AGAIN, _CUBLAS, _NCCL = 56 * 2**20, 14 * 2**20, 36 * 2**20, 128 * 2**20, 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device. `generation` is needed while answers are made, when there are no activations."""

    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    available: int
    generation: int = 0
    traced: bool = True

    @property
    def training(self) -> int:
        """The peak of a training step."""
        return self.weights + self.adapter + self.optimizer + self.gradients + self.activations

    @property
    def total(self) -> int:
        """The peak of training and generation evaluation, whichever is larger; gradients may be kept in between."""
        return self.training + max(0, self.generation - self.activations)

    @property
    def fits(self) -> bool:
        """Whether there is as much as is needed."""
        return self.total <= self.available

    def record(self) -> dict[str, int | str]:
        """The `memory` object of `--check --json`."""
        how = "a step of shapes" if self.traced else "a rule of thumb"
        return {name: getattr(self, name) for name in MEMORY} | {"activations_by": how}


@dataclass(frozen=True)
class Parameters:
    """Bytes of a model: all that is frozen, all that is trained, the largest layer and the largest frozen matrix."""

    frozen: int
    trained: int
    trained_count: int
    trained_width: int
    largest_layer: int
    largest_matrix: int


def estimate(
    config: PretrainedConfig,
    settings: Settings,
    batch: BatchShape,
    *,
    checkpointing: bool,
    launch: Launched | None = None,
    available: int | None = None,
    answers: AnswerBatch | None = None,
    device: Device | None = None,
) -> Estimate:
    """What training needs on each device. `available`: bytes there are; None asks the device. `answers`: of the
    generation evaluation. `launch` and `device`: those of this process unless others are given.

    Raises:
        Problems: no target module of the adapter exists in the model.
    """
    launch, device = launch or launched(), device or this_device(settings)
    on_gpu = device.fused_head
    parameters = parameter_bytes(config, settings)
    if launch.deepspeed and not settings.use_lora:  # weights in the compute type, beside a float32 copy
        parameters = replace(parameters, trained=parameters.trained_count * compute_dtype(settings).itemsize)
    shares = _shares(launch, on_gpu)
    adapter = parameters.trained if settings.use_lora else 0
    weights = parameters.frozen + (0 if settings.use_lora else parameters.trained)
    gathered = 2 * parameters.largest_layer if shares["weights"] > 1 else 0
    optimizer = optimizer_bytes(parameters, settings, launch) // shares["optimizer"]
    gradients = parameters.trained // shares["gradients"]
    if launch.processes > 1 and shares["gradients"] == 1 and not launch.deepspeed:
        gradients *= 2  # data parallel training keeps a second copy, in which they are exchanged
    if on_gpu:
        buffers = _CUBLAS + (_NCCL if launch.processes > 1 else 0)
    else:
        halves = 0 if device.dtype == torch.float32 else _CPU_HALVES
        buffers = _CPU_BUFFERS + halves + (_CPU_AGAIN if checkpointing else 0)
    step = activation_bytes(config, settings, batch, device=device, checkpointing=checkpointing)
    return Estimate(
        weights=(0 if "parameters" in launch.offload else weights // shares["weights"]) + gathered,
        adapter=adapter // shares["weights"],
        optimizer=0 if "optimizer" in launch.offload else optimizer,
        gradients=gradients,
        activations=step.size + buffers + parameters.largest_matrix,
        available=available_bytes(launch.local_processes) if available is None else available,
        generation=cache_bytes(config, answers, compute_dtype(settings)) if answers else 0,
        traced=step.traced,
    )


def _shares(launch: Launched, on_gpu: bool) -> dict[str, int]:
    """Among how many devices each part is shared out. FSDP without a GPU is plain data parallel training."""
    sharding = launch.sharding if launch.sharding != "fsdp" or on_gpu else "none"
    level = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}[sharding]
    names = ("optimizer", "gradients", "weights")
    return {name: launch.processes if level > place else 1 for place, name in enumerate(names)}


def parameter_bytes(config: PretrainedConfig, settings: Settings) -> Parameters:
    """Counted on the meta device, each parameter in the type it is kept in.

    Raises:
        Problems: no target module of the adapter exists in the model.
    """
    bare = blank_model(config, settings)
    quantised = dict(_quantised(bare, settings))
    sizes = {id(parameter): round(parameter.numel() * width) for parameter, width in quantised.items()}
    matrices = [parameter.numel() * parameter.itemsize for parameter in quantised]
    model = with_adapter(bare, settings)
    frozen = {id(p): sizes.get(id(p), p.numel() * p.itemsize) for p in model.parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]
    return Parameters(
        frozen=sum(frozen.values()),
        trained=sum(p.numel() * p.itemsize for p in trained),
        trained_count=sum(p.numel() for p in trained),
        trained_width=max((p.itemsize for p in trained), default=4),
        largest_layer=max(
            (sum(frozen.get(id(p), p.nbytes) for p in layer.parameters()) for layer in layers), default=0
        ),
        largest_matrix=max(matrices, default=0),
    )


def _quantised(bare: PreTrainedModel, settings: Settings) -> Iterator[tuple[torch.nn.Parameter, float]]:
    """Parameters that bitsandbytes quantises, with their bytes per weight."""
    four = _NF4_DOUBLE if settings.bnb_4bit_use_double_quant else _NF4
    widths = {"SFT_LOAD_IN_8BIT": _INT8, "SFT_LOAD_IN_4BIT": four}
    for name in settings.quantised:
        for _, weight in quantised_layers(bare):
            yield weight, widths[name]


def optimizer_bytes(parameters: Parameters, settings: Settings, launch: Launched) -> int:
    """Optimizer state for all trained parameters. DeepSpeed runs its own AdamW in float32 on a float32 copy."""
    if launch.deepspeed:
        return 12 * parameters.trained_count
    if settings.optim.startswith("paged_"):
        return 0  # it moves to CPU memory when the device needs the room
    copies = next((count for name, count in _STATES.items() if name in settings.optim), 2)
    width = 1.0 if "8bit" in settings.optim else 0.5 if "4bit" in settings.optim else parameters.trained_width
    return round(copies * width * parameters.trained_count)


def this_device(settings: Settings) -> Device:
    """The device of this process, as far as it decides about memory."""
    return Device(compute_dtype(settings), fused_head=torch.cuda.is_available())


def available_bytes(processes: int = 1) -> int:
    """Bytes this process may take on its device: a GPU's free memory, or its share of the free main memory."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    return min([psutil.virtual_memory().available, *_container_limit()]) // processes


def _container_limit() -> list[int]:
    """What a container's limit leaves, [] without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return [] if limit == "max" else [int(limit) - int(used)]
    except (OSError, ValueError):
        return []

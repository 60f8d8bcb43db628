"""--on: a stage on a machine one doesn't have: launch file, memory and settings that fit, time from stated rates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sft.distributed.launch import Launched
from sft.errors import Problems
from sft.planning.activations import Device
from sft.planning.document import Steps
from sft.planning.memory import parameter_bytes
from sft.planning.need import Need, need_of
from sft.programs.benchmark_shapes import flops_per_token, matmul_parameters
from sft.settings.schema import NAMES
from sft.settings.values import QUANTISING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sft.data.mixture import Mix
    from sft.settings import Settings


class Card(NamedTuple):
    """A GPU by its memory in GB: the card it is taken for and the TFLOP/s that training is assumed to reach on it."""

    gigabytes: int
    name: str
    rate: float


# By NVIDIA's data sheets, products of matrices in bfloat16 without sparsity (T4: float16, it has no other): T4 65, L4
# 121, A100 312, L40S 362, H100 NVL 835, H200 989, B200 2250 TFLOP/s. Assumed are 40 % of that, what LoRA training of
# joined rows is planned for on an H100 (13,500 tokens/s of Llama-3.1-8B are 44 %); 30 % on T4 and L4, whose 70 W do not
# last for more. Of two cards with the same memory the slower one stands here: an H100 of 80 GB is 3 times an A100.
CARDS = (
    Card(16, "T4", 0.3 * 65), Card(24, "L4", 0.3 * 121), Card(40, "A100", 0.4 * 312), Card(48, "L40S", 0.4 * 362),
    Card(80, "A100", 0.4 * 312), Card(94, "H100 NVL", 0.4 * 835), Card(141, "H200", 0.4 * 989),
    Card(192, "B200", 0.4 * 2250),
)  # fmt: skip
# What CUDA takes for itself before the first tensor; a GB of a data sheet is counted as 10^9 bytes.
_CONTEXT = 2**29
_MOST = 4096  # devices
PER_MACHINE = 8  # devices; more stand in several machines


class Machine(NamedTuple):
    """So many devices with so many GB each."""

    devices: int
    gigabytes: float

    @property
    def card(self) -> Card:
        """What a device is taken for: the largest card of the table that has no more memory, else the smallest."""
        return max((card for card in CARDS if card.gigabytes <= self.gigabytes), default=CARDS[0])

    @property
    def available(self) -> int:
        """Bytes a process may take on its device."""
        return round(self.gigabytes * 1e9) - _CONTEXT

    def __str__(self) -> str:
        return f"{self.devices} x {self.gigabytes:g} GB"


def machine_of(text: str) -> Machine:
    """`4x80` or `1 x 24GB`.

    Raises:
        Problems: it is something else.
    """
    match = re.fullmatch(r"\s*([1-9]\d{0,3})\s*[xX×]\s*(\d{1,4}(?:\.\d{1,3})?)\s*(?:G|GB|GiB)?\s*", text)
    if match is None or int(match[1]) > _MOST or float(match[2]) < 1:
        raise Problems([f"--on {text}: not a machine; write devices x GB of each, such as --on 4x80"])
    return Machine(int(match[1]), float(match[2]))


@dataclass(frozen=True)
class Way:
    """A stage under one launch file."""

    launch_file: str
    launch: Launched
    need: Need

    @property
    def fits(self) -> bool:
        """Whether training and answering stay within the device."""
        return self.need.estimate.fits

    def record(self) -> dict[str, Any]:
        """One entry of `tried`."""
        sizes = {"total": self.need.estimate.total, "available": self.need.estimate.available}
        return {"launch_file": f"configs/accelerate/{self.launch_file}.yaml", "fits": self.fits} | sizes


@dataclass(frozen=True)
class Elsewhere:
    """What was found for a machine: the ways tried, the last of which fits if any does, the time and the remedies."""

    machine: Machine
    stage: int
    tried: list[Way]
    seconds: float
    tokens_per_second: float
    remedies: list[str]

    @property
    def way(self) -> Way:
        """The way to take, or, where none fits, the one that needs least."""
        return self.tried[-1] if self.tried[-1].fits else min(self.tried, key=lambda way: way.need.estimate.total)

    @property
    def command(self) -> str:
        """How to launch it."""
        count, several = self.machine.devices, ""
        if count > PER_MACHINE:
            several = f"--num_machines {-(-count // PER_MACHINE)} --machine_rank RANK "
            several += "--main_process_ip HOST --main_process_port 29500 "
            if self.way.launch_file == "zero2":  # by itself it goes from machine to machine by pdsh
                several += "--deepspeed_multinode_launcher standard "
        return (
            f"accelerate launch --config_file configs/accelerate/{self.way.launch_file}.yaml --num_processes {count} "
            f"{several}train.py --stage {self.stage}"
        )

    def assumptions(self) -> list[str]:
        """What the figures rest on."""
        card = self.machine.card
        return [
            f"a device of {self.machine.gigabytes:g} GB is taken for a {card.name} (or as fast) with {card.rate:.0f} "
            f"TFLOP/s in training, of which {self.machine.devices} add up",
            f"{self.machine.gigabytes:g} GB are 10^9 bytes each, less {_CONTEXT / 2**30:g} GiB for CUDA",
            "evaluation, saving and loading are not in the time"
            + (f", nor is the network between machines of {PER_MACHINE}" if self.machine.devices > PER_MACHINE else ""),
        ]

    def record(self) -> dict[str, Any]:
        """The `on` object of `--check --json`."""
        need = self.way.need
        return {
            "devices": self.machine.devices,
            "gigabytes": self.machine.gigabytes,
            "fits": self.way.fits,
            "launch_file": f"configs/accelerate/{self.way.launch_file}.yaml" if self.way.fits else None,
            "command": self.command if self.way.fits else None,
            "gradient_checkpointing": need.checkpointing,
            "pass": {"tokens": need.batch.tokens, "rows": need.batch.rows, "most_tokens": need.tokens},
            "tried": [way.record() for way in self.tried],
            "remedies": self.remedies,
            "tokens_per_second": self.tokens_per_second,
            "assumptions": self.assumptions(),
        }


def ways(machine: Machine, settings: Settings) -> Iterator[tuple[str, Launched]]:
    """Launch files from the fastest to the most sparing. Quantised weights can't be split."""
    count = machine.devices
    if count == 1:
        yield "single", Launched(0, 1, 1)
        return
    here = min(count, PER_MACHINE)
    yield "ddp", Launched(0, count, here)
    yield "zero2", Launched(0, count, here, "zero2", deepspeed=True)
    if not settings.quantised:
        yield "multinode_zero3" if count > here else "zero3", Launched(0, count, here, "zero3", deepspeed=True)
        yield "fsdp", Launched(0, count, here, "fsdp")


def there(settings: Settings, machine: Machine) -> Settings:
    """The settings with the number format that such a card takes for `auto`."""
    halves = "float16" if settings.use_lora else "float32"  # as `compute_dtype` on a card without bfloat16
    dtype = halves if machine.card.name == "T4" else "bfloat16"
    return settings.model_copy(update={"dtype": dtype}) if settings.dtype == "auto" else settings


def need_under(config: PretrainedConfig, settings: Settings, mix: Mix, launch: Launched, machine: Machine) -> Need:
    """What a device needs under such a launch, with checkpointing and passes as `auto` would have them there."""
    device = Device(getattr(torch, settings.dtype), fused_head=True)
    return need_of(config, settings, mix, launch=launch, device=device, available=machine.available)


def plan_on(config: PretrainedConfig, settings: Settings, mix: Mix, *, machine: Machine, steps: Steps) -> Elsewhere:
    """The first launch file under which the stage fits, or what would have to change.

    Raises:
        Problems: no target module of the adapter exists in the model.
    """
    settings = there(settings, machine)
    tried = list(_tried(config, settings, mix, machine))
    remedies = [] if tried[-1].fits else list(_remedies(config, settings, mix, machine))
    checkpointing = tried[-1].need.checkpointing
    flops = flops_of_token(config, settings, length=mix.tokens["total"] / len(mix.train), checkpointing=checkpointing)
    rate = machine.card.rate * 1e12 * machine.devices / flops
    assert steps.per_epoch is not None and steps.total is not None
    seconds = mix.tokens["total"] / rate * steps.total / steps.per_epoch
    return Elsewhere(machine, settings.stage, tried, seconds, rate, remedies)


def _tried(config: PretrainedConfig, settings: Settings, mix: Mix, machine: Machine) -> Iterator[Way]:
    for file, launch in ways(machine, settings):
        way = Way(file, launch, need_under(config, settings, mix, launch, machine))
        yield way
        if way.fits:
            return


def _remedies(config: PretrainedConfig, settings: Settings, mix: Mix, machine: Machine) -> Iterator[str]:
    """Single changes under which the stage would fit, and the fewest devices of this kind that would do."""
    changes: list[dict[str, Any]] = [] if settings.use_lora else [{"use_lora": True}]
    if settings.use_lora:
        changes += [{NAMES[name]: name == each for name in QUANTISING} for each in settings.quantised_further]
    for change in changes:
        *_, way = _tried(config, settings.model_copy(update=change), mix, machine)
        if way.fits:
            yield ", ".join(f"SFT_{name.upper()}={int(value)}" for name, value in change.items() if value)
            break
    if settings.quantised:
        return
    for count in (2**power for power in range(math.ceil(math.log2(machine.devices + 1)), 7)):
        more, launch = (
            machine._replace(devices=count),
            Launched(0, count, min(count, PER_MACHINE), "zero3", deepspeed=True),
        )
        if need_under(config, settings, mix, launch, more).estimate.fits:
            yield f"{more} under ZeRO-3"
            return


def flops_of_token(config: PretrainedConfig, settings: Settings, *, length: float, checkpointing: bool) -> float:
    """Operations a trained token takes, forward and backward; recomputed activations are one more forward pass."""
    text = config.get_text_config()
    _, active = matmul_parameters(config)
    trained = parameter_bytes(config, settings).trained_count if settings.use_lora else 0
    full = not settings.use_lora
    flops = flops_per_token(text, active, trained, seq_len=round(length), full=full)
    forward = (flops - flops_per_token(text, active, trained, seq_len=0, full=full)) / 3 + 2 * (active + trained)
    return flops + (forward if checkpointing else 0)

"""Throughput of the real training step on random weights and random rows: tokens, seconds, memory, operations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from sft.programs.benchmark_shapes import flops_per_token, matmul_parameters, model_config
from sft.settings import Settings
from sft.training.arguments import training_arguments
from sft.training.batches import TrainingRows
from sft.training.trainer import StagedTrainer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Load:
    """What a run does; everything here stands in summary.json."""

    seq_len: int
    micro_batch: int
    accumulation: int
    steps: int
    warmup: int
    lora_r: int
    checkpointing: bool
    dtype: str


def random_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made where it will train."""
    on_gpu = torch.cuda.is_available() and not is_deepspeed_zero3_enabled()
    with PartialState().device if on_gpu else nullcontext():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second of a large square matrix product on this device: what the step is held against."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    synchronize()
    start, products = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        left @ right
        products += 1
        synchronize()
    return 2 * size**3 * products / passed


def synchronize() -> None:
    """Wait for the GPU, so that a clock measures work and not its announcement."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: the most the GPU's allocator held, or the process's largest resident size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_rows(count: int, *, seq_len: int, vocabulary: int) -> TrainingRows:
    """Rows of random tokens, all of one length, every token trained."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (count, seq_len), dtype=np.int32)
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "length": [seq_len] * count})
    return TrainingRows(rows)


class StepClock(TrainerCallback):
    """Seconds of every step; memory is counted from the end of the warm-up. The last step makes no checkpoint."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.start = warmup, 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        control.should_save = False


def settings_of(name: str, load: Load, folder: Path) -> Settings:
    """A stage that does this work, with everything else at its default and no rhythm but that of the steps."""
    return Settings.model_validate(
        {
            "stage": 1,
            "env_dir": folder,
            "base_model": name,
            "out_lora_dir": folder / "out",
            "dtype": load.dtype,
            "use_lora": load.lora_r > 0,
            "lora_r": max(load.lora_r, 1),
            "per_device_train_bs": load.micro_batch,
            "per_device_eval_bs": load.micro_batch,
            "grad_accum": load.accumulation,
            "gradient_checkpointing": str(int(load.checkpointing)),
            "max_steps": load.warmup + load.steps,
            "logging_steps": 10**9,
            "save_steps": 10**9,
            "report_to": ("none",),
        }
    )


def nameless_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one; random rows have no words."""
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def measure(name: str, load: Load, folder: Path) -> dict[str, Any]:
    """Train on random rows and return the figures, the same on every rank. `folder` takes a checkpoint and is spent."""
    config, settings = model_config(name), settings_of(name, load, folder)
    config.eos_token_id = config.pad_token_id = 0  # as the stand-in tokenizer has them
    # Before the arguments: from then on ZeRO-3 would share out every model that is made, counted ones too.
    total, active = matmul_parameters(config)
    args = training_arguments(settings, folder, checkpointing=load.checkpointing, evaluated=False, resumed=False)
    dtype = getattr(torch, load.dtype)
    rate = matrix_rate(PartialState().device, dtype)
    rows_per_step = load.micro_batch * load.accumulation * args.world_size
    model = random_model(config, dtype)
    trainer = StagedTrainer(
        model,
        args=args,
        settings=settings,
        tokenizer=nameless_tokenizer(),
        rows=random_rows(rows_per_step * args.max_steps, seq_len=load.seq_len, vocabulary=config.vocab_size),
    )
    clock = StepClock(load.warmup)
    trainer.add_callback(clock)
    trainer.train()
    # peft puts the adapter into the model it is given; ZeRO-3 leaves empty shapes and the real size beside them.
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    figures = {
        "step_seconds": float(np.median(clock.seconds[load.warmup :])),
        "peak_memory_bytes": peak_memory(),
        "matrix_flops_per_second": rate,
    }
    flops = flops_per_token(config, active, trained, seq_len=load.seq_len, full=not load.lora_r)
    figures |= speed(figures, tokens=rows_per_step * load.seq_len, devices=args.world_size, flops=flops)
    figures |= costs(trainer, load, folder, vocabulary=config.vocab_size)
    parameters = {"total": total, "active": active, "trained": trained}
    return {"load": asdict(load), "parameters": parameters, "flops_per_token": flops} | figures | conditions(trainer)


def speed(figures: dict[str, Any], *, tokens: int, devices: int, flops: float) -> dict[str, float]:
    """Tokens per second, in all and per device, and the share of the measured matrix rate the model's work takes."""
    total = tokens / figures["step_seconds"]
    return {
        "tokens_per_second": total,
        "tokens_per_second_per_device": total / devices,
        "model_flops_per_second_per_device": total / devices * flops,
        "flops_share": total / devices * flops / figures["matrix_flops_per_second"],
    }


def costs(trainer: StagedTrainer, load: Load, folder: Path, *, vocabulary: int) -> dict[str, float]:
    """Seconds to evaluate a thousand tokens on one device and to save the trained weights, and their size."""
    count = load.micro_batch * trainer.args.world_size
    rows = random_rows(count, seq_len=load.seq_len, vocabulary=vocabulary)
    seconds = list(timed(lambda: trainer.validation_loss(rows), times=3))
    (saving,) = timed(lambda: trainer.save_model(str(folder / "checkpoint")), times=1)
    trainer.accelerator.wait_for_everyone()
    weights = (folder / "checkpoint").rglob("*.safetensors")
    return {
        "evaluation_seconds_per_1000_tokens": min(seconds) / (load.micro_batch * load.seq_len) * 1000,
        "checkpoint_seconds": saving,
        "checkpoint_bytes": sum(path.stat().st_size for path in weights),
    }


def timed(call: Any, *, times: int) -> Iterator[float]:
    """Seconds of each of so many calls."""
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        yield time.perf_counter() - start


def conditions(trainer: StagedTrainer) -> dict[str, Any]:
    """Where and with what it was measured."""
    import platform
    from importlib.metadata import version

    names: Sequence[str] = ("torch", "transformers", "peft", "trl", "accelerate")
    on_gpu = torch.cuda.is_available()
    kind = str(trainer.accelerator.distributed_type).rsplit(".", 1)[-1]
    kind = {"NO": "one process", "MULTI_CPU": "DDP", "MULTI_GPU": "DDP"}.get(kind, kind)
    plugin = trainer.accelerator.state.deepspeed_plugin
    return {
        "processes": trainer.args.world_size,
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "threads_per_process": torch.get_num_threads(),
        "distributed": f"ZeRO-{plugin.zero_stage}" if plugin else kind,
        "attention": trainer.accelerator.unwrap_model(trainer.model).config._attn_implementation,
        "versions": {name: version(name) for name in names},
    }

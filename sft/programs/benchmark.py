"""Throughput of the real training step on random weights and random rows: tokens, seconds, memory, operations."""

from __future__ import annotations

import inspect
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
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from sft.models.model import lora_layers
from sft.programs.benchmark_shapes import flops_per_token, matmul_parameters, model_config
from sft.training.batches import EpochBatches, EpochLoader, join_rows
from sft.training.trainer import StagedTrainer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


class RandomRows(torch.utils.data.Dataset):
    """Rows of random tokens, all of one length, every token but the first trained."""

    def __init__(self, number: int, *, seq_len: int, vocabulary: int) -> None:
        self.number, self.seq_len, self.vocabulary = number, seq_len, vocabulary

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, key: int) -> list[dict[str, Any]]:
        ids = np.random.default_rng(key).integers(0, self.vocabulary, self.seq_len)
        labels = ids.copy()
        labels[0] = -100
        return [{"position": key % self.number, "input_ids": ids, "labels": labels}]


class StepClock(TrainerCallback):
    """Seconds of every step; memory is counted from the end of the warm-up."""

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


class BenchmarkTrainer(StagedTrainer):
    """StagedTrainer's step alone: no stage, no evaluation, nothing saved."""

    def __init__(
        self, model: PreTrainedModel, *, args: SFTConfig, rows: RandomRows, adapter: LoraConfig | None
    ) -> None:
        self.rows = rows
        self.step_rows: list[int] = []
        self.tokens_seen = 0
        SFTTrainer.__init__(
            self,
            model=model,
            args=args,
            data_collator=join_rows,
            # TRL wants a data set of its own kind at first; StagedTrainer's rows are exchanged afterwards as well.
            train_dataset=datasets.Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]}),
            processing_class=_no_tokenizer(),
            peft_config=adapter,
        )
        self.lora_layers = lora_layers(self.model)
        self.train_dataset = rows  # type: ignore[assignment]  # rows made up on the fly, addressed in the same way
        self.loss_is_scaled_for_ga = True  # type: ignore[assignment]
        self.keeps_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.args.output_dir)

    def get_train_dataloader(self) -> EpochLoader:
        args = self.args
        ranks = {"rank": args.process_index, "ranks": args.world_size}
        batches = EpochBatches(len(self.rows), batch_size=args.per_device_train_batch_size, seed=0, **ranks)
        return EpochLoader(self.rows, batch_sampler=batches, collate_fn=join_rows)


def _no_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def training_arguments(load: Load, folder: Path) -> SFTConfig:
    """The step's own arguments; no rhythm of evaluating, saving or tracking."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=load.warmup + load.steps,
        per_device_train_batch_size=load.micro_batch,
        gradient_accumulation_steps=load.accumulation,
        gradient_checkpointing=load.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if load.checkpointing else None,
        bf16=load.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_steps=10**9,
        report_to=[],
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def measure(name: str, load: Load, folder: Path) -> dict[str, Any]:
    """Train on random rows and return the figures, the same on every rank. `folder` takes a checkpoint and is spent."""
    config = model_config(name)
    config.eos_token_id = config.pad_token_id = 0  # as the stand-in tokenizer has them
    # Before the arguments: from then on ZeRO-3 would share out every model that is made, counted ones too.
    total, active = matmul_parameters(config)
    args = training_arguments(load, folder)
    state, dtype = PartialState(), getattr(torch, load.dtype)
    rate = matrix_rate(state.device, dtype)
    rows_per_step = load.micro_batch * load.accumulation * args.world_size
    rows = RandomRows(rows_per_step * args.max_steps, seq_len=load.seq_len, vocabulary=config.vocab_size)
    adapter = LoraConfig(r=load.lora_r, task_type="CAUSAL_LM", target_modules=TARGETS) if load.lora_r else None
    model = random_model(config, dtype)
    trainer = BenchmarkTrainer(model, args=args, rows=rows, adapter=adapter)
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
    figures |= costs(trainer, load, folder)
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


def costs(trainer: BenchmarkTrainer, load: Load, folder: Path) -> dict[str, float]:
    """Seconds to evaluate a thousand tokens on one device and to save the trained weights, and their size."""
    batch = trainer._prepare_inputs(join_rows([trainer.rows[row] for row in range(load.micro_batch)]))
    labels = batch.pop("labels")
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}
    trainer.model_wrapped.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        seconds = list(timed(lambda: trainer.token_losses(trainer.model_wrapped, inputs, labels), times=3))
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


def conditions(trainer: BenchmarkTrainer) -> dict[str, Any]:
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

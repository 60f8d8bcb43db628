"""Items speed and formats: tokens per second of the real step beside a bare loop and TRL; number formats that train."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import datasets
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu.job import Job
from benchmarks.gpu.kernels import waits
from benchmarks.gpu.shapes import GEMMA, LLAMA, MIXTURE, QWEN, QWEN25, built, shape
from sft.programs.benchmark import StepClock, matrix_rate, nameless_tokenizer, random_model, random_rows
from sft.programs.benchmark_shapes import flops_per_token, matmul_parameters
from sft.settings import Settings
from sft.training.arguments import training_arguments
from sft.training.batches import TrainingRows, join_rows
from sft.training.trainer import StagedTrainer

FOLDERS = count()
# What, shape, tokens of a row, rows packed into one, settings, tokens/s wanted, GiB at most.
TARGETS: list[tuple[str, str, int, int, dict[str, Any], float, float]] = [
    ("Llama-3.1-8B, packed 4,096", LLAMA, 512, 8, {"lora_r": 16, "grad_accum": 4}, 13_500, 0),
    ("Qwen2.5-7B, packed 4,096", QWEN25, 512, 8, {"lora_r": 16, "grad_accum": 4}, 14_500, 0),
    ("Qwen3-4B, one row of 16,384", QWEN, 16_384, 1, {"lora_r": 16, "gradient_checkpointing": "1"}, 6_500, 23),
    ("Qwen3-30B-A3B, packed 4,096", MIXTURE, 512, 8, {"gradient_checkpointing": "1", "grad_accum": 4}, 4_800, 0),
]
BESIDE_OTHERS, HUGE = 30.0, 100 * 2**30


def settings_of(job: Job, name: str, **values: Any) -> Settings:
    """A stage of this shape with everything else at its default, and no rhythm but that of the steps."""
    folder = job.folder / f"stage-{next(FOLDERS)}"
    fixed: dict[str, Any] = {
        "stage": 1, "env_dir": folder, "base_model": name, "out_lora_dir": folder / "out", "per_device_train_bs": 1,
        "grad_accum": 1, "gradient_checkpointing": "0", "max_steps": 4, "logging_steps": 10**9, "save_steps": 10**9,
        "report_to": ("none",),
    }  # fmt: skip
    return Settings.model_validate(fixed | values)


def trainer_of(job: Job, model: Any, settings: Settings, *, length: int, packed: int = 1) -> StagedTrainer:
    """The trainer of a run over random rows, `packed` of them in each sequence."""
    checkpointing = settings.gradient_checkpointing == "1"
    folder = settings.out_lora_dir
    args = training_arguments(settings, folder, checkpointing=checkpointing, evaluated=False, resumed=False)
    if settings.torch_compile and job.rehearse:
        args.torch_compile_backend = "aot_eager"  # traced as ever, without a compiler's minutes
    sequences = settings.per_device_train_bs * settings.grad_accum * settings.max_steps
    rows = random_rows(sequences * packed, seq_len=length, vocabulary=model.config.vocab_size)
    if packed > 1:
        groups = [list(range(start, start + packed)) for start in range(0, sequences * packed, packed)]
        rows = TrainingRows(rows.rows, packs=groups)
    trainer = StagedTrainer(model, args=args, settings=settings, tokenizer=nameless_tokenizer(), rows=rows)
    trainer.add_callback(StepClock(0))
    return trainer


def clock_of(trainer: Any) -> StepClock:
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, StepClock))


def tokens_per_second(trainer: StagedTrainer, tokens: int) -> float:
    """Of all steps but the first, which warms up."""
    trainer.train()
    seconds = clock_of(trainer).seconds[1:]
    return tokens * len(seconds) / sum(seconds)


def speed(job: Job) -> None:
    """The targets, then Qwen3-4B beside others, small micro-batches, torch.compile, waits."""
    rate = matrix_rate(job.device, job.dtype, job.size(1.0, 0.01))
    job.figure("matrix product", rate / 1e12, "TFLOP/s")
    for what, name, length, packed, values, wanted, most in TARGETS:
        if name == MIXTURE and not job.rehearse and torch.cuda.get_device_properties(0).total_memory < HUGE:
            job.skip(what, "needs a card of 100 GiB")
        elif job.has_time(what, 14):
            config, length = shape(job, name), job.size(length, 12)
            settings = settings_of(job, name, **values)
            trainer = trainer_of(job, random_model(config, job.dtype), settings, length=length, packed=packed)
            found = tokens_per_second(trainer, settings.grad_accum * packed * length)
            job.check(what, found, f">= {wanted}", "tokens/s", of_gpu=True)
            job.figure(f"{what}, of the matrix product", found * operations(trainer, length) / rate)
            if most:
                held = torch.cuda.max_memory_allocated() if job.device.type == "cuda" else 0
                job.check(f"{what}: peak", held / 2**30, f"<= {most}", "GiB", of_gpu=True)
            del trainer
            job.forget()
    if job.has_time("Qwen3-4B beside others", BESIDE_OTHERS):
        beside_others(job)
    small_batches(job)


def operations(trainer: StagedTrainer, length: int) -> float:
    """Floating point operations of a step per token."""
    config = trainer.model.config
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return flops_per_token(config, matmul_parameters(config)[1], trained, seq_len=length, full=False)


def beside_others(job: Job) -> None:
    """4 rows of 2,048: ours, the same by a loop written by hand, TRL's trainer without padding."""
    rows, length = 4, job.size(2048, 12)
    settings = settings_of(job, QWEN, per_device_train_bs=rows, gradient_checkpointing="1")
    model = random_model(shape(job, QWEN), job.dtype)
    trainer = trainer_of(job, model, settings, length=length)
    ours = tokens_per_second(trainer, rows * length)
    job.figure("Qwen3-4B, 4 x 2,048", ours, "tokens/s")
    bare = bare_speed(job, trainer, rows * length)
    job.check("of a bare loop", ours / bare, ">= 0.97", of_gpu=True)
    job.check("waits for the device in a micro-batch", waits(job, partial(one_pass, trainer)), "<= 4", of_gpu=True)
    del trainer, model
    job.forget()
    theirs = trl_speed(job, rows, length)
    job.check("of TRL", ours / theirs, ">= 0.97", of_gpu=True)
    job.forget()


def one_pass(trainer: StagedTrainer) -> None:
    """A micro-batch as the Trainer hands it over, forward and backward."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(float(batch["num_items"])))


def bare_speed(job: Job, trainer: StagedTrainer, tokens: int) -> float:
    """The trainer's model, attention and head in a loop of ten lines: no clipping by name, no log, no callbacks."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    data = trainer.train_dataset
    batch = trainer._prepare_inputs(join_rows([data[row] for row in range(trainer.args.per_device_train_batch_size)]))
    names = ("input_ids", "position_ids", "row_lengths", "row_ends", "labels")
    inputs = {name: batch[name] for name in names}
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast(job.device.type, torch.bfloat16, enabled=not job.rehearse):
            losses = trainer.pass_losses(trainer.model, **inputs)
        (losses.float().sum() / batch["num_items"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        job.wait()
        taken.append(time.perf_counter() - start)
    return tokens * (len(taken) - 1) / sum(taken[1:])


def trl_speed(job: Job, rows: int, length: int) -> float:
    """SFTTrainer over rows of one length, so that nothing is padded, with its own head and the same adapter."""
    model = random_model(shape(job, QWEN), job.dtype)
    ids = random_rows(rows * 4, seq_len=length, vocabulary=model.config.vocab_size).rows["input_ids"][:]
    args = SFTConfig(
        str(job.folder / "trl"), max_length=length, per_device_train_batch_size=rows, max_steps=4, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=not job.rehearse, use_cpu=job.rehearse,
        gradient_checkpointing=True, optim="adamw_torch_fused", learning_rate=1e-4,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    targets = settings_of(job, QWEN).lora_target_modules
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids}),
        processing_class=nameless_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(targets)),
    )
    clock = StepClock(0)
    trainer.add_callback(clock)
    trainer.train()
    return rows * length * (len(clock.seconds) - 1) / sum(clock.seconds[1:])


def small_batches(job: Job) -> None:
    """16 rows of 320 a step in micro-batches of 2, 8 and 16; the last compiled as well."""
    length = job.size(320, 8)
    for size, compiled in ((2, False), (8, False), (16, False), (16, True)):
        what = f"Qwen3-4B, 320 tokens, micro-batch {size}{', compiled' if compiled else ''}"
        if job.has_time(what, 25 if compiled else 8):
            settings = settings_of(
                job, QWEN, per_device_train_bs=size, grad_accum=16 // size, torch_compile=compiled,
                max_steps=job.size(4, 2),
            )  # fmt: skip
            trainer = trainer_of(job, random_model(shape(job, QWEN), job.dtype), settings, length=length)
            job.figure(what, tokens_per_second(trainer, 16 * length), "tokens/s")
            del trainer
            job.forget()


@contextmanager
def in_float16(job: Job, trainer: StagedTrainer) -> Iterator[None]:
    """The Trainer refuses float16 on a CPU, where a rehearsal has it all the same, scaler and all."""
    state = trainer.accelerator.state
    before = state._mixed_precision
    state._mixed_precision = "fp16" if job.rehearse else before
    try:
        yield
    finally:
        state._mixed_precision = before


def formats(job: Job) -> None:
    """float16 that has to look for its scale; 4 bits with it; weights trained in full that move; exact adapters."""
    half = job.size("float16", "bfloat16")
    config, scale = shape(job, GEMMA, 2), 2.0**24
    settings = settings_of(job, GEMMA, dtype=half, per_device_train_bs=2, max_steps=20)
    trainer = trainer_of(job, random_model(config, torch.float16), settings, length=16)
    start = adapters(trainer)
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler(job.device.type, init_scale=scale)
    with in_float16(job, trainer):
        trainer.train()
    job.check("float16: the scale found, of 2^24", scaler.get_scale() / scale, "<= 0.5")
    job.check("float16: share of the adapter that moved", moved(start, adapters(trainer)), ">= 0.5")
    job.check("and is finite", float(all(p.isfinite().all() for p in adapters(trainer))), ">= 1")
    if not job.lacks("4 bits with float16", "bitsandbytes"):
        quantised = settings_of(job, LLAMA, dtype=half, load_in_4bit=True, max_steps=2)
        trainer = trainer_of(job, built(job, shape(job, LLAMA, 2), quantised), quantised, length=16)
        trainer.train()
        exact = all(p.dtype == torch.float32 for p in adapters(trainer))
        job.check("4 bits with float16: adapters in float32", float(exact), ">= 1")
    del trainer
    job.forget()
    full = settings_of(job, QWEN, use_lora=False, dtype="bfloat16", lr=2e-5, warmup_ratio=0.0, max_steps=3)
    trainer = trainer_of(job, random_model(shape(job, QWEN, 2), torch.float32), full, length=64)
    before = layers(trainer)
    trainer.train()
    job.check("full fine-tuning in bfloat16: weights that moved", moved(before, layers(trainer)), ">= 0.99")


def adapters(trainer: StagedTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def layers(trainer: StagedTrainer) -> list[torch.Tensor]:
    """The matrices of the layers: embeddings have words that no row holds."""
    named = trainer.model.named_parameters()
    return [p.detach().clone() for name, p in named if "layers." in name and p.ndim == 2]


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return changed / sum(a.numel() for a in before)

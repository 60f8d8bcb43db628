"""A stage's settings as TRL's training arguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import SFTConfig

from sft.models.model import compute_dtype
from sft.settings.rules import FLOORS

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sft.settings import Settings


# The part of the steps in which warmup_stable_decay falls, as in MiniCPM (https://arxiv.org/abs/2404.06395).
_DECAY_SHARE = 0.1


def scheduler(settings: Settings) -> dict[str, Any]:
    """Scheduler arguments; a cosine with a floor is another name in transformers."""
    name = settings.lr_scheduler
    if settings.min_lr_ratio and name == "cosine":
        name = "cosine_with_min_lr"
    floor = FLOORS.get(name)
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": {floor: settings.min_lr_ratio} if floor else {}}


def steps_to_schedule(args: TrainingArguments, steps: int) -> dict[str, Any]:
    """Scheduler arguments that depend on the number of steps, which is known when training begins."""
    stable = args.lr_scheduler_type == "warmup_stable_decay"
    return {"num_decay_steps": math.ceil(_DECAY_SHARE * steps)} if stable else {}


def training_arguments(settings: Settings, folder: Path, *, checkpointing: bool, validated: bool) -> SFTConfig:
    """The stage's settings as TRL's arguments. Saving, evaluating and tracking happen in `StagedTrainer` and the
    callbacks, so their own rhythms are off here where ours replace them."""
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_bs,
        per_device_eval_batch_size=settings.per_device_eval_bs,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        **scheduler(settings),
        warmup_steps=settings.warmup_steps or settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim,
        bf16=compute_dtype(settings) == torch.bfloat16,
        fp16=compute_dtype(settings) == torch.float16,
        use_cpu=not on_gpu,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        neftune_noise_alpha=settings.neftune_noise_alpha or None,
        torch_compile=settings.torch_compile,
        dataloader_num_workers=settings.dataloader_workers,
        dataloader_pin_memory=on_gpu,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validated else "no",
        eval_steps=settings.eval_steps,
        eval_on_start=validated,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=None,
        average_tokens_across_devices=True,
        report_to=[name for name in settings.report_to if name not in ("mlflow", "none")],
        run_name=settings.run_name,
        disable_tqdm=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        ddp_find_unused_parameters=False,
        # Our loss is that of the tokens alone: else TRL has a mixture's balancing loss computed in every pass, for
        # nobody, and best_model/config.json asks for it.
        router_aux_loss_coef=0.0,
    )

"""A stage's settings as TRL's training arguments."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl import SFTConfig

from sft.distributed.launch import launched
from sft.distributed.ranks import say
from sft.errors import REPOSITORY
from sft.models.model import compute_dtype
from sft.settings.rules import FLOORS

if TYPE_CHECKING:
    from accelerate import Accelerator
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


def training_arguments(
    settings: Settings, folder: Path, *, checkpointing: bool, evaluated: bool, resumed: bool
) -> SFTConfig:
    """The stage's settings as TRL's arguments. Saving and tracking happen in `StagedTrainer` and the callbacks, so the
    library's own are off here. `evaluated`: there is something to evaluate on."""
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_bs,
        per_device_eval_batch_size=settings.per_device_eval_bs,
        gradient_accumulation_steps=settings.grad_accum,
        **optimisation(settings),
        **machine(settings, checkpointing=checkpointing),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=settings.eval_steps,
        eval_on_start=evaluated and not resumed,  # a resumed run's step 0 was evaluated by the run before
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
        # They are constants (rotary frequencies). Sent before each forward pass, they end in a deadlock where ranks
        # make different numbers of passes: rows one by one, as many as a rank's pack holds.
        ddp_broadcast_buffers=False,
        # Our loss is that of the tokens alone: else TRL has a mixture's balancing loss computed in every pass, for
        # nobody, and best_model/config.json asks for it.
        router_aux_loss_coef=0.0,
    )
    if launched().processes == 1 and torch.cuda.is_available():
        use_one_gpu(arguments)
    return arguments


def optimisation(settings: Settings) -> dict[str, Any]:
    """Optimizer, rate and schedule."""
    return {
        "optim": settings.optim,
        "learning_rate": settings.lr,
        **scheduler(settings),
        "warmup_steps": settings.warmup_steps or settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
    }


def machine(settings: Settings, *, checkpointing: bool) -> dict[str, Any]:
    """Device, number format, memory and workers."""
    on_gpu = torch.cuda.is_available()
    return {
        "bf16": compute_dtype(settings) == torch.bfloat16,
        "fp16": compute_dtype(settings) == torch.float16,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "torch_compile": settings.torch_compile,
        "dataloader_num_workers": settings.dataloader_workers,
        "dataloader_pin_memory": on_gpu,
    }


def use_one_gpu(arguments: TrainingArguments) -> None:
    """One process trains on one GPU, the first it sees: for several the Trainer would take DataParallel, which TRL
    refuses."""
    _ = arguments.device  # counts the GPUs; what it counted is replaced
    arguments._n_gpu = 1
    if (gpus := torch.cuda.device_count()) > 1:
        say_unused(gpus)


@cache
def say_unused(gpus: int) -> None:
    """Once, however many stages there are."""
    how, program = "--multi_gpu", "-m staged_sft.train"
    if REPOSITORY:
        how, program = "--config_file configs/accelerate/ddp.yaml", "train.py"
    launch = f"accelerate launch {how} --num_processes {gpus} {program} ..."
    say(f"{gpus} GPUs are visible, this run uses 1; all of them: {launch}")


def reduce_in_float32(accelerator: Accelerator) -> None:
    """FSDP2 adds up gradients in float32 and leaves outputs as the model made them.

    accelerate's own policy has both in the compute type: gradients rounded to 8 bits at every sum, and
    log-probabilities, which the fused head makes in float32, with them.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if plugin is not None and plugin.fsdp_version == 2 and dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

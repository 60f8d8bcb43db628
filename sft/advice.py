"""What to change when memory is not enough, in the order that costs least (document 004)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft.settings import Settings

_SMALL_RANK = 8


def advice(settings: "Settings", *, answering: bool = False) -> str:
    """The settings that save memory, with values that fit these settings, first the one to try first.

    `answering`: the generation evaluation needs more than a training step does.
    """
    fewer = max(1, settings.gen_batch_size // 2)
    first = [f"SFT_GEN_BATCH_SIZE={fewer}"] if answering and fewer < settings.gen_batch_size else []
    return "in this order: " + "; ".join([*first, *_remedies(settings)])


def _remedies(settings: "Settings") -> Iterator[str]:
    rows, accumulation = settings.per_device_train_bs, settings.grad_accum
    if rows > 1:
        half = rows // 2
        yield f"SFT_PER_DEVICE_TRAIN_BS={half} with SFT_GRAD_ACCUM={-(-rows * accumulation // half)}"
    if not settings.use_lora:
        yield f"SFT_USE_LORA=1 with SFT_LORA_R={_SMALL_RANK}"
    elif settings.lora_r > _SMALL_RANK:
        yield f"SFT_LORA_R={_SMALL_RANK}"
    if not settings.load_in_8bit and not settings.load_in_4bit:
        yield "SFT_LOAD_IN_8BIT=1 or SFT_LOAD_IN_4BIT=1"
    elif settings.load_in_8bit:
        yield "SFT_LOAD_IN_4BIT=1 instead of SFT_LOAD_IN_8BIT=1"
    if settings.gradient_checkpointing != "1":
        yield "SFT_GRADIENT_CHECKPOINTING=1"
    yield f"SFT_MAX_SEQ_LEN below {settings.max_seq_len}"
    yield "more devices with configs/accelerate/zero3.yaml"

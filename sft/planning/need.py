"""Largest pass, gradient checkpointing and memory of a stage: what is chosen for it, and what to change if it fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState

from sft.data.chosen import numbers_of
from sft.data.masked_loss.edge_mask import MASKED
from sft.distributed import ranks
from sft.distributed.launch import launched
from sft.errors import RunFailed
from sft.evaluation.at_once import USUAL, AnswerBatch
from sft.heap import LARGE
from sft.models.isolation import expected_isolation
from sft.planning.activations import BatchShape, rule_of_thumb
from sft.planning.kv_cache import largest_answers
from sft.planning.memory import Estimate, available_bytes, estimate, this_device
from sft.stages.paths import RHYTHM
from sft.storage import json_files
from sft.training.batches import heaviest_step
from sft.training.passes import is_shortage, largest_pass, machine_kind, peak_memory

if TYPE_CHECKING:
    import datasets
    from transformers import PretrainedConfig

    from sft.data.mixture import Mix
    from sft.settings import Settings

# Above this share of what is available SFT_GRADIENT_CHECKPOINTING=auto turns checkpointing on, and no pass is larger.
COMFORTABLE = 0.9
# Tokens of a pass after which a CPU gains nothing by more: Python between kernels is then a hundredth or two of its
# time even for the smallest models (docs/log.md).
ENOUGH = 1536


def shape_of(rows: datasets.Dataset, numbers: list[int]) -> BatchShape:
    """These rows joined into one pass."""
    chosen = rows.select(numbers)
    trained = sum(int((np.asarray(labels[1:]) != MASKED).sum()) for labels in chosen["labels"])
    return BatchShape(int(np.sum(chosen["length"])), max(trained, 1), rows=len(numbers))


def largest_batch(rows: datasets.Dataset, settings: Settings, tokens: int = 0) -> BatchShape:
    """The pass with most tokens in the first epochs, whose order is known beforehand: the largest micro-batch, or what
    passes of at most `tokens` make of the largest step."""
    return shape_of(rows, largest_pass(rows, settings, tokens))


def pass_tokens(
    config: PretrainedConfig, settings: Settings, rows: datasets.Dataset, *, checkpointing: bool, **where: Any
) -> int:
    """Most tokens of a pass as SFT_MICRO_BATCH_TOKENS has them; 0 for micro-batches as they are.

    `auto` on a GPU is the whole step if memory allows, else what does, and one row at least. Memory never grows more
    slowly than tokens do, so what lies between two estimates is no more than the straight line between them. On a CPU
    a pass has no more than pays there (`cpu_tokens`). `where`: as in `need_of`.
    """
    if settings.micro_batch_tokens is not None:
        return settings.micro_batch_tokens
    if not expected_isolation(config, settings).kept_apart:
        return 0
    if not (where or torch.cuda.is_available()):
        return cpu_tokens(config, settings, rows, checkpointing=checkpointing)
    estimated = {name: value for name, value in where.items() if name != "available"}
    available = where.get("available") or available_bytes(launched().local_processes)
    processes = where["launch"].processes if where else None
    whole, longest = heaviest_step(rows, settings, processes=processes), int(numbers_of(rows, "length").max())
    return tokens_that_fit(
        config, settings, shape_of(rows, whole), longest=longest, checkpointing=checkpointing, available=available,
        **estimated,
    )  # fmt: skip


def cpu_tokens(config: PretrainedConfig, settings: Settings, rows: datasets.Dataset, *, checkpointing: bool) -> int:
    """What pays on a CPU, or less where it might not fit; one row at least. A function of sizes, no trial: a run and
    its repetition divide their steps alike. Only where memory is short does it depend on how much there is.

    More than ENOUGH gains nothing; it costs where states become blocks that are mapped anew each time.
    """
    device, available, text = (
        this_device(settings),
        available_bytes(launched().local_processes),
        config.get_text_config(),
    )
    widest = max(text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    whole, longest = shape_of(rows, heaviest_step(rows, settings)), int(numbers_of(rows, "length").max())
    paying = max(longest, min(ENOUGH, LARGE // (widest * device.dtype.itemsize)))
    share = min(1.0, paying / whole.tokens)
    shape = BatchShape(round(whole.tokens * share), max(1, round(whole.trained * share)), rows=whole.rows)
    # As in checkpointing_needed: the seconds of the exact answer are saved where there is plenty.
    if 4 * rule_of_thumb(config, shape, device=device, checkpointing=checkpointing) < available:
        return paying
    fitting = tokens_that_fit(
        config, settings, shape, longest=longest, checkpointing=checkpointing, available=available
    )
    return min(paying, fitting)


def tokens_that_fit(
    config: PretrainedConfig,
    settings: Settings,
    whole: BatchShape,
    *,
    longest: int,
    checkpointing: bool,
    available: int,
    **where: Any,
) -> int:
    """Tokens of the largest pass within `available` bytes, from the `longest` row to the `whole` step."""

    def need(tokens: int) -> int:
        share = tokens / whole.tokens
        shape = BatchShape(tokens, max(1, round(whole.trained * share)), rows=max(1, round(whole.rows * share)))
        found = estimate(config, settings, shape, checkpointing=checkpointing, available=available, **where)
        return found.training

    limit = round(COMFORTABLE * available)
    most = need(whole.tokens)
    if most <= limit or whole.tokens <= longest:
        return whole.tokens
    least = need(longest)
    if least >= limit:
        return longest
    return longest + int((whole.tokens - longest) * (limit - least) / (most - least))


def chosen_pass_tokens(
    config: PretrainedConfig,
    settings: Settings,
    rows: datasets.Dataset,
    *,
    checkpointing: bool,
    checkpoint: Path | None,
) -> int:
    """`pass_tokens`, the same on all ranks; a run that goes on under `auto` on a machine like the one before keeps what
    that chose, so that it divides every step alike. Says where a checkpoint's division changes."""
    record = json_files.read_json(checkpoint / RHYTHM).get("passes", {}) if checkpoint else {}
    before = record.get("tokens", 0)
    if checkpoint and settings.micro_batch_tokens is None and record.get("machine") == machine_kind():
        return before
    found = pass_tokens(config, settings, rows, checkpointing=checkpointing)
    found = -ranks.largest(-found, PartialState().device)
    if checkpoint and found != before:
        ranks.say(
            f"[WARNING] passes of {in_words(found)} from here on, the checkpoint was made with {in_words(before)}: the "
            "result equals that of one undisturbed run up to rounding, not bit by bit"
        )
    return found


def in_words(tokens: int) -> str:
    """Most tokens of a pass as people read it."""
    return f"at most {tokens:,} tokens" if tokens else "SFT_PER_DEVICE_TRAIN_BS rows"


@dataclass(frozen=True)
class Need:
    """An estimate and what it was worked out for: largest pass and answers, with or without checkpointing.

    `tokens`: most of a pass, 0 where micro-batches stay as they are.
    """

    estimate: Estimate
    batch: BatchShape
    answers: AnswerBatch | None
    checkpointing: bool
    tokens: int = 0


def need_of(config: PretrainedConfig, settings: Settings, mix: Mix, **where: Any) -> Need:
    """What a device needs for the stage; gradient checkpointing where it is asked for or needed.

    `where`: the launch, device and available bytes of a machine that is not this one.

    Raises:
        Problems: no target module of the adapter exists in the model.
    """
    answers, processes = largest_answers(mix.val, settings), where["launch"].processes if where else None

    def shape(tokens: int) -> BatchShape:
        return shape_of(mix.train, largest_pass(mix.train, settings, tokens, processes=processes))

    def under(batch: BatchShape, checkpointing: bool) -> Estimate:
        return estimate(config, settings, batch, checkpointing=checkpointing, answers=answers, **where)

    def with_passes(checkpointing: bool) -> Need:
        chosen = pass_tokens(config, settings, mix.train, checkpointing=checkpointing, **where)
        batch = shape(chosen)
        return Need(under(batch, checkpointing), batch, answers, checkpointing, chosen)

    if settings.gradient_checkpointing != "auto":
        return with_passes(settings.gradient_checkpointing == "1")
    asked = shape(settings.micro_batch_tokens or 0)
    if not (where or torch.cuda.is_available()):
        need = with_passes(False)
        if asked.within(need.batch) and comfortable(need.estimate):  # then so is what is smaller: a trace is saved
            return need
    return with_passes(not comfortable(under(asked, False)))


def comfortable(found: Estimate) -> bool:
    """Whether a training step leaves some of the memory free."""
    return found.training <= COMFORTABLE * found.available


def shortage(need: Estimate, settings: Settings, *, checkpointed: bool = False, tokens: int = 0) -> str:
    """What to say when memory ran out: the estimate, the measured peak of a GPU, and what to change."""
    remedy = advice(settings, checkpointed=checkpointed, tokens=tokens)
    return f"Out of memory: {need.total / 2**30:.1f} GiB were estimated{peak_memory()}. Change {remedy}."


def raise_shortage(
    error: Exception,
    config: PretrainedConfig,
    settings: Settings,
    rows: datasets.Dataset,
    *,
    checkpointing: bool,
    tokens: int = 0,
) -> None:
    """RunFailed with estimate, peak and remedies, if the error says that memory ran out."""
    if is_shortage(error):
        need = estimate(config, settings, largest_batch(rows, settings, tokens), checkpointing=checkpointing)
        raise RunFailed(shortage(need, settings, checkpointed=checkpointing, tokens=tokens)) from error


def checkpointing_needed(config: PretrainedConfig, settings: Settings, batch: BatchShape, *, held: int = 0) -> bool:
    """Whether a step would come near the limit of the device without gradient checkpointing.

    `held`: bytes of the model where it is loaded already; on a GPU the device knows them.
    """
    available = available_bytes(launched().local_processes) + (0 if torch.cuda.is_available() else held)
    device = this_device(settings)
    # Where the rule of thumb leaves a wide margin, the seconds of the exact answer are saved.
    if held and 4 * (rule_of_thumb(config, batch, device=device, checkpointing=False) + held) < available:
        return False
    need = estimate(config, settings, batch, checkpointing=False, available=available)
    return need.training > COMFORTABLE * available


_SMALL_RANK = 8  # half the default; below it little memory is left to save


def advice(settings: Settings, *, answering: bool = False, checkpointed: bool = False, tokens: int = 0) -> str:
    """The settings that save memory, with values that fit these settings, first the one to try first.

    `answering`: the generation evaluation needs more than a training step does; `checkpointed`: gradient checkpointing
    is on already; `tokens`: most of a pass, which then goes by them and not by the rows of a micro-batch.
    """
    together = settings.gen_batch_size or USUAL
    fewer = max(1, together // 2)
    first = [f"SFT_GEN_BATCH_SIZE={fewer}"] if answering and fewer < together else []
    return "in this order: " + "; ".join([*first, *_remedies(settings, checkpointed, tokens)])


def _remedies(settings: Settings, checkpointed: bool, tokens: int) -> Iterator[str]:
    rows, accumulation = settings.per_device_train_bs, settings.grad_accum
    if tokens:
        yield f"SFT_MICRO_BATCH_TOKENS={max(1, tokens // 2)}"
    elif rows > 1:
        half = rows // 2
        yield f"SFT_PER_DEVICE_TRAIN_BS={half} with SFT_GRAD_ACCUM={-(-rows * accumulation // half)}"
    if not settings.use_lora:
        yield f"SFT_USE_LORA=1 with SFT_LORA_R={_SMALL_RANK}"
    elif settings.lora_r > _SMALL_RANK:
        yield f"SFT_LORA_R={_SMALL_RANK}"
    if settings.quantised_further:
        instead = "".join(f" instead of {name}=1" for name in settings.quantised)
        yield " or ".join(f"{name}=1" for name in settings.quantised_further) + instead
    if settings.gradient_checkpointing != "1" and not checkpointed:
        yield "SFT_GRADIENT_CHECKPOINTING=1"
    yield f"SFT_MAX_SEQ_LEN below {settings.max_seq_len}"
    yield "more devices with configs/accelerate/zero3.yaml"

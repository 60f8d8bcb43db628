"""Memory of a training step besides weights and gradients, from the configuration alone: a step of shapes is run.

The real model code, with its adapter, runs forward and backward on fake tensors: they have a shape and a type, but no
memory and no values. Every tensor that comes into being is counted until it is freed; the highest sum is the answer.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface

from sft.distributed.launch import launched
from sft.models.experts import route_experts
from sft.models.fitness import blank
from sft.models.isolation import expected_isolation
from sft.models.model import casts_left_to_autocast, lora_layers, weight_dtype
from sft.models.row_on_cpu import TAKEN
from sft.models.saved import keep_saved_exact
from sft.models.stand_in import shortened
from sft.models.targets import adapter_config
from sft.settings import Settings
from sft.training.loss import token_cross_entropy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Layers are alike, so two small models give the cost of one layer and of what is not repeated.
FEW, MORE = 2, 4
# TRL's fused head on a GPU works on tiles of this many tokens by this many words, in float32 and the compute type.
_TILE_TOKENS, _TILE_WORDS, _TILE_BYTES = 4096, 32768, 10
ATTENTION = "staged_sft_shapes"
# What attention keeps of T tokens: no more than its states; a mask of T x T; all scores, heads x T x T.
Kept = Literal["states", "mask", "scores"]


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch of joined rows: its tokens, those that are trained, and the rows they belong to."""

    tokens: int
    trained: int
    rows: int = 1

    def within(self, other: BatchShape) -> bool:
        """Whether the other is nowhere smaller."""
        return self.tokens <= other.tokens and self.trained <= other.trained and self.rows <= other.rows


@dataclass(frozen=True)
class Device:
    """What the step runs on, as far as it decides about memory: `fused_head` is TRL's tiled output head."""

    dtype: torch.dtype
    fused_head: bool


class Activations(NamedTuple):
    """Bytes, and whether a step of shapes found them; else it was the rule of thumb."""

    size: int
    traced: bool


def activation_bytes(
    config: PretrainedConfig, settings: Settings, batch: BatchShape, *, device: Device, checkpointing: bool
) -> Activations:
    """Peak bytes of one training step on top of weights, gradients and optimizer state.

    Where a model's code looks at values (which fake tensors have not) a rule of thumb is used instead.
    """
    layers = config.get_text_config().num_hidden_layers
    try:
        kept = kept_by_attention(config, settings)
        peaks = {}
        for count in sorted({min(FEW, layers), min(MORE, layers)}):
            short = shortened(config, count)
            peaks[count] = _peak(short, settings, batch, kept=kept, device=device, checkpointing=checkpointing)
    except (RuntimeError, NotImplementedError):
        return Activations(rule_of_thumb(config, batch, device=device, checkpointing=checkpointing), traced=False)
    few, more = min(peaks), max(peaks)
    slope = (peaks[more] - peaks[few]) / (more - few) if more > few else 0.0
    peak = peaks[few] + slope * (layers - few)
    if kept != "states" and batch.rows > 1:
        peak += batch.tokens**2  # the mask itself, as booleans
    if device.fused_head:
        tile = min(batch.trained, _TILE_TOKENS) * min(config.get_text_config().vocab_size, _TILE_WORDS)
        peak += tile * _TILE_BYTES
    return Activations(round(peak), traced=True)


def kept_by_attention(config: PretrainedConfig, settings: Settings) -> Kept:
    """What attention keeps under the settings: `auto` is what the model itself would take, or our attention over rows
    where it keeps them apart. Rows that go one by one need no mask either."""
    own = settings.attn
    if own == "auto":
        own = blank_model(shortened(config, 1), settings).config._attn_implementation
    if own == "eager":
        return "scores"
    found = expected_isolation(config, settings) if own == "sdpa" else None
    return "mask" if found is not None and found.kept_apart and not found.lengths else "states"


def rule_of_thumb(config: PretrainedConfig, batch: BatchShape, *, device: Device, checkpointing: bool) -> int:
    """About what an adapted Llama layer keeps: 14 hidden and 6 feed-forward vectors per token, plus the logits."""
    text = config.get_text_config()
    hidden = text.hidden_size
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    wide = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden
    per_layer = 14 * hidden + 6 * chosen * wide
    kept = hidden * text.num_hidden_layers + per_layer if checkpointing else per_layer * text.num_hidden_layers
    words = _TILE_WORDS if device.fused_head else text.vocab_size
    logits = min(batch.trained, _TILE_TOKENS if device.fused_head else batch.trained) * min(words, text.vocab_size)
    return round(batch.tokens * kept * device.dtype.itemsize + logits * (device.dtype.itemsize + 12))


def blank_model(config: PretrainedConfig, settings: Settings) -> PreTrainedModel:
    """The model as it is loaded, without any memory behind its weights; whole under ZeRO-3 too, where transformers
    would split it over all processes and wait for those that do not ask."""
    return blank(config, settings, dtype=weight_dtype(settings))


def with_adapter(bare: PreTrainedModel, settings: Settings) -> torch.nn.Module:
    """`bare` with the stage's adapter put in, as it is trained; itself for full fine-tuning.

    Raises:
        Problems: none of the target modules exists in the model.
    """
    adapter = adapter_config(bare, settings)
    if adapter is None:
        return bare
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Where weights have no memory, the adapter needs none either: filling it in takes seconds.
        model = get_peft_model(bare, adapter, low_cpu_mem_usage=next(bare.parameters()).is_meta)
    keep_saved_exact(model)
    route_experts(model)
    return model


class Tally(TorchDispatchMode):
    """Adds up the bytes of all tensors alive that were made while it was on, those of `model` left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        own = [*model.parameters(), *model.buffers()]
        own += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The shape function of grouped matrix products knows bfloat16 alone, the product itself does not mind.
        grouped = func is torch.ops.aten._grouped_mm.default
        result = _grouped(*args, **(kwargs or {})) if grouped else func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            size = storage.nbytes()
            self.known.add(storage)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


def _grouped(a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """An empty result of the shape of torch._grouped_mm."""
    if a.dim() == 2:
        shape = (offs.numel(), a.shape[0], b.shape[1]) if b.dim() == 2 else (a.shape[0], b.shape[2])
    else:
        shape = (a.shape[1], b.shape[1]) if b.dim() == 2 else (a.shape[0], a.shape[1], b.shape[2])
    return a.new_empty(shape, dtype=out_dtype)


class _Attention(torch.autograd.Function):
    """Keeps what fused attention kernels keep: query, key, value, output, one number per row and what masks need; by
    matrix products, `kept` being None, the first three alone."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: Any) -> torch.Tensor:
        output = torch.empty_like(query)
        if kept is None:
            ctx.save_for_backward(query, key, value)
            return output
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        scores = [query.new_empty(shape, dtype=dtype) for shape, dtype in kept]
        ctx.save_for_backward(query, key, value, output, sums, *scores)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def kept_scores(kept: Kept, *, tokens: int, heads: int, rows: int, dtype: torch.dtype) -> list[Any]:
    """(shape, dtype) of what attention keeps per layer that grows with the square of the tokens.

    Where joined rows need a mask sdpa turns it into numbers in every layer. Eager attention keeps all scores.
    """
    if kept == "scores":
        return [((heads, tokens, tokens), torch.float32), ((heads, tokens, tokens), dtype)]
    return [((tokens, tokens), dtype)] if kept == "mask" and rows > 1 else []


@contextmanager
def _attention(kept: Kept, batch: BatchShape, device: Device) -> Iterator[None]:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **other: Any) -> Any:
        heads, dtype = query.shape[1], query.dtype
        scores = kept_scores(kept, tokens=batch.tokens, heads=heads, rows=batch.rows, dtype=dtype)
        by_products = kept == "states" and not other.get("dropout") and query.dtype in TAKEN
        if not device.fused_head and not by_products:
            if heads != key.shape[1]:  # sdpa's kernel of the CPU takes no grouped heads: they are repeated, and kept
                key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
            if (
                other.get("dropout") and kept != "scores"
            ):  # nor dropout: scaled states; softmax, noise, product of scores
                query, key = torch.empty_like(query), torch.empty_like(key)
                scores += [((heads, batch.tokens, -(-batch.tokens // batch.rows)), dtype)] * 3
        output = _Attention.apply(query, key, value, None if by_products and not device.fused_head else scores)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attend)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[ATTENTION]


# What of the settings a step of shapes depends on; it takes seconds and is asked for again under each launch file.
_SHAPING = {name for name in Settings.model_fields if name.startswith(("lora_", "load_in_", "bnb_"))}
_SHAPING |= {"dtype", "attn", "use_lora", "torch_compile", "trust_remote_code"}
_known: dict[Any, int] = {}


def _peak(
    config: PretrainedConfig,
    settings: Settings,
    batch: BatchShape,
    *,
    kept: Kept,
    device: Device,
    checkpointing: bool,
) -> int:
    """Peak bytes of a step of the model as it is configured, all gradients being there already."""
    shaping = settings.model_dump_json(include=_SHAPING)
    key = config.to_json_string(use_diff=False), shaping, batch, kept, device, checkpointing, launched().deepspeed
    if key not in _known:
        _known[key] = _counted(config, settings, batch, kept=kept, device=device, checkpointing=checkpointing)
    return _known[key]


def _counted(
    config: PretrainedConfig,
    settings: Settings,
    batch: BatchShape,
    *,
    kept: Kept,
    device: Device,
    checkpointing: bool,
) -> int:
    config._attn_implementation = ATTENTION
    with _attention(kept, batch, device), _silent("torch._subclasses.fake_tensor"):
        bare = blank_model(config, settings)
        model = with_adapter(bare, settings)
        if checkpointing and bare.supports_gradient_checkpointing:
            bare.gradient_checkpointing_enable({"use_reentrant": False})
            bare.enable_input_require_grads()
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = model.to_empty(device="cpu").train()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            with Tally(model) as tally:
                _step(model, bare, batch, device=device)
    return tally.peak


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _step(model: torch.nn.Module, bare: Any, batch: BatchShape, *, device: Device) -> None:
    """Forward and backward as `StagedTrainer` does them."""
    ids, positions = (torch.empty((1, batch.tokens), dtype=torch.long) for _ in range(2))
    where, targets = (torch.empty(batch.trained, dtype=torch.long) for _ in range(2))
    mixed = device.dtype != torch.float32
    with casts_left_to_autocast(lora_layers(model) if mixed else ()):
        with torch.autocast("cpu", device.dtype, enabled=mixed):
            if device.fused_head:
                hidden = bare.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
                loss = hidden[0, where].float().sum()
            else:
                logits = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=where).logits
                loss = token_cross_entropy(logits.squeeze(0), targets).sum()
                del logits
        loss.backward()

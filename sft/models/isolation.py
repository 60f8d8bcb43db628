"""Are joined rows kept apart by a model? Each layer is asked, not believed: two rows joined against each alone.

Attention tells rows apart by their positions. Linear attention, state-space and convolution layers do not read them;
some attention masks don't either. What leaks is found by logits and gradients; the rows then go one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft.data.masked_loss.edge_mask import MASKED
from sft.distributed.launch import launched
from sft.models.attention import NAME, RowsUnknown, row_ends, row_lengths
from sft.models.stand_in import stand_ins

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from sft.settings import Settings

# Two rows, both longer than the windows are made for the probe and than a short convolution reaches.
_LENGTHS = (5, 7)
_WINDOW = 3
# How far joined and alone may lie apart by rounding, as a share of the largest value.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
# A gradient from one row to the other is exactly 0 where they are apart, in every number format.
_CROSSING = 1e-5
# What models say to rows they can't tell apart, or to arguments they don't know.
_REFUSALS = (RowsUnknown, ValueError, TypeError, NotImplementedError)


@dataclass(frozen=True)
class Isolation:
    """How joined rows run through a model.

    `difference`: the largest difference between the logits of joined rows and of the same rows alone, None if not
    known; `kept_apart`: whether joined rows come out as alone, else they go `one by one`. `lengths`: our attention
    takes their lengths; `boundaries`: layers of the model do.
    """

    difference: float | None = None
    kept_apart: bool = True
    lengths: bool = False
    boundaries: bool = False

    def record(self) -> dict[str, float | bool | None]:
        """The `isolation` object of `--check --json`."""
        return {"difference": self.difference, "kept_apart": self.kept_apart}

    def sentence(self) -> str:
        """What a person is told."""
        if self.kept_apart:
            return f"Joined rows are kept apart: logits as of each alone, to {self.difference or 0.0:.0e}."
        if self.difference is None:
            return "Rows go one by one, unless the loaded model keeps joined rows apart, which is tried then."
        return f"Rows go one by one: layers of this model mix joined rows (logits differ by {self.difference:.2g})."

    def passes(self, inputs: dict[str, Any], *, at_least: int = 0) -> list[dict[str, Any]]:
        """The forward passes of joined rows: one, or one per row in their order.

        Args:
            inputs: tensors of shape (1, tokens), with `row_lengths` and `row_ends` as `join_rows` makes them.
            at_least: so many passes; those that are missing hold two masked tokens.
        """
        inputs = dict(inputs)
        lengths, ends = inputs.pop("row_lengths", None), inputs.pop("row_ends", None)
        if lengths is None:
            lengths = row_lengths(inputs["position_ids"])
            ends = row_ends(lengths).to(inputs["position_ids"].device)
        if self.kept_apart:
            return [inputs | self.handed(lengths, ends)]
        inputs.pop("position_ids", None)  # those of a row alone are what every model takes for granted
        joined = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        rows = zip(*(tensor.split(lengths, dim=1) for tensor in joined.values()), strict=True)
        passes = [inputs | dict(zip(joined, row, strict=True)) for row in rows]
        nothing = {name: torch.zeros_like(tensor[:, :2]) for name, tensor in joined.items() if name != "labels"}
        nothing["labels"] = torch.full_like(nothing["input_ids"], MASKED)
        return passes + [inputs | nothing] * (at_least - len(passes))

    def handed(self, lengths: list[int], ends: torch.Tensor) -> dict[str, Any]:
        """What the model is told of the rows besides their positions."""
        handed: dict[str, Any] = {"row_lengths": lengths, "row_ends": ends} if self.lengths else {}
        if self.boundaries:
            numbers = torch.arange(len(lengths), dtype=torch.int32, device=ends.device)
            seq_idx = numbers.repeat_interleave(ends.diff(), output_size=sum(lengths))[None]
            handed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "seq_idx": seq_idx}
            handed |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return handed


@dataclass(frozen=True)
class _Seen:
    """What two rows gave: logits, their gradients on both rows' embeddings, and those across from one to the other."""

    logits: torch.Tensor
    gradient: torch.Tensor
    crossing: float


def keep_rows_apart(model: PreTrainedModel, settings: Settings) -> Isolation:
    """Finds out how joined rows stay apart in a loaded model, and puts our attention in where it does as transformers'.

    SFT_ATTN=auto without compilation leaves the choice to us. Ways are tried from fast to slow; the first whose logits
    and gradients are those of rows alone is taken. A model whose weights are split over processes can't be asked: a
    small one of the same layers is.
    """
    if not launched().splits_weights:
        return _way_of(model, settings)
    found = expected_isolation(model.config, settings)
    if found.lengths:
        model.set_attn_implementation(NAME)
    return found


def expected_isolation(config: PretrainedConfig, settings: Settings) -> Isolation:
    """What `keep_rows_apart` will find, by a small random model with every kind of layer that `config` has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for small in stand_ins(config, settings, device=device):
        try:
            return _way_of(small, settings)
        except (RuntimeError, ValueError, TypeError, LookupError):
            continue  # sizes that don't go together
    return Isolation(kept_apart=False)


def _way_of(model: PreTrainedModel, settings: Settings) -> Isolation:
    with probing(model):
        alone = _alone(model)
        found = Isolation(difference=0.0, kept_apart=False)
        own = model.config._attn_implementation
        for way in _ways(model, settings):
            model.set_attn_implementation(NAME if way.lengths else own)
            joined = _joined(model, way)
            if joined is None:
                continue
            difference = float((joined.logits - alone.logits).abs().max())
            if _same(joined, alone, model.dtype):
                return Isolation(difference, True, way.lengths, way.boundaries)
            if not way.lengths and not way.boundaries:
                found = Isolation(difference, kept_apart=False)
        model.set_attn_implementation(own)
    return found


def _ways(model: PreTrainedModel, settings: Settings) -> Iterator[Isolation]:
    ours = settings.attn == "auto" and model.config._attn_implementation == "sdpa"
    if ours and not settings.torch_compile:
        yield Isolation(lengths=True)
        yield Isolation(lengths=True, boundaries=True)
    yield Isolation()
    yield Isolation(boundaries=True)


def tolerance(dtype: torch.dtype) -> float:
    """How far logits of the same tokens may lie apart by rounding, as a share of the largest."""
    return _TOLERANCES.get(dtype, 0.0)


def _same(joined: _Seen, alone: _Seen, dtype: torch.dtype) -> bool:
    pairs = ((joined.logits, alone.logits), (joined.gradient, alone.gradient))
    close = all(bool((a - b).abs().max() <= tolerance(dtype) * b.abs().max()) for a, b in pairs)
    return close and joined.crossing <= _CROSSING


def _alone(model: Any) -> _Seen:
    seen = [_seen(model, ids[None], {}) for ids in _ids(model).split(_LENGTHS)]
    return _Seen(torch.cat([each[0] for each in seen]), torch.cat([each[1][0] for each in seen]), 0.0)


def _joined(model: Any, way: Isolation) -> _Seen | None:
    """None where the model refuses."""
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None].to(model.device)
    rows = {"position_ids": positions} | way.handed(list(_LENGTHS), row_ends(_LENGTHS).to(model.device))
    try:
        logits, gradients = _seen(model, _ids(model)[None], rows)
    except _REFUSALS:
        return None
    gradient = gradients[0] + gradients[1]
    crossing = max(gradients[0][_LENGTHS[0] :].abs().max(), gradients[1][: _LENGTHS[0]].abs().max())
    return _Seen(logits, gradient, float(crossing / gradient.abs().max()))


def _ids(model: Any) -> torch.Tensor:
    """Different tokens, not the first ones, which are often special."""
    count, words = sum(_LENGTHS), model.config.get_text_config().vocab_size
    return torch.arange(words // 3, words // 3 + count).to(model.device) % words


def _seen(model: Any, ids: torch.Tensor, rows: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (tokens, words) in float32, and for each row in the sequence the gradient of a fixed sum of its logits
    with respect to the embeddings (tokens, hidden)."""
    embedded: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_(True))
        return embedded[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits = model(input_ids=ids, use_cache=False, **rows).logits[0].float()
    finally:
        hook.remove()
    waves = torch.arange(logits.shape[1], device=logits.device).float().sin()
    sums = (logits * waves).sum(dim=1)
    parts = sums.split(_LENGTHS) if len(sums) == sum(_LENGTHS) else [sums]
    gradients = [torch.autograd.grad(part.sum(), embedded[0], retain_graph=True)[0][0].float() for part in parts]
    return logits.detach(), gradients


@contextmanager
def probing(model: Any) -> Iterator[None]:
    """The model as it answers, with gradients, no weight trained and windows short enough to matter; then as before."""
    from sft.models.model import answering, preserved_random_state

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with preserved_random_state(), answering(model), torch.enable_grad(), _narrow_windows(model):
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


@contextmanager
def _narrow_windows(model: Any) -> Iterator[None]:
    """Windows and chunks of a few tokens: a mistake about them would not show in two short rows."""
    holders = {id(each): each for each in (model.config.get_text_config(), *model.modules())}
    holders |= {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    names = ("sliding_window", "attention_chunk_size")
    found = [(each, name, vars(each).get(name)) for each in holders.values() for name in names]
    changed = [(each, name, value) for each, name, value in found if type(value) is int and value > _WINDOW]
    for each, name, _ in changed:
        setattr(each, name, _WINDOW)
    try:
        yield
    finally:
        for each, name, value in changed:
            setattr(each, name, value)

"""Attention over joined rows on the CPU: each row by itself, instead of all of them under a block-diagonal mask.

A mask of T x T for T joined tokens makes the CPU compute, and throw away, what lies outside the rows: with B rows of
equal length B times as much work as needed, twice that for the half above the diagonal, and keys repeated for every
query head besides. Here every row is one causal call without a mask, which also takes grouped heads as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.settings import Settings

NAME = "staged_sft_rows"
# Two rows of four tokens; their logits must come out as under sdpa, up to rounding.
_PROBE_POSITIONS = (0, 1, 2, 3, 0, 1, 2, 3)
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


class RowsUnknown(RuntimeError):
    """The model does not hand positions to its attention, so rows cannot be told apart there."""


def row_lengths(position_ids: torch.Tensor) -> list[int]:
    """Tokens of each row of positions (1, tokens): a row ends where the next position is not one higher."""
    ends = (position_ids[0].diff() != 1).nonzero()[:, 0] + 1
    return ends.diff(prepend=ends.new_zeros(1), append=ends.new_tensor([position_ids.shape[1]])).tolist()


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, row by row where one sequence without a mask holds several rows.

    Shapes as there: query (batch, heads, tokens, size), result (batch, tokens, heads, size).

    Raises:
        RowsUnknown: there is no mask and no positions.
    """
    tokens = query.shape[2]
    if attention_mask is not None or tokens != key.shape[2] or query.shape[0] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    if position_ids is None:
        raise RowsUnknown("no positions")
    lengths = row_lengths(position_ids)
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    rows = [sdpa_attention_forward(module, q, k, v, None, **keywords)[0] for q, k, v in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1), None


def mask(*, local_size: int | None = None, use_vmap: bool = False, **keywords: Any) -> torch.Tensor | None:
    """No mask for a sequence that `attend` can split into causal rows; for everything else sdpa's.

    A window shorter than the sequence (`local_size`), padding, a cache or a mask of the model's own needs one.
    """
    whole = keywords["q_length"] == keywords["kv_length"] and (
        local_size is None or local_size >= keywords["kv_length"]
    )
    if whole and keywords["batch_size"] == 1 and keywords.get("attention_mask") is None and not use_vmap:
        return None
    return sdpa_mask(local_size=local_size, use_vmap=use_vmap, **keywords)


def confine_rows(model: PreTrainedModel, settings: Settings) -> bool:
    """Puts row-wise attention into a model that trains on the CPU with SFT_ATTN=auto; whether it did.

    Left alone are models with an attention of their own, and those whose probe logits come out differently.
    """
    plain = settings.attn == "auto" and model.config._attn_implementation == "sdpa"
    if not plain or settings.torch_compile or is_deepspeed_zero3_enabled() or model.device.type != "cpu":
        return False
    expected = _probe(model)
    model.set_attn_implementation(NAME)
    try:
        difference = (_probe(model) - expected).abs().max()
    except RowsUnknown:
        difference = expected.new_tensor(torch.inf)
    same = bool(difference <= _TOLERANCES.get(model.dtype, 0.0) * expected.abs().max())
    if not same:
        model.set_attn_implementation("sdpa")
    return same


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Logits of two joined rows of different tokens, in float32."""
    from sft.models.model import answering, preserved_random_state

    positions = torch.tensor([_PROBE_POSITIONS])
    ids = torch.arange(positions.shape[1])[None] % model.config.get_text_config().vocab_size
    with preserved_random_state(), answering(model):
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)

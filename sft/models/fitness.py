"""Does a model fit the stage? What its configuration and its tokenizer tell before any weight is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM
from transformers.modeling_utils import set_zero3_state

from sft.data.sources.load import load_source
from sft.errors import Problems
from sft.models.model import LOAD_ERRORS, load_config, load_problem
from sft.models.targets import adapter_problems, target_notes

if TYPE_CHECKING:
    import datasets
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sft.settings import Settings

BLOCK = 1000  # rows read at once: as numbers of their table 100 times as fast as one by one


def blank(config: PretrainedConfig, settings: Settings, **keywords: Any) -> PreTrainedModel:
    """The model without any memory behind its weights.

    Raises:
        Problems: it is no causal language model that transformers knows.
    """
    try:
        with torch.device("meta"), set_zero3_state():
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=settings.trust_remote_code, **keywords
            )
    except (*LOAD_ERRORS, RuntimeError) as error:
        if "attn_implementation" in keywords:
            raise
        if "Unrecognized configuration class" not in str(error):
            raise load_problem("the model's architecture", settings.base_model, error) from error
        what = f"SFT_BASE_MODEL={settings.base_model}: {config.model_type} is"
        if config.get_text_config() is not config:
            raise Problems([
                f"{what} a model for images, sound or video besides text, which this program does not train; "
                "name a text model"
            ]) from error  # fmt: skip
        raise Problems([f"{what} no causal language model; name one that continues text"]) from error


def model_problems(settings: Settings) -> list[str]:
    """What would end a run although model and settings are in order each by itself."""
    try:
        config = load_config(settings)
        model = blank(config, settings)
    except Problems as error:
        return error.problems
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", True):
        return [
            f"SFT_BASE_MODEL={settings.base_model}: {config.model_type} reads text in both directions, so that every "
            "answer would be seen before it is given; name a model that continues text"
        ]
    found = [*attention_problems(config, settings), *position_problems(model, settings)]
    return [*found, *adapter_problems(model, settings)]


def model_notes(settings: Settings) -> list[str]:
    """Warnings about the adapter's targets; [] where the model can't be built."""
    try:
        return target_notes(blank(load_config(settings), settings), settings)
    except Problems:
        return []


def attention_problems(config: PretrainedConfig, settings: Settings) -> Iterator[str]:
    """SFT_ATTN that the architecture does not have."""
    if settings.attn == "auto":
        return
    if settings.attn == "flex_attention" and not torch.cuda.is_available():
        yield "SFT_ATTN=flex_attention: can't be trained without a GPU; SFT_ATTN=auto takes what the machine has"
    try:
        blank(config, settings, attn_implementation=settings.attn)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().partition(". ")[0].partition("\n")[0]
        yield f"SFT_ATTN={settings.attn}: {reason}; SFT_ATTN=auto takes what the model has"


def position_problems(model: PreTrainedModel, settings: Settings) -> Iterator[str]:
    """Rows that may be longer than a table of learned positions."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
    if longest is None:
        return
    learned = any(0 <= table.num_embeddings - longest <= 2 for table in tables)
    if learned and settings.max_seq_len > longest:
        yield (
            f"SFT_MAX_SEQ_LEN={settings.max_seq_len}: {type(model).__name__} has learned {longest} positions and no "
            f"more; set SFT_MAX_SEQ_LEN={longest} or less"
        )


def require_known_tokens(
    config: PretrainedConfig, settings: Settings, tokenizer: PreTrainedTokenizerBase, *parts: datasets.Dataset
) -> None:
    """No row and no question has a token for which the model has no embedding: an added token without a trained row.

    Raises:
        Problems: names the first such row and its token.
    """
    rows: Any = blank(config, settings).get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) < rows:
        return  # nothing it gives is unknown, and a million rows need not be read
    for part in parts:
        for number, table in enumerate(part.with_format("arrow").iter(BLOCK) if len(part) else ()):
            column = table["input_ids"]
            highest = pc.max(pc.list_flatten(column)).as_py()
            if highest is not None and highest >= rows:
                inside = next(k for k, ids in enumerate(column.to_pylist()) if max(ids, default=0) >= rows)
                row, highest = number * BLOCK + inside + 1, max(column[inside].as_py())
                raise _unknown_token(settings, rows, f"row {row}", highest)
    if settings.gen_eval == "none":
        return
    for source in settings.gen_eval_sources:
        for position, messages in enumerate(load_source(source).dataset["messages"]):
            text = "\n".join(message["content"] for message in messages)
            highest = max(tokenizer(text, add_special_tokens=False)["input_ids"], default=0)
            if highest >= rows:
                raise _unknown_token(settings, rows, f"row {position + 1} of {source.id}", highest)


def _unknown_token(settings: Settings, rows: int, place: str, token: int) -> Problems:
    return Problems([
        f"SFT_BASE_MODEL={settings.base_model}: the tokenizer has ids beyond the model's embedding of {rows:,} rows, "
        f"and {place} holds one ({token:,}): it can't be trained; use the tokenizer the model was trained with, or a "
        "model whose embedding was resized for it"
    ])  # fmt: skip

"""Is the prompt a model is trained behind the prompt it will be asked with, token for token?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sft.data.labels.rendering import is_plain
from sft.data.labels.template import TEMPLATE_ERRORS, Chat, ChatTemplate, chats_of, shared, template_of
from sft.data.labels.tokens import encoder

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from sft.settings import Settings

_ROWS_COMPARED = 20  # spread over a source: each is rendered once more
_SHOWN = 8  # tokens to either side of a difference


@dataclass(frozen=True)
class Parity:
    """Of how many rows the prompts were compared, and the first difference with its remedy; "" where all are equal."""

    compared: int = 0
    difference: str = ""


def compare_prompts(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Parity:
    """Of rows spread over a source, the tokens before the last answer against those a server makes of the turns so far,
    the row's tools and SFT_TEMPLATE_OPTIONS with `add_generation_prompt`."""
    template = template_of(tokenizer, settings.template_options)
    if template is None or not len(rows):
        return Parity()
    numbers = range(0, len(rows), max(1, len(rows) // _ROWS_COMPARED))
    chosen = rows.select(numbers).select_columns(["messages", "extras", "number", "input_ids"]).to_dict()
    compared = 0
    chats = chats_of(chosen["messages"], chosen["extras"])
    for chat, number, trained in zip(chats, chosen["number"], chosen["input_ids"], strict=True):
        prompt = _prompt(template, chat)
        if prompt is None:
            continue
        compared += 1
        asked = encoder(tokenizer)([prompt])[0].ids
        if trained[: len(asked)] != asked[: len(trained)]:
            pairs = (_shown(tokenizer, trained, asked), _shown(tokenizer, asked, trained))
            place = f"row {number}: trained behind {pairs[0]}, a server asks with {pairs[1]}"
            return Parity(compared, f"{place}; {_remedy(template, chat, prompt)}")
    return Parity(compared)


def _prompt(template: ChatTemplate, chat: Chat) -> str | None:
    """None for plain text, where nothing is before the answer, and for turns without it that the template refuses."""
    messages, tools = chat
    if is_plain(messages) or len(messages) < 2:
        return None
    try:
        return template.render([Chat(messages[:-1], tools)], prompt=True)[0]
    except TEMPLATE_ERRORS:
        return None


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], others: Sequence[int]) -> str:
    """What is before the first difference and, in brackets, what is behind it."""
    equal = next((k for k, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), len(others))
    parts = (ids[max(equal - _SHOWN, 0) : equal], ids[equal : equal + _SHOWN])
    before, behind = (str(tokenizer.decode(list(part), clean_up_tokenization_spaces=False)) for part in parts)
    return repr(f"…{before}[{behind}]")


def _remedy(template: ChatTemplate, chat: Chat, prompt: str) -> str:
    before = Chat(chat.messages[:-1], chat.tools)
    (text,), (asked,) = template.render([chat]), template.render([before])
    if text.startswith(prompt):
        return "the tokenizer joins the end of the prompt with the beginning of the answer: let answers begin otherwise"
    if shared(text, prompt) < shared(asked, prompt):
        return "the template writes earlier turns otherwise once an answer follows: repair it or name another"
    option = ', for instance {"enable_thinking": false}' if "enable_thinking" in template.text else ""
    return f"give the rows their reasoning, or set SFT_TEMPLATE_OPTIONS{option}, and the same in the server"

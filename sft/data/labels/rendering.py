"""Messages -> the text the model sees, and which characters of it the assistant wrote. For any chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft.data.labels.template import NO_TEMPLATE, TEMPLATE_ERRORS, ChatTemplate, Span, shared
from sft.data.sources.turns import TEXT_ROLE, Message
from sft.errors import Problems


@dataclass(frozen=True)
class Rendered:
    """One row as text. `turns` are the characters of each assistant turn, from its first to the end-of-turn mark.

    `content` is the final answer as the row has it, None for plain text; `shift` is where it stands in `text`, None
    where the template rewrote it.
    """

    text: str
    turns: tuple[Span, ...]
    content: str | None = None
    shift: int | None = None


def render(template: ChatTemplate | None, conversations: Sequence[list[Message]], *, eos: str) -> list[Rendered | None]:
    """Conversations as text with their assistant turns; None where the template refuses one. `eos` ends plain text.

    Raises:
        Problems: there are conversations and no template.
    """
    chats = [chat for chat in conversations if not is_plain(chat)]
    if chats and template is None:
        raise Problems([NO_TEMPLATE])
    rendered = iter(_render_chats(template, chats) if template and chats else [])
    return [_plain(chat[0]["content"], eos) if is_plain(chat) else next(rendered) for chat in conversations]


def is_plain(chat: Sequence[Message]) -> bool:
    """Whether a row is text to be trained whole, without a template."""
    return chat[0]["role"] == TEXT_ROLE


def _plain(content: str, eos: str) -> Rendered:
    text = content if content.endswith(eos) else content + eos
    return Rendered(text, ((0, len(text)),))


def _render_chats(template: ChatTemplate, chats: list[list[Message]]) -> list[Rendered | None]:
    try:
        found = template.render_marked(chats) if template.marked else _compared_spans(template, chats)
    except TEMPLATE_ERRORS:
        if len(chats) == 1:
            return [None]
        middle = len(chats) // 2
        return _render_chats(template, chats[:middle]) + _render_chats(template, chats[middle:])
    return [_trimmed(template, chat, text, spans) for chat, (text, spans) in zip(chats, found, strict=True)]


def _compared_spans(template: ChatTemplate, chats: Sequence[list[Message]]) -> list[tuple[str, list[Span]]]:
    """By comparing the text with that of the turns before: an assistant turn is what its prompt does not hold yet.

    A text that ends with opening, final answer and ending as the probe showed them needs no second rendering.
    """
    texts = template.render(chats)
    finals = [_final(template, text, chat[-1]["content"]) for text, chat in zip(texts, chats, strict=True)]
    turns = [
        (i, k)
        for i, chat in enumerate(chats)
        for k, turn in enumerate(chat)
        if turn["role"] == "assistant" and k and (k < len(chat) - 1 or finals[i] is None)
    ]
    prompts = template.render([chats[i][:k] for i, k in turns], prompt=True)
    wholes = template.render([chats[i][: k + 1] for i, k in turns])
    spans: list[list[Span]] = [[] for _ in chats]
    for (i, k), prompt, whole in zip(turns, prompts, wholes, strict=True):
        span = _compared(template, texts[i], prompt, whole, content=chats[i][k]["content"].strip(), before=spans[i])
        if span is not None:
            spans[i].append(span)
        elif k == len(chats[i]) - 1:
            spans[i].clear()  # without its final answer a row is unreadable
    found = [earlier + ([final] if final else []) for earlier, final in zip(spans, finals, strict=True)]
    return list(zip(texts, found, strict=True))


def _final(template: ChatTemplate, text: str, content: str) -> Span | None:
    for answer in (content, content.strip()):
        if text.endswith(template.opening + answer + template.ending):
            return len(text) - len(answer) - len(template.ending), len(text)
    return None


def _compared(
    template: ChatTemplate, text: str, prompt: str, whole: str, *, content: str, before: Sequence[Span]
) -> Span | None:
    """The span of one turn; None where the template writes it differently once more turns follow: it stays context."""
    start = len(prompt)
    if not text.startswith(prompt):
        earliest = before[-1][1] if before else 0
        start = text.find(content, max(earliest, shared(text, prompt) - len(template.opening)))
    end = shared(text, whole)
    if start < 0 or start + len(content) > end:
        return None
    if end < len(whole):  # where the next turn's mark begins alike ("<|"), back to the white space before it
        words = text[start + len(content) : end].rsplit(maxsplit=1)
        end -= len(words[-1]) if len(words) == 2 else 0
    return start, end


def _trimmed(template: ChatTemplate, chat: list[Message], text: str, spans: Sequence[Span]) -> Rendered | None:
    """Turns without what the prompt already ends with and without white space after the end-of-turn mark."""
    lead = template.lead if template.marked else ""
    starts = [start + len(lead) if text.startswith(lead, start) else start for start, _ in spans]
    ends = [len(text[:end].rstrip()) for _, end in spans]
    turns = tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)
    if not turns:
        return None
    content = chat[-1]["content"]
    position = text.find(content.strip(), *turns[-1])
    shift = None if position < 0 else position - (len(content) - len(content.lstrip()))
    return Rendered(text, turns, content, shift)

"""Messages -> the text the model sees, and which characters of it the assistant wrote. For any chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sft.data.labels.spans import located, reasoning_of, thoughts_apart
from sft.data.labels.template import NO_TEMPLATE, TEMPLATE_ERRORS, Chat, ChatTemplate, Span, said
from sft.data.labels.tokens import NO_ENDS, PlainEnds
from sft.data.sources.turns import TEXT_ROLE, Dropped, Message, is_empty
from sft.errors import Problems

REWRITTEN = "turn rewritten by the template"
NO_CALLS = "tool calls that the chat template cannot write"
NO_TOOL_ANSWERS = "tool answers that the chat template cannot write"
TOOLS_UNSAID = "tools left out by the template"
EMPTY_EARLIER = "empty answer of an earlier turn"
CONTEXT_LOST = "turn that is not to be trained rewritten by the template (SFT_TRAIN_ON_PROMPT=1)"
REASONING_CUT = "reasoning left out by the template"
THOUGHTS_TWICE = "think block that the template wraps in another"
EARLIER_REASONING_CUT = "reasoning of an earlier turn left out by the template"


@dataclass(frozen=True)
class Rendered:
    """One row as text. `turns` are the characters of each trained turn, from its first to the end-of-turn mark.

    `content` is the final answer as the row has it, None for plain text; `shift` is where it stands in `text`, None
    where the template rewrote it. `answer` is where the final answer begins behind its reasoning, None where it has
    none. `noted` are things to count. `plain`: the tokenizer adds what it adds to any text, such as BOS. `context`:
    the characters of turns that are never trained, None for one that the template rewrote.
    """

    text: str
    turns: tuple[Span, ...]
    content: str | None = None
    shift: int | None = None
    answer: int | None = None
    noted: tuple[str, ...] = ()
    plain: bool = False
    context: tuple[Span | None, ...] = ()

    def borders(self, opening: str) -> list[int]:
        """Where trained turns begin that stand right behind what opens an answer."""
        if not opening or self.plain:
            return []
        return [start for start, _ in self.turns if start and self.text.endswith(opening, 0, start)]


def render(
    template: ChatTemplate | None,
    chats: Sequence[Chat],
    *,
    ends: PlainEnds = NO_ENDS,
    train: Literal["all", "last"] = "all",
) -> list[Rendered | Dropped]:
    """Conversations as text with their trained turns, or why there is none. `ends` are those of plain text.

    Raises:
        Problems: there are conversations and no template.
    """
    conversations = [chat for chat in chats if not is_plain(chat.messages)]
    if conversations and template is None:
        raise Problems([NO_TEMPLATE])
    rendered = iter(_texts(template, conversations) if template and conversations else [])
    found: list[Rendered | Dropped] = []
    for chat in chats:
        if is_plain(chat.messages):
            found.append(_plain(chat.messages[0]["content"], ends))
            continue
        assert template is not None
        text = next(rendered)
        try:
            found.append(_rendered(template, chat, text, train=train))
        except Dropped as reason:
            found.append(reason)
    return found


def is_plain(messages: Sequence[Message]) -> bool:
    """Whether a row is text to be trained whole, without a template."""
    return messages[0]["role"] == TEXT_ROLE


def _plain(content: str, ends: PlainEnds) -> Rendered:
    """Text that begins and ends as the tokenizer begins texts, and ends with EOS in any case; neither twice."""
    text = content.removeprefix(ends.bos)
    if ends.eos_added:
        text = text.removesuffix(ends.eos)
    elif not text.endswith(ends.eos):
        text += ends.eos
    return Rendered(text, ((0, len(text)),), plain=True)


def _texts(template: ChatTemplate, chats: list[Chat]) -> list[tuple[str, list[Span]] | Dropped]:
    """The text of each conversation and, of a marked template, the characters in its marks."""
    try:
        if template.marked:
            return list(template.render_marked(chats))
        return [(text, []) for text in template.render(chats)]
    except TEMPLATE_ERRORS as error:
        if len(chats) == 1:
            return [Dropped(f"the template refused it: {said(error)}")]
        middle = len(chats) // 2
        return _texts(template, chats[:middle]) + _texts(template, chats[middle:])


def _rendered(
    template: ChatTemplate, chat: Chat, text: tuple[str, list[Span]] | Dropped, *, train: Literal["all", "last"]
) -> Rendered:
    messages = chat.messages
    if any("tool_calls" in message for message in messages) and template.arguments is None:
        raise Dropped(NO_CALLS)
    if any(message["role"] == "tool" for message in messages) and not template.writes_tool_answers:
        raise Dropped(NO_TOOL_ANSWERS)
    if isinstance(text, Dropped):
        raise text
    whole, marked = text
    turns = [message for message in messages if message["role"] == "assistant"]
    spans: Sequence[Span | None] = marked if len(marked) == len(turns) else located(template, chat, whole)
    spans = [_trimmed(template, whole, span) for span in spans]
    wanted = [_is_trained(message) and (train == "all" or message is turns[-1]) for message in turns]
    if not any(wanted):
        raise Dropped("no answer that is to be trained")
    last = max(number for number, is_wanted in enumerate(wanted) if is_wanted)
    if spans[last] is None:
        raise Dropped(f"final {REWRITTEN}")
    kept = tuple(span for span, is_wanted in zip(spans, wanted, strict=True) if span and is_wanted)
    noted = [REWRITTEN] * (sum(wanted) - len(kept)) + _left_out(template, chat, turns, spans, whole)
    context = tuple(span for span, message in zip(spans, turns, strict=True) if not _is_trained(message))
    if context and train == "all":
        noted += [EMPTY_EARLIER] * sum(message.get("trained", True) and not _is_trained(message) for message in turns)
    return _answered(Rendered(whole, kept, noted=tuple(noted), context=context), turns[last])


def _is_trained(message: Message) -> bool:
    """Neither marked as context nor empty: nobody is to learn to say nothing."""
    return message.get("trained", True) and not is_empty(message)


def _trimmed(template: ChatTemplate, text: str, span: Span | None) -> Span | None:
    """A turn without what the prompt already ends with and without white space after the end-of-turn mark."""
    if span is None:
        return None
    start, end = span
    if template.marked and text.startswith(template.lead, start):
        start += len(template.lead)
    end = len(text[:end].rstrip())
    return (start, end) if start < end else None


def _left_out(
    template: ChatTemplate, chat: Chat, turns: Sequence[Message], spans: Sequence[Span | None], text: str
) -> list[str]:
    """What the row has and the text has not."""
    noted = [TOOLS_UNSAID] if chat.tools and not template.writes_tools else []
    for turn, span in zip(turns, spans, strict=True):
        reasoning = reasoning_of(turn)
        if reasoning and span and text.find(reasoning, *span) < 0:
            noted.append(REASONING_CUT if turn is turns[-1] else EARLIER_REASONING_CUT)
        if span and text.count("</think>", *span) > max(turn["content"].count("</think>"), 1):
            noted.append(THOUGHTS_TWICE)
    return noted


def _answered(row: Rendered, message: Message) -> Rendered:
    """With the place of the final answer, whole as the row has it or else what is behind its reasoning."""
    span = row.turns[-1]
    content, reasoning = message["content"], reasoning_of(message)
    place = row.text.find(content.strip(), *span)
    answer = None
    thoughts = row.text.find(reasoning, *span) if reasoning else -1
    behind = thoughts_apart(content)[1]
    # Without the answer behind it, it is a word of the answer, from a template that writes no reasoning.
    found = row.text.find(behind.strip(), thoughts + len(reasoning), span[1]) if thoughts >= 0 else -1
    if found >= 0:
        answer = found
        if place < 0 or behind == content:
            content, place = behind, answer
    elif place < 0:
        content = behind
        place = row.text.find(content.strip(), *span)
    shift = None if place < 0 else place - (len(content) - len(content.lstrip()))
    return replace(row, content=content, shift=shift, answer=answer)

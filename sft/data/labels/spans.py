"""Where the assistant's turns stand in a rendered conversation, for any chat template."""

from __future__ import annotations

from sft.data.labels.template import MARK, PROBE, TEMPLATE_ERRORS, Chat, ChatTemplate, Span, shared
from sft.data.sources.turns import Message

# Messages of a conversation whose turns are found by rendering it up to each of them: 300 take half a second.
_MOST_COMPARED = 300


def located(template: ChatTemplate, chat: Chat, text: str) -> list[Span | None]:
    """The characters of each assistant turn in the conversation's text, from where its prompt ends to its
    end-of-turn mark; None for a turn that the template writes otherwise than alone, or that stands there twice.

    A turn is looked for behind the header every turn has; where that does not tell, in the place where the text of
    the turns before it ends.
    """
    turns = [k for k, message in enumerate(chat.messages) if message["role"] == "assistant"]
    rooms = _rooms(template, text, len(turns))
    spans: list[Span | None] = []
    for k, room in zip(turns, rooms, strict=True):
        message = chat.messages[k]
        span = _worded(template, text, room, _words(template, chat, message)) if room else None
        if span is None and len(chat.messages) <= _MOST_COMPARED:
            span = _compared(template, chat, k, text, room)
        spans.append(span or _alone(template, message, text))
    return spans


def thoughts_apart(content: str) -> tuple[str, str]:
    """Reasoning written into an answer between <think> and </think>, and the answer behind it."""
    thoughts, end, answer = content.rpartition("</think>")
    return (thoughts.replace("<think>", "", 1), answer) if end else ("", content)


def _words(template: ChatTemplate, chat: Chat, message: Message) -> str:
    """What a turn says when it has thought; a call as the template writes it behind any question."""
    if "tool_calls" not in message:
        return thoughts_apart(message["content"])[1].strip()
    asked = [PROBE[0]]
    try:
        (prompt,) = template.render([Chat(asked, chat.tools)], prompt=True)
        (whole,) = template.render([Chat([*asked, message], chat.tools)])
    except TEMPLATE_ERRORS:
        return ""
    begun = _begun(template, whole, prompt)
    return "" if begun is None else thoughts_apart(whole[begun:])[1].strip().removesuffix(template.closing)


def _rooms(template: ChatTemplate, text: str, count: int) -> list[Span] | list[None]:
    """For each turn the characters from behind its header to the next; None where headers are not told apart."""
    header = template.header
    if not header or text.count(header) != count:
        return [None] * count
    starts, place = [], -len(header)
    for _ in range(count):
        place = text.find(header, place + len(header))
        starts.append(place + len(header))
    return list(zip(starts, [*(start - len(header) for start in starts[1:]), len(text)], strict=True))


def _worded(template: ChatTemplate, text: str, room: Span, words: str) -> Span | None:
    """The turn in this room that says these words and then ends; None where none does, or more than one."""
    start, end = room
    if template.supplied and text.startswith(template.supplied, start):
        start += len(template.supplied)
    for mark in (template.closing, template.middle) if words else ():
        found = text.find(words + mark, start, end)
        if found >= 0 and text.find(words + mark, found + 1, end) < 0:
            return start, found + len(words) + len(mark)
    return None


def _compared(template: ChatTemplate, chat: Chat, k: int, text: str, room: Span | None) -> Span | None:
    """Turn k is what the conversation up to it says beyond its prompt."""
    messages, tools = chat
    try:
        (prompt,) = template.render([Chat(messages[:k], tools)], prompt=True)
        (whole,) = template.render([Chat(messages[: k + 1], tools)])
    except TEMPLATE_ERRORS:
        return None
    start, begun = (_begun(template, each, prompt) for each in (text, whole))
    words = thoughts_apart(messages[k]["content"])[1].strip()
    if "tool_calls" in messages[k]:
        words = thoughts_apart(whole[begun or 0 :])[1].strip().removesuffix(template.closing)
    span = _ended(template, text, whole, start, words) if start is not None else None
    if span is not None or begun is None:
        return span
    if room is None and start is not None:
        behind = text.find(template.header, start) if template.header else -1
        room = start, behind if behind >= 0 else len(text)
    # The template writes the turns before otherwise once more follow, and perhaps this one too: without its thoughts.
    return _worded(template, text, room, words) if room else None


def _alone(template: ChatTemplate, message: Message, text: str) -> Span | None:
    """An answer that stands in the text once, from its first word on."""
    words = thoughts_apart(message["content"])[1].strip()
    found = text.find(words + template.closing)
    if not words or "tool_calls" in message or found < 0 or text.count(words) > 1:
        return None
    return found, found + len(words) + len(template.closing)


def _begun(template: ChatTemplate, text: str, prompt: str) -> int | None:
    """Where a turn begins whose prompt may hold more than the text does, such as <think>; None: it isn't this text."""
    if text.startswith(prompt):
        return len(prompt)
    start = prompt.rfind(template.header) + len(template.header)
    return start if template.header and text.startswith(prompt[:start]) and template.header in prompt else None


def _ended(template: ChatTemplate, text: str, whole: str, start: int, words: str) -> Span | None:
    """From `start` to the end-of-turn mark: `whole` ends with this turn, `text` may go on."""
    found, end = text.find(words, start), shared(text, whole)
    if found < 0 or found + len(words) > end:
        return None
    if not whole[end:].strip():
        return start, end
    said = found + len(words)
    if text.startswith(template.middle, said):  # it is ended otherwise where more turns follow
        return start, said + len(template.middle)
    marks = list(MARK.finditer(text, said, end))  # the next turn's mark may begin alike ("<|")
    return start, marks[-1].end() if marks else said


def reasoning_of(message: Message) -> str:
    """What the assistant thought before it answered, by its own key or within the answer."""
    return (message.get("reasoning_content") or thoughts_apart(message["content"])[0]).strip()

"""Messages -> the text the model sees, and which characters of it the assistant wrote. For any chat template."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from sft.data.shapes import TEXT_ROLE, Message
from sft.errors import Problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE: list[Message] = [{"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "Pong."}]
NO_TEMPLATE = (
    "SFT_CHAT_TEMPLATE=: the base model's tokenizer has no chat template; set chatml, llama2, alpaca, mistral"
    " or a .jinja file"
)
# What templates raise for conversations they refuse (no alternation, no system role) or cannot read.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


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


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what a probe showed: does it mark assistant turns, what opens one, what ends a text."""

    text: str
    variables: dict[str, Any]
    marked: bool
    opening: str
    ending: str

    @property
    def closing(self) -> str:
        """The end-of-turn mark and what else follows an answer, without white space at its end."""
        return self.ending.rstrip()

    def render(self, conversations: Sequence[list[Message]], *, prompt: bool = False) -> list[str]:
        """The texts of conversations; `prompt` adds what opens the next answer. Errors are the template's own."""
        return self._rendered(conversations, add_generation_prompt=prompt)[0]

    def render_marked(self, conversations: Sequence[list[Message]]) -> list[tuple[str, list[Span]]]:
        """The texts and what stands between the template's own {% generation %} marks."""
        texts, spans = self._rendered(conversations, return_assistant_tokens_mask=True)
        return list(zip(texts, spans, strict=True))

    def _rendered(self, conversations: Sequence[list[Message]], **options: Any) -> tuple[list[str], list[list[Span]]]:
        """transformers declares a text and returns two lists."""
        rendered: Any = render_jinja_template(
            conversations=list(conversations), chat_template=self.text, **options, **self.variables
        )
        return rendered


def template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The tokenizer's chat template, in TRL's training version where there is one; None when it has none.

    Raises:
        Problems: it fails on a question and its answer.
    """
    if not tokenizer.chat_template:
        return None
    text = tokenizer.get_chat_template()
    if not _MARKED.search(text):
        text = _training_version(text) or text
    plain = ChatTemplate(text, dict(tokenizer.special_tokens_map), marked=False, opening="", ending="")
    try:
        return _probed(plain)
    except TEMPLATE_ERRORS as error:
        message = f"SFT_CHAT_TEMPLATE=: the chat template cannot be used ({error}); repair it or name another"
        raise Problems([message]) from error


def _probed(template: ChatTemplate) -> ChatTemplate:
    """Marks are trusted only if they hold the probe's answer and all that closes it."""
    (whole,), (asked,), (prompt,) = (
        template.render([PROBE]),
        template.render([PROBE[:1]]),
        template.render([PROBE[:1]], prompt=True),
    )
    answer = PROBE[1]["content"]
    ending = whole.rpartition(answer)[2]
    spans = template.render_marked([PROBE])[0][1] if _MARKED.search(template.text) else []
    marked = len(spans) == 1 and answer + ending.rstrip() in whole[slice(*spans[0])]
    return replace(template, marked=marked, opening=prompt[_shared(asked, prompt) :], ending=ending)


def _training_version(text: str) -> str | None:
    """TRL keeps `X.jinja` as published beside `X_training.jinja` with generation marks. Importing trl takes 5 s."""
    package = importlib.util.find_spec("trl")
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent / "chat_templates"
    for marked in sorted(folder.glob("*_training.jinja")):
        published = marked.with_name(marked.name.replace("_training", ""))
        if published.is_file() and published.read_text(encoding="utf-8") == text:
            return marked.read_text(encoding="utf-8")
    return None


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
        shared = _shared(text, prompt) - len(template.opening)
        start = text.find(content, max(shared, before[-1][1] if before else 0))
    end = _shared(text, whole)
    return (start, end) if start >= 0 and start + len(content) <= end else None


def _trimmed(template: ChatTemplate, chat: list[Message], text: str, spans: Sequence[Span]) -> Rendered | None:
    """Turns without the rest of what opens them and without white space after the end-of-turn mark."""
    turns = tuple((_after_opening(template.opening, text, *span), len(text[: span[1]].rstrip())) for span in spans)
    turns = tuple((start, end) for start, end in turns if start < end)
    content = chat[-1]["content"]
    if not turns:
        return None
    position = text.find(content.strip(), turns[-1][0], turns[-1][1])
    shift = None if position < 0 else position - (len(content) - len(content.lstrip()))
    return Rendered(text, turns, content, shift)


def _after_opening(opening: str, text: str, start: int, end: int) -> int:
    """Some marks begin a newline too early: in what the model is given before it answers."""
    for extra in range(max(0, len(opening) - start), len(opening) + 1):
        if text.startswith(opening, start - len(opening) + extra):
            return min(start + extra, end)
    return start


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common from their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low

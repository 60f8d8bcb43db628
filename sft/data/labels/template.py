"""The chat template of a tokenizer, and what rendering a question and its answer shows about it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from sft.data.sources.turns import Message, Tools, unpacked
from sft.errors import Problems
from sft.settings.values import CHAT_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_Rendered = tuple[list[str], list[list[Span]]]

PROBE: list[Message] = [{"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "Pong."}]
_SYSTEM: Message = {"role": "system", "content": "Peng!"}
_PARAMETERS = {"type": "object", "properties": {"pang": {"type": "string", "description": "Pang."}}}
_TOOL = {"type": "function", "function": {"name": "pung", "description": "Pyng.", "parameters": _PARAMETERS}}
# An id as Mistral's templates want it: nine letters and digits.
_CALL = {"type": "function", "id": "pingpong1", "function": {"name": "pung", "arguments": {"pang": "Pong."}}}
_CALLING: list[Message] = [PROBE[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
_ANSWER: Message = {"role": "tool", "tool_call_id": "pingpong1", "name": "pung", "content": "Pingpang"}
# What templates raise: they are programs of other people.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
NO_TEMPLATE = (
    f"SFT_CHAT_TEMPLATE=: the base model's tokenizer has no chat template; set {', '.join(CHAT_TEMPLATES)}"
    " or a .jinja file"
)
# A mark such as <|end|> or </s>.
MARK = re.compile(r"\s*<[^<>\s]{1,60}>")
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(NamedTuple):
    """A row's conversation and the tools it may call."""

    messages: list[Message]
    tools: Sequence[dict[str, Any]] = ()


def chats_of(conversations: Sequence[list[Message]], extras: Sequence[str | None]) -> list[Chat]:
    """Conversations with what rows keep beside them (`turns.packed`)."""
    pairs = zip(conversations, extras, strict=True)
    return [Chat(messages) if more is None else Chat(*unpacked(messages, more)) for messages, more in pairs]


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what the probe showed.

    `marked`: its {% generation %} marks hold answers and what closes them. `lead`: what marks hold before an answer
    though the prompt already ends with it. `header`: what stands before each answer and nowhere else; `supplied`: what
    a prompt adds to it before the last one. `ending`: what stands after the last answer; `middle`: the end-of-turn mark
    of others. `stop`: the next turn's mark, where nothing else ends an answer (GLM's <|user|>); it is written after the
    last one. `takes_system`: system messages are written.
    """

    text: str
    variables: dict[str, Any]
    marked: bool = False
    takes_system: bool = True
    lead: str = ""
    header: str = ""
    supplied: str = ""
    ending: str = ""
    middle: str = ""
    stop: str = ""

    @property
    def opening(self) -> str:
        """What a prompt ends with, before the answer begins; "" where that is not known."""
        return self.header and self.header + self.supplied

    @property
    def closing(self) -> str:
        """The end-of-turn mark and what else follows an answer, without white space at its end."""
        return self.ending.rstrip()

    @cached_property
    def arguments(self) -> Literal["object", "text"] | None:
        """As what tool calls must hold their arguments to be written as JSON; None where calls can't be written."""
        for kind, messages, spoilt in (
            ("object", _CALLING, "{'pang"),
            ("text", with_text_arguments(_CALLING), '\\"pang'),
        ):
            text = self._attempt(messages, tools=[_TOOL])
            if all(word in text for word in ("pung", "pang", "Pong.")) and spoilt not in text:
                return "object" if kind == "object" else "text"
        return None

    @cached_property
    def writes_tool_answers(self) -> bool:
        """Whether what a tool answered comes into the text."""
        return _ANSWER["content"] in self._attempt(self._written([*_CALLING, _ANSWER, PROBE[1]]), tools=[_TOOL])

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the tools there are come into the text."""
        return "pang" in self._attempt(PROBE, tools=[_TOOL])

    def render(self, chats: Sequence[Chat], *, prompt: bool = False) -> list[str]:
        """The texts of conversations; `prompt` adds what opens the next answer. Errors are the template's own."""
        texts, _ = self._rendered(chats, add_generation_prompt=prompt)
        if prompt or not self.stop:
            return texts
        return [text + self._stop_of(chat.messages[-1]) for text, chat in zip(texts, chats, strict=True)]

    def render_marked(self, chats: Sequence[Chat]) -> list[tuple[str, list[Span]]]:
        """The texts and what stands between the template's own {% generation %} marks."""
        return list(zip(*self._rendered(chats, return_assistant_tokens_mask=True), strict=True))

    def fitted(self, messages: list[Message]) -> list[Message]:
        """The conversation as the template takes it: without a system role, its text begins the first user turn."""
        if self.takes_system or messages[0]["role"] != "system":
            return messages
        system, *rest = messages
        if rest and rest[0]["role"] == "user":
            content = f"{system['content']}\n\n{rest[0]['content']}"
            return [rest[0] | {"content": content}, *rest[1:]]
        return [{"role": "user", "content": system["content"]}, *rest]

    def _rendered(self, chats: Sequence[Chat], **options: Any) -> _Rendered:
        """Conversations with the same tools are rendered together, as all that have none."""
        texts: list[str] = []
        spans: list[list[Span]] = []
        for tools, group in groupby(chats, key=lambda chat: chat.tools):
            found = self._jinja([self._written(chat.messages) for chat in group], tools=list(tools), **options)
            texts += found[0]
            spans += found[1]
        return texts, spans

    def _stop_of(self, last: Message) -> str:
        if last["role"] != "assistant":
            return ""
        return self._stop_of_calls if "tool_calls" in last else self.stop

    @cached_property
    def _stop_of_calls(self) -> str:
        """The mark of a tool's answer, which ends the call."""
        called, answered = (self._attempt(self._written(m), tools=[_TOOL]) for m in (_CALLING, [*_CALLING, _ANSWER]))
        mark = MARK.match(answered, len(called)) if answered.startswith(called) else None
        return mark.group() if mark else ""

    def _written(self, messages: list[Message]) -> list[Message]:
        calling = any("tool_calls" in message for message in messages)
        return with_text_arguments(messages) if calling and self.arguments == "text" else messages

    def _jinja(self, conversations: list[list[Message]], *, tools: Tools, **options: Any) -> _Rendered:
        """transformers declares a text and returns two lists."""
        given: dict[str, Any] = {**self.variables, **options, "tools": tools or None}
        rendered: Any = render_jinja_template(conversations=conversations, chat_template=self.text, **given)
        for text in rendered[0]:
            text.encode()  # half a character is refused here, as the template's, and not by the tokenizer
        return rendered

    def _attempt(self, messages: list[Message], *, tools: Tools) -> str:
        """The text; "" where the template refuses."""
        try:
            return self._jinja([messages], tools=tools)[0][0]
        except TEMPLATE_ERRORS:
            return ""


def probes(template: ChatTemplate) -> list[Chat]:
    """Conversations that show how the template ends a turn, where others follow and where it calls a tool."""
    calls = [Chat(_CALLING, [_TOOL]), Chat([*_CALLING, _ANSWER, PROBE[1]], [_TOOL])] if template.arguments else []
    return [Chat(PROBE), Chat(PROBE + PROBE), *calls]


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Messages whose tool calls hold their arguments as JSON text."""

    def worded(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        message | {"tool_calls": [worded(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def template_of(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> ChatTemplate | None:
    """The tokenizer's chat template with the options it is handed; None when it has none.

    TRL's training versions are not taken: some write earlier turns otherwise than a server does.

    Raises:
        Problems: it fails on a question and its answer, does not write them, or does not read an option.
    """
    if not tokenizer.chat_template:
        return None
    options = options or {}
    try:
        text = tokenizer.get_chat_template()
        template = _probed(ChatTemplate(text, {**tokenizer.special_tokens_map, **options}))
    except TEMPLATE_ERRORS as error:
        template, reason = None, said(error)
    else:
        reason = "it does not write the text of messages"
    if template is None:
        raise Problems([f"SFT_CHAT_TEMPLATE=: the chat template cannot be used ({reason}); name another or repair it"])
    if unread := [_unread(name, text) for name in options if not re.search(rf"\b{re.escape(name)}\b", text)]:
        raise Problems(unread)
    return template


def _unread(option: str, text: str) -> str:
    near = difflib.get_close_matches(option, set(re.findall(r"\w{4,}", text)), 1)
    remedy = f"did you mean {near[0]}?" if near else "leave it out"
    return f"SFT_TEMPLATE_OPTIONS={option}: the chat template reads no such option; {remedy}"


def said(error: BaseException) -> str:
    """A template's own words in one line."""
    if isinstance(error, RecursionError):  # Python's words depend on how deep the program was already
        return "it calls itself, or is nested, without end"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"


def _probed(template: ChatTemplate) -> ChatTemplate | None:
    """None when the answer is not in the text: templates for images want lists of parts."""
    question, answer = PROBE[0]["content"], PROBE[1]["content"]
    whole, asked = template.render([Chat(PROBE), Chat(PROBE[:1])])
    (prompt,) = template.render([Chat(PROBE[:1])], prompt=True)
    before, found, ending = whole.rpartition(answer)
    if not found:
        return None
    agreed = shared(before, prompt)
    opening = prompt[shared(asked, prompt) : agreed]
    if not opening.strip():  # the mark that ends a question opens the answer: [/INST]
        opening = prompt[prompt.rfind(question) + len(question) : agreed]
    twice = template._attempt(PROBE + PROBE, tools=[])
    header = _header(twice, opening)
    after = twice[twice.find(answer) + len(answer) :]
    mark = MARK.match(after)
    next_mark = mark.group() if mark and not header.startswith(mark.group()) else ""
    stop = "" if ending.strip() else next_mark
    closing = (ending or stop).rstrip()
    begins = re.search(rf"{re.escape(next_mark)}\s*{re.escape(question)}", asked)  # whose turn it is, not an end
    middle = closing if after.startswith(closing) else "" if begins else next_mark
    template = replace(
        template, header=header, supplied=opening[len(header) :], ending=ending or stop, middle=middle, stop=stop
    )
    spans = template.render_marked([Chat(PROBE)])[0][1] if _MARKED.search(template.text) else []
    if len(spans) == 1 and answer + template.closing in whole[slice(*spans[0])]:
        template = replace(template, marked=True, lead=whole[spans[0][0] : agreed])
    return replace(template, takes_system=_takes_system(template))


def _header(twice: str, opening: str) -> str:
    """As much of the opening as stands before both answers of two exchanges; "" where that is nothing of use."""
    sizes = range(len(opening), 0, -1)
    return next((opening[:n] for n in sizes if opening[:n].strip() and twice.count(opening[:n]) == 2), "")


def _takes_system(template: ChatTemplate) -> bool:
    try:
        return _SYSTEM["content"] in template.render([Chat([_SYSTEM, *PROBE])])[0]
    except TEMPLATE_ERRORS:
        return False


def shared(first: str, second: str) -> int:
    """How many characters two texts have in common from their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# Where <|im_end|> is no token of the vocabulary, generation can only stop at the end-of-text token: both are written.
# Tools and calls stand there as Hermes and Qwen 2.5 were taught them.
_CHATML = """\
{%- set listed -%}
{%- for tool in tools or [] -%}{{ '\\n' + tool | tojson }}{%- endfor -%}
{%- endset -%}
{%- if tools -%}
{%- set listed = 'You may call these functions:\\n<tools>' + listed + '\\n</tools>\\nA call is written so:\\n'
 + '<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call>' -%}
{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\n' + listed + '<|im_end|>\\n' }}{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{ message['content'] }}
{%- for call in message['tool_calls'] or [] -%}
{{ '\\n' if message['content'] or not loop.first else '' }}{{ '<tool_call>\\n{"name": ' }}
{{- call['function']['name'] | tojson + ', "arguments": ' + call['function']['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}{{ '' if eos_token == '<|im_end|>' else eos_token }}{{ '\\n' }}
{%- endgeneration -%}
{%- else -%}
{{ message['content'] }}
{%- if loop.first and tools and message['role'] == 'system' -%}{{ '\\n\\n' + listed }}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# System text stands inside the first instruction, as these models were trained.
_SYSTEM_FIRST = """\
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
"""

_LLAMA2 = (
    _SYSTEM_FIRST
    + """\
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ bos_token or '' }}{{ '[INST] ' }}
{%- if loop.first and system -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}
{{ message['content'] | trim + ' [/INST]' }}
{%- endif -%}
{%- endfor -%}
"""
)

_MISTRAL = (
    _SYSTEM_FIRST
    + """\
{{- bos_token or '' -}}
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ '[INST] ' }}{%- if loop.first and system -%}{{ system + '\\n\\n' }}{%- endif -%}{{ message['content'] + ' [/INST]' }}
{%- endif -%}
{%- endfor -%}
"""
)

_ALPACA = (
    _SYSTEM_FIRST
    + """\
{{- bos_token or '' -}}
{%- if system -%}{{ system + '\\n\\n' }}{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{{ '### Response:\\n' }}{%- generation -%}{{ message['content'] + eos_token + '\\n\\n' }}{%- endgeneration -%}
{%- else -%}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
)

BUILT_IN = dict(zip(CHAT_TEMPLATES, (_CHATML, _LLAMA2, _ALPACA, _MISTRAL), strict=True))


def chat_template_for(name: str) -> str:
    """The template of SFT_CHAT_TEMPLATE: a built-in name or the text of a .jinja file.

    Raises:
        Problems: neither, or a file that cannot be read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        known = ", ".join(CHAT_TEMPLATES)
        raise Problems([f"SFT_CHAT_TEMPLATE={name}: neither {known} nor a readable .jinja file ({error})"]) from error

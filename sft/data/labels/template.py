"""The chat template of a tokenizer, and what rendering a question and its answer shows about it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from sft.data.sources.turns import Message
from sft.errors import Problems
from sft.settings.values import CHAT_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

PROBE: list[Message] = [{"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "Pong."}]
_SYSTEM: Message = {"role": "system", "content": "Peng!"}
# What templates raise for conversations they refuse (no alternation, no system role) or cannot read.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
NO_TEMPLATE = (
    f"SFT_CHAT_TEMPLATE=: the base model's tokenizer has no chat template; set {', '.join(CHAT_TEMPLATES)}"
    " or a .jinja file"
)
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what the probe showed.

    `marked`: its {% generation %} marks hold answers and what closes them. `lead`: what marks hold before an answer
    though the prompt already ends with it. `opening`: what a prompt adds before an answer. `ending`: what stands after
    the last answer. `takes_system`: system messages are written.
    """

    text: str
    variables: dict[str, Any]
    marked: bool = False
    takes_system: bool = True
    lead: str = ""
    opening: str = ""
    ending: str = ""

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

    def fitted(self, chat: list[Message]) -> list[Message]:
        """The conversation as the template takes it: without a system role, its text begins the first user turn."""
        if self.takes_system or chat[0]["role"] != "system":
            return chat
        system, *rest = chat
        if rest and rest[0]["role"] == "user":
            content = f"{system['content']}\n\n{rest[0]['content']}"
            return [{"role": "user", "content": content}, *rest[1:]]
        return [{"role": "user", "content": system["content"]}, *rest]

    def _rendered(self, conversations: Sequence[list[Message]], **options: Any) -> tuple[list[str], list[list[Span]]]:
        """transformers declares a text and returns two lists."""
        rendered: Any = render_jinja_template(
            conversations=list(conversations), chat_template=self.text, **options, **self.variables
        )
        return rendered


def template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The tokenizer's chat template, in TRL's training version where there is one; None when it has none.

    Raises:
        Problems: it fails on a question and its answer, or does not write them.
    """
    if not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.get_chat_template()
        if not _MARKED.search(text):
            text = _training_version(text) or text
        template = _probed(ChatTemplate(text, dict(tokenizer.special_tokens_map)))
    except TEMPLATE_ERRORS as error:
        template, reason = None, str(error)
    else:
        reason = "it does not write the text of messages"
    if template is None:
        raise Problems([f"SFT_CHAT_TEMPLATE=: the chat template cannot be used ({reason}); name another or repair it"])
    return template


def _probed(template: ChatTemplate) -> ChatTemplate | None:
    """None when the answer is not in the text: templates for images want lists of parts."""
    answer = PROBE[1]["content"]
    (whole,), (asked,), (prompt,) = (
        template.render([PROBE]),
        template.render([PROBE[:1]]),
        template.render([PROBE[:1]], prompt=True),
    )
    before, found, ending = whole.rpartition(answer)
    if not found:
        return None
    template = replace(template, opening=prompt[shared(asked, prompt) :], ending=ending)
    spans = template.render_marked([PROBE])[0][1] if _MARKED.search(template.text) else []
    if len(spans) == 1 and answer + template.closing in whole[slice(*spans[0])]:
        template = replace(template, marked=True, lead=whole[spans[0][0] : shared(before, prompt)])
    return replace(template, takes_system=_takes_system(template))


def _takes_system(template: ChatTemplate) -> bool:
    try:
        return _SYSTEM["content"] in template.render([[_SYSTEM, *PROBE]])[0]
    except TEMPLATE_ERRORS:
        return False


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
_CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{ message['content'] + '<|im_end|>' }}{{ '' if eos_token == '<|im_end|>' else eos_token }}{{ '\\n' }}
{%- endgeneration -%}
{%- else -%}
{{ message['content'] + '<|im_end|>\\n' }}
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

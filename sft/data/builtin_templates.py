"""Built-in chat templates for tokenizers that have none, with marks around what the assistant writes."""

from pathlib import Path

from sft.errors import Problems

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
_SYSTEM = """\
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
"""

_LLAMA2 = (
    _SYSTEM
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
    _SYSTEM
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
    _SYSTEM
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

BUILT_IN = {"chatml": _CHATML, "llama2": _LLAMA2, "alpaca": _ALPACA, "mistral": _MISTRAL}


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
        known = ", ".join(BUILT_IN)
        raise Problems([f"SFT_CHAT_TEMPLATE={name}: neither {known} nor a readable .jinja file ({error})"]) from error

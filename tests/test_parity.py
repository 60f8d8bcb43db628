"""Parity: the prompt a row is trained behind and the prompt a server asks with, token for token."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft.data.labels.label import label
from sft.data.labels.parity import Parity, compare_prompts
from sft.data.sources.load import load_source
from sft.settings import Source
from tests.conftest import CHATML, VOCABULARY, byte_tokenizer, word_tokenizer

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One"}]
# Qwen 3's habits: a think block in the last turn only, and one that is supplied where thinking is off.
BLOCK = "<think>\n\n</think>\n\n"
LAST = "{% if loop.last and message.role == 'assistant' %}" + BLOCK + "{% endif %}"
OFF = "{% if enable_thinking is defined and not enable_thinking %}" + BLOCK + "{% endif %}"
THINKING = CHATML.replace("{{ message['content'] }}", LAST + "{{ message['content'] }}").replace(
    "assistant\n{% endif %}", "assistant\n" + OFF + "{% endif %}"
)
WORDS = (*VOCABULARY, "<", "think", ">", " </", "/", "</")


@pytest.fixture
def compared(tmp_path: Path, make_settings: Any) -> Any:
    """The parity of rows with these messages."""

    def compare(tokenizer: Any, *chats: list[dict[str, str]], **settings: Any) -> Parity:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
        rows = label(load_source(Source(id=str(path))), tokenizer, make_settings(**settings))
        return compare_prompts(rows.dataset, tokenizer, make_settings(**settings))

    return compare


def test_equal_prompts_are_counted(compared: Any):
    """One and two exchanges, a system message; a greeting has no prompt."""
    system = [{"role": "system", "content": "Plan"}]
    assert compared(word_tokenizer(), HELLO, HELLO + HELLO, system + HELLO, HELLO[1:]) == Parity(3)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_a_think_block_is_the_answers_or_the_prompts(compared: Any, options: dict[str, Any]):
    """Either way the tokens are those a server makes; with thinking off, the block is no longer trained."""
    assert compared(word_tokenizer(THINKING, words=WORDS), HELLO, HELLO + HELLO, template_options=options) == Parity(2)


def test_a_prompt_that_supplies_what_rows_lack_is_shown(compared: Any):
    """DeepSeek's and Nemotron's templates open a think block that rows without reasoning never close."""
    found = compared(word_tokenizer(CHATML.replace("assistant\n{%", "assistant\nPlan{%")), HELLO, HELLO)
    assert found.compared == 1
    assert "row 1: trained behind" in found.difference
    assert "assistant\\n[One<|im_end|>\\n]', a server asks with" in found.difference
    assert "assistant\\n[Plan]'; give the rows their reasoning, or set SFT_TEMPLATE_OPTIONS" in found.difference


def test_history_that_is_written_otherwise_once_an_answer_follows_is_shown(compared: Any):
    """Here the system message is only there while a server asks."""
    odd = "{% if messages[-1].role == 'user' %}Plan{% endif %}" + CHATML
    assert "repair it or name another" in compared(word_tokenizer(odd), HELLO).difference


def joining_tokenizer(template: str) -> Any:
    """Byte-level BPE that has learnt the token "\\n<" and splits nowhere beforehand but between words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\w+|[^\w]+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bare.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(["x\n<y"] * 50, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = template
    return fast


def test_an_answer_that_would_melt_into_the_prompt_begins_behind_it(tmp_path: Path, compared: Any, make_settings: Any):
    """Of "assistant" with a line break and "<a>" the break is the prompt's and not trained; "<" is a token of its own,
    as the model says it, and a server encodes the same prompt. Earlier answers begin like that as well, which a server
    that encodes its history in one piece does not: that is shown."""
    tokenizer = joining_tokenizer(CHATML)
    assert "\n<" in [tokenizer.decode([token]) for token in range(len(tokenizer))]
    row = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<a>1</a>"}]
    assert compared(tokenizer, row) == Parity(1)
    assert "joins the end of the prompt with the beginning of the answer" in compared(tokenizer, row + row).difference
    rows = label(load_source(Source(id=str(tmp_path / "rows.jsonl"))), tokenizer, make_settings())
    (both,) = rows.dataset
    before = tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer("<a>1</a><|im_end|>")["input_ids"]
    between = tokenizer("\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    end = tokenizer("\n")["input_ids"]
    assert [tokenizer.decode([token]) for token in answer] == ["<", "a", ">", "1", "<", "/", "a", ">", "<|im_end|>"]
    assert both["input_ids"] == [*before, *answer, *between, *answer, *end]
    masked = [[-100] * len(part) for part in (before, between, end)]
    assert both["labels"] == [*masked[0], *answer, *masked[1], *answer, *masked[2]]


def test_an_answer_that_melts_into_the_prompt_elsewhere_is_shown(compared: Any):
    """A tokenizer that puts a space before whatever it encodes would make another text of the parts."""
    from tokenizers import pre_tokenizers

    tokenizer = joining_tokenizer(CHATML)
    spaced = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = spaced
    row = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<a>1</a>"}]
    found = compared(tokenizer, row)
    assert "joins the end of the prompt with the beginning of the answer" in found.difference


@pytest.mark.parametrize("trim", [False, True])
def test_think_blocks_that_the_prompt_supplies_do_not_melt_into_answers(trim: bool, compared: Any):
    """GPT-2's tokenizers split line breaks otherwise at the end of a text than before a word."""
    tokenizer = byte_tokenizer(THINKING, trim_offsets=trim)
    assert compared(tokenizer, HELLO, template_options={"enable_thinking": False}) == Parity(1)

"""Words that were met before are looked up: the tokens of the tokenizers library, and its answers about characters."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from sft.data.labels import words
from sft.data.labels.tokens import FastEncoded, KnownEncoded, encoder
from sft.data.labels.words import words_of
from tests.conftest import byte_tokenizer, word_tokenizer

_NOT_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTTERS: dict[str, Any] = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "single digits": pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]),
    **{
        pattern: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _NOT_GPT2])
        for pattern in words._SPLITS
    },
}  # fmt: skip
PARTS = (
    "<|im_start|>", "<|im_end|>", "<tool_call>", "<tool", "One", " one", "user\n", "'s", "'S", "'re", "n't", "12", "3",
    "1234567", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x1c", "\x00", "\x7f", "_", "--", '{"a": [1,',
    "!", "THE", " the", " JSON", " with", "é", "東京", "<", "|",
)  # fmt: skip


def texts(count: int) -> list[str]:
    """Pieces of texts, and signs one by one."""
    chance = random.Random(0)
    letters = [*map(chr, range(128)), " ", "\n", *"output the"]
    return [
        "".join(chance.choices(letters if number % 3 else PARTS, k=chance.randint(0, 20))) for number in range(count)
    ]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("cutter", CUTTERS)
def test_tokens_and_borders_are_the_librarys(cutter: str, trim_offsets: bool):
    """Odd texts, in which a token of an unusual kind is left to the library."""
    backend = byte_tokenizer(trim_offsets=trim_offsets).backend_tokenizer
    backend.pre_tokenizer, backend.normalizer = CUTTERS[cutter], normalizers.NFC()
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<tool", lstrip=True)])
    known = words_of(backend)
    assert known is not None
    alike = 0
    for text in texts(900):
        ids, said = known.ids(text), FastEncoded(text, backend.encode(text, add_special_tokens=False))
        if ids is None:
            assert not text.isascii() or "<tool" in text
            continue
        ours = KnownEncoded(text, ids, known.sizes, backend)
        assert ids == said.ids, text
        for char in range(len(text) + 1):
            assert ours.first(char) == said.first(char), (text, char)
            assert ours.end(char) == said.end(char), (text, char)
            assert ours.crosses(char) == said.crosses(char), (text, char)
        assert ours.offsets() == said.offsets()
        alike += 1
    assert alike > 500


def test_words_are_forgotten_when_there_are_too_many(monkeypatch: Any):
    """Memory is bounded; tokens added to the vocabulary stay, and words come back."""
    monkeypatch.setattr(words, "_MOST_WORDS", 8)
    backend = byte_tokenizer().backend_tokenizer
    known = words_of(backend)
    assert known is not None
    for text in [f"<|im_start|>word {chr(97 + number % 26)}{number} <|im_end|>" for number in range(60)] * 2:
        assert known.ids(text) == backend.encode(text, add_special_tokens=False).ids
        assert len(known._known) <= 8


def test_words_without_tokens_are_left_to_the_library():
    """A vocabulary that lacks a byte: the library drops it, and its characters belong to no token."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = CUTTERS["gpt2"]
    known = words_of(backend)
    assert known is not None
    assert (known.ids("ab"), known.ids("abc")) == ([0, 1], None)


@pytest.mark.parametrize("what", ["prefix", "dropout", "cutter", "normalizer"])
def test_tokenizers_of_other_kinds_are_not_looked_up(what: str):
    """What joins, cuts or normalizes text in another way is the library's."""
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    if what == "prefix":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif what == "dropout":
        backend.model.dropout = 0.5
    elif what == "cutter":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), _NOT_GPT2])
    else:
        backend.normalizer = normalizers.Lowercase()
    assert words_of(backend) is None


def test_an_encoder_of_known_words_mixes_both():
    """Texts keep their order whichever answers; a tokenizer of words is the library's alone."""
    tokenizer = byte_tokenizer()
    rows = ["One", "東京", " two", "é", ""]
    encode = encoder(tokenizer, known=True)
    assert all(isinstance(each, FastEncoded) for each in encode(rows))  # the first time the library is asked too
    known = encode(rows)
    assert [each.ids for each in known] == [each.ids for each in encoder(tokenizer)(rows)]
    assert [isinstance(each, KnownEncoded) for each in known] == [True, False, True, False, True]
    assert isinstance(encoder(word_tokenizer(), known=True)(["One"])[0], FastEncoded)


def test_words_that_the_library_cuts_otherwise_are_not_believed(monkeypatch: Any):
    """A library that changes how it cuts: the first texts say so, and its tokens are taken."""
    monkeypatch.setattr(words, "_GPT2", words._GPT2.replace(r" ?\p{L}+", r"\p{L}+"))
    tokenizer = byte_tokenizer()
    encode = encoder(tokenizer, known=True)
    for rows in (["東京"], ["One the"], ["One the"]):
        assert [each.ids for each in encode(rows)] == [each.ids for each in encoder(tokenizer)(rows)]
        assert all(isinstance(each, FastEncoded) for each in encode(rows))

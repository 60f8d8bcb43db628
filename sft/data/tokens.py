"""Text -> token ids, and which token a character belongs to: by the fast tokenizer's offsets, or by prefixes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase


class Encoded(Protocol):
    """Token ids of one text and the way from its characters to them."""

    ids: list[int]

    def first(self, char: int) -> int:
        """Number of the first token that begins at `char` or later, or whose characters before it are white space."""

    def end(self, char: int) -> int:
        """Number after the last token that ends at `char` or earlier."""

    def offsets(self) -> Sequence[tuple[int, int]]:
        """Characters (start, end) of every token."""


class FastEncoded:
    """An encoding of the tokenizers library. Offsets are asked for one by one: most are never needed."""

    def __init__(self, text: str, encoding: tokenizers.Encoding) -> None:
        self.text, self.encoding, self.ids = text, encoding, encoding.ids

    def first(self, char: int) -> int:
        token = bisect_left(range(len(self.ids)), char, key=self._begin) if char else 0
        return token - 1 if token and self._joins_space(token - 1, char) else token

    def end(self, char: int) -> int:
        return bisect_right(range(len(self.ids)), char, key=lambda token: self._span(token)[1])

    def offsets(self) -> Sequence[tuple[int, int]]:
        return self.encoding.offsets

    def _begin(self, token: int) -> int:
        """Spaces whose offsets were trimmed away (GPT-2, Llama 3) stand empty behind themselves."""
        start, end = self._span(token)
        return start if start < end else start - 1

    def _joins_space(self, token: int, char: int) -> bool:
        """Whether this token is the word at `char` and only white space before it ("▁word")."""
        start, end = self._span(token)
        return start < char < end and not self.text[start:char].strip() and bool(self.text[char:end].strip())

    def _span(self, token: int) -> tuple[int, int]:
        return self.encoding.token_to_chars(token) or (0, 0)


class SlowEncoded:
    """A tokenizer without offsets: a character's token is found by encoding the text up to it."""

    def __init__(self, text: str, encode: Callable[[str], list[int]]) -> None:
        self.text, self.encode, self.ids = text, encode, encode(text)

    def first(self, char: int) -> int:
        before = self.encode(self.text[:char])
        pairs = zip(before, self.ids, strict=False)
        return next((token for token, (ours, theirs) in enumerate(pairs) if ours != theirs), len(before))

    end = first

    def offsets(self) -> Sequence[tuple[int, int]]:
        borders = [0, *(self._reach(token) for token in range(1, len(self.ids))), len(self.text)]
        return list(pairwise(borders))

    def _reach(self, token: int) -> int:
        """The shortest prefix of the text that yields `token` tokens of the whole."""
        return bisect_left(range(len(self.text)), token, key=self.first)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], Sequence[Encoded]]:
    """A function from texts to encodings, without the special tokens the tokenizer would add around them.

    A fast tokenizer encodes a batch on all cores in one call; it holds no lock of Python's while it does.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if not tokenizer.is_fast or not _same_as_backend(tokenizer, encode):
        return lambda texts: [SlowEncoded(text, encode) for text in texts]
    backend = tokenizer.backend_tokenizer

    def encode_batch(texts: list[str]) -> Sequence[Encoded]:
        return [
            FastEncoded(*pair)
            for pair in zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True)
        ]

    return encode_batch


def _same_as_backend(tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], list[int]]) -> bool:
    """Whether the tokenizer's class adds nothing of its own to what its backend does."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    probe = '  Ping?\n\nPong: {"a": [1, 2]} 東京 <|im_end|>\n' + (tokenizer.eos_token or "")
    return encode(probe) == backend.encode(probe, add_special_tokens=False).ids

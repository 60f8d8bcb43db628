"""Tokens of ASCII text from words that were met before. The tokenizers library cuts a text into words and joins the
bytes of each by itself; it spends most of its time around that, and texts say the same words again and again."""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# How byte-level tokenizers cut words, as their files say it: GPT-2's way, and that of Llama 3 and Qwen.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = (_LATER % "", _LATER % "{1,3}")
# Where digits are taken out first, one by one, a digit is an end of text to the words around it.
_SINGLE_DIGITS = _GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
_MOST_WORDS = 1 << 15  # some 8 MB
_LONGEST = 64  # characters of a word that is kept: longer ones seldom come again


class Words:
    """The tokens of a byte-level BPE tokenizer, where a text is ASCII and holds no added token of a special kind."""

    def __init__(self, backend: tokenizers.Tokenizer, pattern: str) -> None:
        added = {number: token for number, token in backend.get_added_tokens_decoder().items() if token.content}
        plain: list[str] = []
        others: list[str] = []
        for token in added.values():
            special = token.lstrip or token.rstrip or token.single_word or token.normalized
            (others if special else plain).append(token.content)
        self.sizes = {number: len(token.content) for number, token in added.items()}  # characters of each token
        self._known = _Known(backend, self.sizes, {token.content: (number,) for number, token in added.items()})
        self._split = re.compile(f"({_any_of(plain)})").split
        self._find = re.compile(_ascii(pattern), re.ASCII).findall
        self._foreign = re.compile(_any_of(others)).search if others else None

    def ids(self, text: str) -> list[int] | None:
        """The ids of a text; None where the library has to say."""
        if not text.isascii() or (self._foreign and self._foreign(text)):
            return None
        words: list[str] = []
        for number, part in enumerate(self._split(text)):
            if number % 2:  # an added token
                words.append(part)
            else:
                words += self._find(part)
        try:
            return list(chain.from_iterable(map(self._known.__getitem__, words)))
        except KeyError:
            return None


class _Known(dict[str, tuple[int, ...]]):
    """Words and their tokens; one that is not there is asked for. Raises KeyError for words without tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, sizes: dict[int, int], added: dict[str, tuple[int, ...]]) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        super().__init__(added)
        self._model, self._sizes, self._added = backend.model, sizes, added
        self._bytes = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str

    def __missing__(self, word: str) -> tuple[int, ...]:
        ((signs, _),) = self._bytes(word)
        tokens = self._model.tokenize(signs)
        if "".join(token.value for token in tokens) != signs:
            raise KeyError(word)
        self._sizes.update((token.id, len(token.value)) for token in tokens)
        ids = tuple(token.id for token in tokens)
        if len(word) <= _LONGEST:
            if len(self) >= _MOST_WORDS:
                self.clear()
                self.update(self._added)
            self[word] = ids
        return ids


def words_of(backend: tokenizers.Tokenizer) -> Words | None:
    """None for a tokenizer that is not known to cut and join text in one of these ways."""
    from tokenizers.models import BPE

    model = backend.model
    joins = isinstance(model, BPE) and not (
        model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix or backend.encode_special_tokens
    )
    pattern = _pattern(_said(backend.pre_tokenizer)) if joins and _keeps_ascii(_said(backend.normalizer)) else None
    return Words(backend, pattern) if pattern else None


def _pattern(cutter: dict[str, Any]) -> str | None:
    """What words are to a pre-tokenizer."""
    *before, last = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        return _GPT2 if last["use_regex"] else None
    (first,) = before
    if first["type"] == "Digits" and first["individual_digits"]:
        return _SINGLE_DIGITS if last["use_regex"] else None
    if first["type"] != "Split" or last["use_regex"] or first["behavior"] != "Isolated" or first["invert"]:
        return None
    return next((pattern for pattern in _SPLITS if first["pattern"] == {"Regex": pattern}), None)


def _keeps_ascii(normalizer: dict[str, Any]) -> bool:
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    return all(step.get("type") in (None, "NFC", "NFD", "NFKC", "NFKD") for step in steps)


def _said(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file has it; {} for none."""
    return json.loads(part.__getstate__()) if part else {}


def _ascii(pattern: str) -> str:
    r"""The pattern for ASCII alone. `\s` is the same there, and so is the order in which branches are tried."""
    inside = pattern.replace(r"\p{L}\p{N}]", "A-Za-z0-9]").replace(r"[^\s\p{N}]", r"[^\s0-9]")
    return inside.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")


def _any_of(texts: list[str]) -> str:
    """The longest of those that begin at a place, as the library takes them."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"

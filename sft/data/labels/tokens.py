"""Text -> token ids, and which token a character belongs to: by the fast tokenizer's offsets, or by prefixes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sft.data.labels.words import words_of

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase


class PlainEnds(NamedTuple):
    """Marks around plain text: BOS where the tokenizer adds it ("" where not), EOS, whether it adds that by itself."""

    bos: str = ""
    eos: str = ""
    eos_added: bool = False


NO_ENDS = PlainEnds()


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
    """An encoding of the tokenizers library. It is asked for single characters: all offsets are never needed."""

    def __init__(self, text: str, encoding: tokenizers.Encoding) -> None:
        self.text, self.encoding, self.ids = text, encoding, encoding.ids

    def first(self, char: int) -> int:
        if char == 0:  # behind what the tokenizer adds to a text, such as BOS
            return next((token for token, added in enumerate(self.encoding.special_tokens_mask) if not added), 0)
        token = self._containing(char)
        start, end = self._span(token)
        if start >= char:
            return token
        word_behind_space = not self.text[start:char].strip() and bool(self.text[char:end].strip())
        return token if word_behind_space else token + 1

    def end(self, char: int) -> int:
        return self._containing(char)

    def offsets(self) -> Sequence[tuple[int, int]]:
        return self.encoding.offsets

    def crosses(self, char: int) -> bool:
        """Whether one token holds this character and the one before it."""
        return 0 < char < len(self.text) and self._containing(char - 1) == self._containing(char)

    def _containing(self, char: int) -> int:
        """The first token that ends behind `char`: it contains it, or the characters before it belong to no token."""
        token = self.encoding.char_to_token(char)
        if token is None:
            token = bisect_right(range(len(self.ids)), char, key=lambda number: self._span(number)[1])
        return token

    def _span(self, token: int) -> tuple[int, int]:
        """Spaces whose offsets are trimmed away (GPT-2, Llama 3) stand empty behind themselves."""
        behind = len(self.text), len(self.text)
        return self.encoding.token_to_chars(token) or (0, 0) if token < len(self.ids) else behind


class KnownEncoded:
    """A text of words that were met before. Where a question goes into a token with spaces at its border, which some
    tokenizers leave out of its offsets, the library answers, as it does for all offsets."""

    def __init__(self, text: str, ids: list[int], sizes: Mapping[int, int], backend: tokenizers.Tokenizer) -> None:
        self.text, self.ids, self._sizes, self._backend = text, ids, sizes, backend

    def first(self, char: int) -> int:
        if char == 0:
            return 0
        token, start = self._containing(char)
        if token is None or (start < char and self.text[start] == " "):
            return self._asked.first(char)
        return token if start >= char else self._behind(token, start, char)

    def end(self, char: int) -> int:
        token, _ = self._containing(char)
        return self._asked.end(char) if token is None else token

    def offsets(self) -> Sequence[tuple[int, int]]:
        return self._asked.offsets()

    def crosses(self, char: int) -> bool:
        """Whether one token holds this character and the one before it."""
        return 0 < char < len(self.text) and self.end(char - 1) == self.end(char)

    def _behind(self, token: int, start: int, char: int) -> int:
        """The token after this one, unless only white space of it is before the character."""
        blank = self.text[start:char].isspace() and bool(self.text[char : self._ends[token]].strip())
        return token if blank else token + 1

    def _containing(self, char: int) -> tuple[int | None, int]:
        """The token with this character and where it begins; None where it ends with a space."""
        token = bisect_right(self._ends, char)
        if token == len(self.ids):
            return token, len(self.text)
        end = self._ends[token]
        return None if self.text[end - 1] == " " else token, self._ends[token - 1] if token else 0

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(self._sizes.__getitem__, self.ids)))

    @cached_property
    def _asked(self) -> FastEncoded:
        return FastEncoded(self.text, self._backend.encode(self.text, add_special_tokens=False))


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


class PartedEncoded:
    """A text whose two parts are encoded each by itself, so that no token stands in both."""

    def __init__(self, before: Encoded, behind: Encoded, border: int) -> None:
        self.before, self.behind, self.border = before, behind, border
        self.ids = [*before.ids, *behind.ids]

    def first(self, char: int) -> int:
        if char < self.border:
            return self.before.first(char)
        return len(self.before.ids) + self.behind.first(char - self.border)

    def end(self, char: int) -> int:
        if char <= self.border:
            return self.before.end(char)
        return len(self.before.ids) + self.behind.end(char - self.border)

    def offsets(self) -> Sequence[tuple[int, int]]:
        shifted = [(start + self.border, end + self.border) for start, end in self.behind.offsets()]
        return [*self.before.offsets(), *shifted]


class PromptBorder:
    """Encodings in which a prompt that ends with `opening` and the answer behind it share no token.

    A server encodes the prompt alone and the model goes on behind it: a token "\\n<" of the prompt's line break and the
    answer's first sign is none it could ever say. Where the parts mean another text (tokenizers that put a space before
    whatever they encode) the encoding stays as it is.
    """

    def __init__(
        self, opening: str, encode: Callable[[list[str]], Sequence[Encoded]], decode: Callable[[list[int]], str]
    ) -> None:
        self.encode, self.decode = encode, decode
        alone, followed = (encoded.ids for encoded in encode([opening, f"{opening}One"]))
        # GPT-2's tokenizers split two line breaks otherwise at the end of a text than before a word.
        self.always = followed[: len(alone)] != alone

    def kept(self, encodings: Sequence[Encoded], borders: Sequence[Sequence[int]]) -> list[Encoded]:
        """`borders`: of each text, where answers begin that are to be kept apart from what is before them, in order."""
        found = list(encodings)
        for row, (whole, starts) in enumerate(zip(encodings, borders, strict=True)):
            if starts and isinstance(whole, FastEncoded | KnownEncoded):
                crossed = [start for start in starts if start < len(whole.text)]
                crossed = crossed if self.always else [start for start in crossed if whole.crosses(start)]
                found[row] = self._parted(whole, crossed) if crossed else whole
        return found

    def _parted(self, whole: FastEncoded | KnownEncoded, borders: Sequence[int]) -> Encoded:
        places = [0, *borders, len(whole.text)]
        *before, parted = self.encode([whole.text[start:end] for start, end in pairwise(places)])
        for part, (start, end) in zip(reversed(before), reversed(list(pairwise(places[:-1]))), strict=True):
            parted = PartedEncoded(part, parted, end - start)
        return parted if self.decode(parted.ids) == self.decode(whole.ids) else whole


def encoder(
    tokenizer: PreTrainedTokenizerBase, *, special: bool = False, known: bool = False
) -> Callable[[list[str]], Sequence[Encoded]]:
    """A function from texts to encodings; with `special` the tokenizer adds what it adds to any text, such as BOS.

    A fast tokenizer encodes a batch on all cores in one call; it holds no lock of Python's while it does. With `known`
    words that were met are looked up: the same tokens in a third of the time of one core.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    if not tokenizer.is_fast or not _same_as_backend(tokenizer, encode, special=special):
        return lambda texts: [SlowEncoded(text, encode) for text in texts]
    backend = tokenizer.backend_tokenizer

    def encode_batch(texts: list[str]) -> list[Encoded]:
        return [
            FastEncoded(*pair)
            for pair in zip(texts, backend.encode_batch(texts, add_special_tokens=special), strict=True)
        ]

    words = words_of(backend) if known and not special else None
    if words is None:
        return encode_batch

    believed: bool | None = None  # the library is asked too until it has agreed about the first texts

    def encode_known(texts: list[str]) -> Sequence[Encoded]:
        nonlocal believed
        if believed is False:
            return encode_batch(texts)
        found = [words.ids(text) for text in texts]
        if believed is None:
            asked = encode_batch(texts)
            said = [ids == one.ids for ids, one in zip(found, asked, strict=True) if ids is not None]
            believed = all(said) if said else None
            return asked
        left = iter(encode_batch([text for text, ids in zip(texts, found, strict=True) if ids is None]))
        return [
            next(left) if ids is None else KnownEncoded(text, ids, words.sizes, backend)
            for text, ids in zip(texts, found, strict=True)
        ]

    return encode_known


def plain_ends(tokenizer: PreTrainedTokenizerBase) -> PlainEnds:
    """What stands around plain text, seen from what the tokenizer makes of a letter."""
    ids = tokenizer("x")["input_ids"]
    bos = str(tokenizer.bos_token) if ids[:1] == [tokenizer.bos_token_id] else ""
    return PlainEnds(bos, tokenizer.eos_token or "", ids[-1:] == [tokenizer.eos_token_id])


# Characters a token has at most, on average over a row: more than in any language, less than in a run of spaces.
_CHARACTERS = 64


def encode_up_to(
    encode: Callable[[list[str]], Sequence[Encoded]], texts: Sequence[str], most: int
) -> Sequence[Encoded]:
    """Encodings of the texts; of those that are far too long only the beginning, which has more than `most` tokens
    too. Encoding 10 MB takes ten seconds, and of such a row no more than `most` tokens are ever used."""
    limit = _CHARACTERS * (most + 64)
    parts = [text if len(text) <= 2 * limit else text[:limit] for text in texts]
    encodings = list(encode(parts))
    for row, (text, part) in enumerate(zip(texts, parts, strict=True)):
        if len(part) < len(text) and len(encodings[row].ids) <= most + 1:
            (encodings[row],) = encode([text])
    return encodings


def _same_as_backend(tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], list[int]], *, special: bool) -> bool:
    """Whether the tokenizer's class adds nothing of its own to what its backend does."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    probe = '  Ping?\n\nPong: {"a": [1, 2]} 東京 <|im_end|>\n' + (tokenizer.eos_token or "")
    return encode(probe) == backend.encode(probe, add_special_tokens=special).ids

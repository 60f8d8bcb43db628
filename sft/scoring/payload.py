"""Where the payload of an answer begins and ends: code marks, code fence, output marker, or the whole text."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from sft.scoring.formats import FORMATS, SPELLINGS

DEFAULT_MARKERS = ("Output:", "OUTPUT:", "Final:", "Answer:", "Result:", "Response:")
# A million characters are some 250,000 tokens: nothing a model says on purpose, so nothing worth reading.
MAX_ANSWER = 1_000_000

_THOUGHT = "</think>"
_BEGIN_CODE = re.compile(r"<\|BEGIN_CODE\|>", re.IGNORECASE)
_END_CODE = re.compile(r"<\|END_CODE\|>", re.IGNORECASE)
# A fence opens at the start of a line (of a list item too) or after a colon ("Output: ```json"), so that back-ticks
# within a string of the payload do not open one; within a line only where it names a format. Its closing line is
# optional, as in StructEval.
_FENCE = re.compile(
    r"(?:^(?:[ \t]*(?:[-*+]|\d{1,3}[.)]))?|:|(?<=</think>))[ \t]*```[^`\n]*\n"
    rf"|```(?:{'|'.join((*FORMATS, *SPELLINGS))})[ \t]*\n",
    re.MULTILINE | re.IGNORECASE,
)
_FENCE_END = re.compile(r"^[ \t]*```[ \t]*$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\A(?:[ \t\r]*\n)+")


class Payload(NamedTuple):
    """The part of an answer that should parse, and what stands around it (code marks and fences left out)."""

    text: str
    before: str = ""
    after: str = ""
    fenced: bool = False


def without_thinking(answer: str) -> str:
    """The answer after its last `</think>`: reasoning of a thinking model is no part of what is scored."""
    return answer.rpartition(_THOUGHT)[2]


def payload_spans(answer: str, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where the payload may stand from character `start` on, the likeliest place first: between code marks, in the
    first code fence (to its closing line, to any three back-ticks), or all the rest."""
    start = max(start, answer.rfind(_THOUGHT) + len(_THOUGHT)) if _THOUGHT in answer else start
    if begin := _BEGIN_CODE.search(answer, start):
        end = _END_CODE.search(answer, begin.end())
        yield begin.end(), end.start() if end else len(answer)
    if begin := _FENCE.search(answer, start):
        if end := _FENCE_END.search(answer, begin.end()):
            yield begin.end(), end.start()
        ticks = answer.find("```", begin.end())
        yield begin.end(), ticks if ticks >= 0 else len(answer)
    yield start, len(answer)


def whole(answer: str) -> Payload:
    """The whole answer as payload."""
    return Payload(_trimmed(without_thinking(answer)))


def find_payload(answer: str, markers: Sequence[str] = DEFAULT_MARKERS) -> Payload:
    """The payload by its surroundings.

    In this order (StructEval's, with the output marker added): between `<|BEGIN_CODE|>` and `<|END_CODE|>`, within the
    first code fence, after the first output marker, the whole text. A marker counts at the start of a line or after
    plain words on it, never within quotes or brackets, where it belongs to a value.
    """
    text = without_thinking(answer)
    start, end = next(payload_spans(text))
    if begin := _BEGIN_CODE.search(text):
        if text[start:end].lstrip().startswith("```"):
            start, end = next(payload_spans(text[:end], start))
    elif not (begin := _FENCE.search(text)):
        if marker := _marker_pattern(tuple(markers)).search(text):
            return Payload(_trimmed(text[marker.end() :].lstrip(" \t")), before=text[: marker.end()].strip())
        return whole(text)
    fenced = "```" in text[begin.start() : start]
    before, after = text[: begin.start()], _END_CODE.split(text[end:], maxsplit=1)[-1].strip().removeprefix("```")
    return Payload(_trimmed(text[start:end]), before.strip(), after.strip(), fenced)


def extract_payload(answer: str, markers: Sequence[str] = DEFAULT_MARKERS) -> str:
    """The text of `find_payload`."""
    return find_payload(answer, markers).text


def _trimmed(text: str) -> str:
    """Without blank lines around; the first line keeps its indentation, which YAML needs."""
    return _BLANK_LINES.sub("", text).rstrip()


@lru_cache(maxsize=8)
def _marker_pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(re.escape(marker) for marker in markers if marker)
    return re.compile(rf"^(?:[^\n\"'{{}}\[\]<>=:]*[ \t])?(?:{words or '(?!)'})", re.MULTILINE)

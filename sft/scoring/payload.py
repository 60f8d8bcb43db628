"""Where the payload of an answer begins and ends: code marks, code fence, output marker, or the whole text."""

import re
from collections.abc import Sequence
from functools import lru_cache

DEFAULT_MARKERS = ("Output:", "OUTPUT:", "Final:", "Answer:", "Result:", "Response:")
# A million characters are some 250,000 tokens: nothing a model says on purpose, so nothing worth reading.
MAX_ANSWER = 1_000_000

_BEGIN_CODE = re.compile(r"<\|BEGIN_CODE\|>", re.IGNORECASE)
_END_CODE = re.compile(r"<\|END_CODE\|>", re.IGNORECASE)
# A fence opens at the start of a line or after a colon ("Output: ```json"), so that back-ticks within a string
# of the payload do not open one. Its closing line is optional, as in StructEval.
_FENCE = re.compile(r"(?:^|:)[ \t]*```[^`\n]*\n", re.MULTILINE)
_FENCE_END = re.compile(r"^[ \t]*```[ \t]*$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\A(?:[ \t\r]*\n)+")


def without_thinking(answer: str) -> str:
    """The answer after its last `</think>`: reasoning of a thinking model is no part of what is scored."""
    return answer.rpartition("</think>")[2]


def extract_payload(answer: str, markers: Sequence[str] = DEFAULT_MARKERS) -> str:
    """The part of an answer that should parse.

    In this order (StructEval's, with the output marker added): between `<|BEGIN_CODE|>` and `<|END_CODE|>`, within the
    first code fence, after the first output marker, the whole text. A marker counts at the start of a line or after
    plain words on it, never within quotes or brackets, where it belongs to a value.
    """
    text = without_thinking(answer)
    if begin := _BEGIN_CODE.search(text):
        inside = _END_CODE.split(text[begin.end() :], maxsplit=1)[0]
        return _trimmed(_fenced(inside) if inside.lstrip().startswith("```") else inside)
    if _FENCE.search(text):
        return _trimmed(_fenced(text))
    if marker := _marker_pattern(tuple(markers)).search(text):
        return _trimmed(text[marker.end() :].lstrip(" \t"))
    return _trimmed(text)


def _fenced(text: str) -> str:
    """What stands in the first fence; up to a closing line, else up to any three back-ticks, else to the end."""
    begin = _FENCE.search(text)
    if begin is None:
        return text
    rest = text[begin.end() :]
    end = _FENCE_END.search(rest)
    return rest[: end.start()] if end else rest.partition("```")[0]


def _trimmed(text: str) -> str:
    """Without blank lines around; the first line keeps its indentation, which YAML needs."""
    return _BLANK_LINES.sub("", text).rstrip()


@lru_cache(maxsize=8)
def _marker_pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(re.escape(marker) for marker in markers if marker)
    return re.compile(rf"^(?:[^\n\"'{{}}\[\]<>=:]*[ \t])?(?:{words or '(?!)'})", re.MULTILINE)

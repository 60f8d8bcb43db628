"""What is wrong with an answer, by name: the same words for answers of a model and for answers it is trained on."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sft.scoring.formats import MAX_PAYLOAD, read
from sft.scoring.payload import Payload, find_payload

FAULTS: Mapping[str, str] = {
    "empty": "there is no answer",
    "cut off": "it ended at the limit of new tokens",
    "fence": "it stands in a code fence",
    "preface": "text stands before the payload",
    "text after": "text stands after the payload",
    "other format": "it is written in another format",
    "trailing comma": "a comma before a closing bracket is all that keeps it from parsing",
    "syntax": "it does not parse, for another reason",
    "wrong key": "a key or list item is missing or has another name",
    "wrong type": "a value has another type",
    "wrong value": "a value differs",
    "extra key": "nothing is missing, but there is more",
}
"""Fault -> what it means, in the order in which they are shown."""

# A string, kept, or a comma that nothing follows.
_LAST_COMMA = re.compile(r"(\"(?:[^\"\\\n]|\\.)*+\")|,(?=\s*[}\]])")


def faults_of_form(
    answer: str, payload: Payload, output_format: str, *, parses: bool, other: str | None, cut: bool = False
) -> tuple[str, ...]:
    """The faults of an answer that show without a reference. `other`: the format it is written in instead."""
    if not answer.strip():
        return ("empty", "cut off") if cut else ("empty",)
    found = {
        "empty": not payload.text.strip(),
        "cut off": cut,
        "fence": payload.fenced,
        "preface": bool(payload.before),
        "text after": bool(payload.after),
        "other format": other is not None,
    }
    names = tuple(name for name, there in found.items() if there)
    if parses or other is not None or "empty" in names:
        return names
    return (*names, "trailing comma" if _lacks_only_commas(payload.text, output_format) else "syntax")


def faults_of_extraction(answer: str, scored: Mapping[str, Any], *, cut: bool = False) -> tuple[str, ...]:
    """The faults of an answer that should be a JSON object, from its row of extraction.score_rows."""
    # Braces mark the payload there: text around them has no part in the score, and is no fault.
    payload = find_payload(answer)
    parses = scored["parses"]
    form = faults_of_form(
        answer, Payload(payload.text, fenced=payload.fenced), "json", parses=parses, other=None, cut=cut
    )
    if not parses or scored["score"] in (None, 1.0):
        return form
    return (*form, "wrong value" if scored["schema_ok"] else "wrong key")


def _lacks_only_commas(text: str, output_format: str) -> bool:
    if len(text) > MAX_PAYLOAD:
        return False
    without = _LAST_COMMA.sub(lambda match: match[1] or "", text)
    return without != text and read(without, output_format).strict


def counted(faults: Iterable[Iterable[str]]) -> dict[str, int]:
    """How many answers have each fault, in the order of FAULTS; {} where none has any."""
    counts = Counter(name for answer in faults for name in answer)
    return {name: counts[name] for name in FAULTS if counts[name]}

"""What changed in the answers from one model to another: repaired, broken, both wrong, and in which keys."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sft.scoring.formats import read
from sft.scoring.payload import find_payload, whole
from sft.scoring.significance import Difference, paired_difference
from sft.scoring.structured import comparable, target_format

CHANGES = ("repaired", "broken", "both wrong", "both right")
MISSING = "(missing)"
"""Instead of the value of a key that an answer lacks; None is a value."""


class Key(NamedTuple):
    """A key in which one of two answers is not as wanted; MISSING where there is none."""

    path: str
    wanted: Any
    before: Any
    after: Any


class Change(NamedTuple):
    """One question as two models answered it; `keys` where both answers, and the reference, could be read."""

    kind: str
    task: str
    prompt: str
    reference: str
    before: str
    after: str
    keys: tuple[Key, ...]


def is_right(sample: Mapping[str, Any]) -> bool:
    """Whether an answer is what was wanted: by its content where that was judged, else its score, else its text."""
    if isinstance(sample.get("exact"), bool):
        return sample["exact"]
    if sample.get("score") is not None:
        return sample["score"] >= 1.0
    return str(sample["answer"]).strip() == str(sample["reference"]).strip()


def changes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Of every question how two models answered it.

    Raises:
        ValueError: they were not asked the same.
    """
    asked = [[(each["task"], each["prompt"], each["reference"]) for each in samples] for samples in (before, after)]
    if asked[0] != asked[1]:
        raise ValueError("they were not asked the same questions")
    return [_change(first, second) for first, second in zip(before, after, strict=True)]


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    right = is_right(before), is_right(after)
    kind = {(False, True): "repaired", (True, False): "broken", (False, False): "both wrong"}.get(right, "both right")
    turns = before["prompt"]
    task, wanted, was, now = before["task"] or "", before["reference"], before["answer"], after["answer"]
    keys = () if kind == "both right" else tuple(differing_keys(task, wanted, was, now))
    return Change(kind, task, turns[-1]["content"] if turns else "", wanted, was, now, keys)


def differing_keys(task: str, reference: str, before: str, after: str) -> Iterator[Key]:
    """The keys of the payloads in which an answer is not as wanted, in the order of the reference; [] where the
    reference can't be read. An answer that can't be read lacks all of them."""
    output_format = target_format(task or "") or "json"
    wanted, first, second = (_leaves(text, output_format) for text in (reference, before, after))
    if not wanted:
        return
    for path in dict.fromkeys((*wanted, *first, *second)):
        asked, was, now = (leaves.get(path, MISSING) for leaves in (wanted, first, second))
        if (was, now) != (asked, asked):
            yield Key(path, asked, was, now)


def _leaves(text: str, output_format: str) -> dict[str, Any]:
    for payload in (whole(text), find_payload(text)):
        reading = read(payload.text, output_format)
        if reading.strict:
            return dict(_walk(comparable(reading.value), ""))
    return {}


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _walk(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for number, each in enumerate(value):
            yield from _walk(each, f"{path}[{number}]")
    else:
        yield path, value


def counted(found: Sequence[Change]) -> dict[str, dict[str, int]]:
    """How many questions changed in which way: all of them (""), per output format and per task."""
    groups: dict[str, dict[str, int]] = {}
    for change in found:
        names = dict.fromkeys(["", target_format(change.task) or "", change.task])
        for name in names:
            groups.setdefault(name, dict.fromkeys(CHANGES, 0))[change.kind] += 1
    return dict(sorted(groups.items()))


def score_difference(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Difference | None:
    """How the scores differ, question by question; None where nothing was scored."""
    pairs = [
        (x["score"], y["score"])
        for x, y in zip(before, after, strict=True)
        if x.get("score") is not None and y.get("score") is not None
    ]
    return paired_difference(*zip(*pairs, strict=True)) if pairs else None

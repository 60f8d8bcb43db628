"""What is read of a batch of prompts, and in which passes: beginnings that several have in common are read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

Beginning = tuple[int, ...]
# What a pass costs besides its tokens, in tokens: the weights are read once more. Where a GPU reads them, hundreds of
# tokens go by.
_PASS = {"cpu": 32}
_PASS_OF_A_GPU = 512
_FINEST = 256  # so many rows are divided freely, more in steps: the search is quadratic


class Prompt(NamedTuple):
    """Token ids, of which the first `shared` are another prompt's as well; never all of them."""

    ids: Sequence[int]
    shared: int = 0

    @property
    def beginning(self) -> Beginning:
        return tuple(self.ids[: self.shared])

    @property
    def rest(self) -> int:
        """How many tokens are left to read."""
        return len(self.ids) - self.shared


@dataclass
class _Neighbours:
    """Prompts next to one another in sorted order, from `start` on, with `depth` tokens in common; `chosen`: the
    beginnings (start, end, depth) that save most among them so far, and how many tokens they save."""

    depth: int
    start: int
    saved: int = 0
    chosen: list[tuple[int, int, int]] = field(default_factory=list)

    def take(self, part: _Neighbours | None) -> None:
        if part is not None:
            self.saved += part.saved
            self.chosen += part.chosen

    def close(self, end: int, cost: int) -> None:
        """Either what all have in common is read once, or what was best for the parts stays."""
        together = (end - self.start - 1) * self.depth - cost
        if together > self.saved:
            self.saved, self.chosen = together, [(self.start, end, self.depth)]


def pass_cost(device: str) -> int:
    """Of a kind of device."""
    return _PASS.get(device, _PASS_OF_A_GPU)


def with_beginnings(prompts: Sequence[list[int]], *, cost: int, room: int) -> list[Prompt]:
    """Every prompt with the beginning it shares, such that fewest tokens are read.

    Each prompt has one beginning at most, and its last token is never part of it: what follows is read from there.
    A beginning of beginnings (a template's first words) is left alone; it would save little more.

    Args:
        cost: tokens that a beginning must save to be worth a pass.
        room: beginnings hold no more tokens together than this; the most useful ones stay.
    """
    order = sorted(range(len(prompts)), key=lambda number: prompts[number])
    ids = [prompts[number][:-1] for number in order]
    shared = [0] * len(prompts)
    for start, end, depth in sorted(_beginnings(ids, cost), key=lambda found: (found[0] - found[1]) * found[2]):
        if depth <= room:
            room -= depth
            for number in order[start:end]:
                shared[number] = depth
    return [Prompt(*each) for each in zip(prompts, shared, strict=True)]


def _beginnings(ids: Sequence[Sequence[int]], cost: int) -> list[tuple[int, int, int]]:
    """The beginnings (start, end, depth) of sorted sequences that save most: from the deepest that neighbours have in
    common outwards, as a tree of beginnings is walked."""
    open_: list[_Neighbours] = []
    part: _Neighbours | None = None
    for end in range(1, len(ids) + 1):
        depth = _in_common(ids[end - 1], ids[end]) if end < len(ids) else -1
        start, part = end - 1, None
        while open_ and open_[-1].depth > depth:
            top = open_.pop()
            top.take(part)
            top.close(end, cost)
            start, part = top.start, top
        if not open_ or open_[-1].depth < depth:
            open_.append(_Neighbours(depth, start))
        if open_:
            open_[-1].take(part)
    return part.chosen if part else []


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def groups(lengths: Sequence[int], *, cost: int) -> list[slice]:
    """Neighbours that go together, each padded to the longest of its group, for the least work: rows x longest, and
    `cost` for every group."""
    step = -(-len(lengths) // _FINEST)
    edges = [*range(0, len(lengths), step), len(lengths)] if lengths else [0]
    longest = [max(lengths[start:end]) for start, end in pairwise(edges)]
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(edges)):
        widest, found = 0, []
        for start in range(end - 1, -1, -1):
            widest = max(widest, longest[start])
            found.append((best[start][0] + (edges[end] - edges[start]) * widest + cost, start))
        best.append(min(found))
    parts, end = [], len(edges) - 1
    while end:
        start = best[end][1]
        parts.append(slice(edges[start], edges[end]))
        end = start
    return parts[::-1]

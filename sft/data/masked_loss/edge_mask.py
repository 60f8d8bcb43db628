"""Inverse-frequency masked loss: counts, keep probabilities, draws (Lo et al. 2024, End-to-End Ontology Learning, 3.2).

A unit is one occurrence of an edge in an answer; its characters are those of the edge's child. With n(edge) occurrences
over the training rows and M their mean over the distinct edges, an occurrence is trained with probability min(1, M/n).
Everything here is text and numpy: which tokenizer, how many workers and where a run was resumed make no difference.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sft.data.draws import GAMMA, MASK, splitmix64
from sft.data.masked_loss.units import Unit, readable_edge

MASKED = -100  # the label that torch's cross entropy skips
Ints = NDArray[np.int64]
Ids = NDArray[np.int32]  # edges by number
Redraw = Literal["epoch", "once"]

_TOP_EDGES = 10  # shown; the commonest are the ones that are masked
_ROWS_AT_ONCE = 100_000  # rows whose draws are made together: some 20 MB at ten units a row


def token_spans(
    offsets: Sequence[tuple[int, int]], units: Sequence[Unit], *, shift: int, text: str
) -> tuple[Ints, Ints]:
    """First token and end token (exclusive) of each unit; (0, 0) where a unit has no token of its own.

    `offsets` are the tokens' character spans in the rendered `text`, in reading order; the answer stands at character
    `shift` of it. A token belongs to a unit when all its characters but spaces lie within the child's characters: one
    that also holds punctuation (`",` or `]`) or a newline is never masked, because these never are.
    """
    starts, ends = _trimmed(np.asarray(offsets, dtype=np.int64).reshape(-1, 2), text)
    tokens = np.flatnonzero(starts < ends)
    if not units or not len(tokens):
        return np.zeros(len(units), np.int64), np.zeros(len(units), np.int64)
    spans = np.array([(unit.start, unit.end) for unit in units], dtype=np.int64) + shift
    first = np.searchsorted(starts[tokens], spans[:, 0], side="left")
    last = np.searchsorted(ends[tokens], spans[:, 1], side="right") - 1
    found = first <= last
    return (
        np.where(found, tokens[np.minimum(first, len(tokens) - 1)], 0),
        np.where(found, tokens[np.maximum(last, 0)] + 1, 0),
    )


@dataclass(frozen=True, eq=False)
class EdgeMask:
    """Keep probabilities of all edges of a training set and the draws from them. No state: a draw is a pure function of
    (seed, epoch, row, occurrence), so that workers, ranks, packing and a resume see the same one."""

    edges: tuple[str, ...]
    counts: Ints  # occurrences per edge over the training rows, repeats included
    unit_ids: Ids  # edge of each unit, source row after source row
    offsets: Ints  # the units of source row r are unit_ids[offsets[r]:offsets[r + 1]]
    row_index: Ints  # position in the training set -> source row
    seed: int
    redraw: Redraw = "epoch"

    @classmethod
    def build(
        cls, unit_edges: Iterable[Sequence[str] | None], row_index: ArrayLike, *, seed: int, redraw: Redraw = "epoch"
    ) -> "EdgeMask":
        """Count the edges of the rows in use.

        `unit_edges[r]` are the edges of source row r (None or empty: it has no unit), `row_index[i]` is the source row
        at position i of the training set; a row that is not drawn counts nothing, one drawn three times counts thrice.
        """
        rows = np.asarray(row_index, dtype=np.int64)
        edges, unit_ids, offsets = _interned(unit_edges)
        copies = np.bincount(rows, minlength=len(offsets) - 1)
        units = np.repeat(copies, np.diff(offsets))
        counts = np.bincount(unit_ids, weights=units, minlength=len(edges)).astype(np.int64)
        return cls(edges, counts, unit_ids, offsets, rows, seed, redraw)

    @cached_property
    def mean_count(self) -> float:
        """M: occurrences per distinct edge; 0 where no row has a unit."""
        used = self.counts[self.counts > 0]
        return float(used.mean()) if len(used) else 0.0

    @cached_property
    def keep(self) -> NDArray[np.float64]:
        """min(1, M/n) for each edge."""
        return np.minimum(1.0, self.mean_count / np.maximum(self.counts, 1))

    def ids(self, row: int) -> Ids:
        """The edges of the units of the row at position `row` of the training set, in order of occurrence."""
        source = self.row_index[row]
        return self.unit_ids[self.offsets[source] : self.offsets[source + 1]]

    def draw(self, epoch: int, row: int, ids: Ids) -> NDArray[np.bool_]:
        """True for the occurrences masked in this epoch (counted from 0), for the row at position `row`."""
        return self._masked(self._row_key(epoch, row), np.arange(len(ids), dtype=np.uint64), ids)

    def weights(self, ids: Ids) -> NDArray[np.float32]:
        """The expectation of being trained: the keep probability of each occurrence."""
        return self.keep[ids].astype(np.float32)

    def report(self, epochs: float) -> dict[str, Any]:
        """Figures for `--check`, manifest and report. Of a last epoch that is run in part, that part is counted."""
        total = int(self.counts.sum())
        top = np.argsort(-self.counts, kind="stable")[:_TOP_EDGES]
        return {
            "units": total,
            "distinct_units": int((self.counts > 0).sum()),
            "mean_count": self.mean_count,
            "masked_share": float(self.counts @ (1 - self.keep)) / total if total else 0.0,
            "top": [
                {
                    "edge": readable_edge(self.edges[edge]),
                    "count": int(self.counts[edge]),
                    "keep": float(self.keep[edge]),
                }
                for edge in top
                if self.counts[edge]
            ],
            "trained_at_least_once": {"expected": self._expected(epochs), "drawn": self._drawn(epochs)},
        }

    def _row_key(self, epoch: int, row: Any) -> Any:
        """The 64 bits from which a row's draws follow; for one position or an array of them."""
        key = splitmix64((self.seed & MASK) + GAMMA & MASK) ^ (epoch if self.redraw == "epoch" else 0)
        return splitmix64(splitmix64(key + GAMMA & MASK) + row * GAMMA & MASK)

    def _masked(self, row_keys: Any, occurrences: NDArray[np.uint64], ids: Ids) -> NDArray[np.bool_]:
        bits = splitmix64(row_keys + (occurrences + 1) * GAMMA)
        return (bits >> 11) * 2.0**-53 >= self.keep[ids]

    def _expected(self, epochs: float) -> float:
        if self.redraw == "once":
            return float(self.counts @ self.keep) * min(epochs, 1.0)
        part, whole = math.modf(epochs)
        never = (1 - self.keep) ** whole * (1 - part * self.keep)
        return float(self.counts @ (1 - never))

    def _drawn(self, epochs: float) -> float:
        part, whole = math.modf(epochs)
        never = self._never_trained(math.ceil(epochs))
        return float(never[0] - never[int(whole)] + part * (never[int(whole)] - never[-1]))

    def _never_trained(self, epochs: int) -> Ints:
        """Occurrences masked in every epoch so far, after 0, 1, ... `epochs` of them; only those are drawn again."""
        left = np.zeros(epochs + 1, np.int64)
        for begin in range(0, len(self.row_index), _ROWS_AT_ONCE):
            rows, occurrences, ids = self._occurrences(begin, begin + _ROWS_AT_ONCE)
            left[0] += len(ids)
            for epoch in range(epochs):
                masked = self._masked(self._row_key(epoch, rows), occurrences, ids)
                rows, occurrences, ids = rows[masked], occurrences[masked], ids[masked]
                left[epoch + 1] += len(ids)
        return left

    def _occurrences(self, begin: int, end: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64], Ids]:
        """Position, place in the row and edge of every unit of the training rows begin:end."""
        sources = self.row_index[begin:end]
        lengths = np.diff(self.offsets)[sources]
        rows = np.repeat(np.arange(begin, begin + len(sources), dtype=np.uint64), lengths)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return rows, places.astype(np.uint64), self.unit_ids[np.repeat(self.offsets[sources], lengths) + places]


def masked_labels(labels: ArrayLike, starts: ArrayLike, ends: ArrayLike, masked: ArrayLike) -> Ints:
    """A copy of one row's labels with -100 on the token spans of its masked units. Spans past the end are cut off."""
    chosen = np.asarray(masked, dtype=bool)
    covered = np.array(labels, dtype=np.int64)
    steps = np.zeros(len(covered) + 1, np.int64)
    np.add.at(steps, np.minimum(np.asarray(starts, np.int64)[chosen], len(covered)), 1)
    np.add.at(steps, np.minimum(np.asarray(ends, np.int64)[chosen], len(covered)), -1)
    covered[np.cumsum(steps[:-1]) > 0] = MASKED
    return covered


def token_weights(num_tokens: int, starts: ArrayLike, ends: ArrayLike, weights: ArrayLike) -> NDArray[np.float32]:
    """Loss weight of each label of one row: its unit's weight, 1 outside the units."""
    per_token = np.ones(num_tokens, np.float32)
    first, last = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
    lengths = last - first
    inside = np.repeat(first - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    values = np.repeat(np.asarray(weights, np.float32), lengths)
    per_token[inside[inside < num_tokens]] = values[inside < num_tokens]
    return per_token


def _trimmed(offsets: Ints, text: str) -> tuple[Ints, Ints]:
    """Token spans without the spaces at their borders; empty (start >= end) where there is nothing else."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    solid = np.flatnonzero(~_spaces()[np.minimum(codes, 0xFFFF)])
    if not len(solid):
        return offsets[:, 0], offsets[:, 0]
    first = np.searchsorted(solid, offsets[:, 0], side="left")
    last = np.searchsorted(solid, offsets[:, 1], side="left") - 1
    return solid[np.minimum(first, len(solid) - 1)], np.where(first <= last, solid[last] + 1, 0)


@cache
def _spaces() -> NDArray[np.bool_]:
    """For each character of the basic plane whether it is a space within a line; beyond that plane there are none."""
    return np.array([chr(code).isspace() and chr(code) not in "\r\n" for code in range(0x10000)])


def _interned(rows: Iterable[Sequence[str] | None]) -> tuple[tuple[str, ...], Ids, Ints]:
    """Distinct edges in order of first appearance, the edge of each unit, and where each row's units begin."""
    known: dict[str, int] = {}
    ids = array("i")
    ends = [0]
    for row in rows:
        ids.extend([known.setdefault(edge, len(known)) for edge in row or ()])
        ends.append(len(ids))
    return tuple(known), np.array(ids, dtype=np.int32), np.array(ends, dtype=np.int64)

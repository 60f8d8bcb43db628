"""Which rows are trained on and which are set apart: by content, all copies of a row on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sft.data import draws
from sft.data.draws import Hashes, Indices

VALIDATION = "equal to a validation row"
EARLIER = "a question of an earlier stage"
GENERATION = "a question of SFT_GEN_EVAL_DATASET"


@dataclass(frozen=True)
class Split:
    """Rows of one source, numbered among all rows: those to train on, one of each content set apart, and what is left
    out by reason. `unasked` of those left out are more than the share that was asked to be set apart."""

    train: Indices
    val: Indices
    left_out: Counter[str]
    unasked: int = 0


def first_of_equal(hashes: Hashes, numbers: Indices) -> Indices:
    """Of rows with equal content the first, in order."""
    _, first = np.unique(hashes[numbers], return_index=True)
    return numbers[np.sort(first)]


def splits(
    hashes: Hashes,
    pools: Sequence[Indices],
    *,
    ratio: float,
    seed: int,
    validation: Indices,
    questions: Mapping[str, Hashes],
) -> list[Split]:
    """One split of each pool of rows. No content of `validation`, of another pool's rows set apart or of `questions`
    (contents by who asks them) is in any `train`."""
    held = [pool[draws.validation_rows(hashes[pool], ratio, seed)] for pool in pools]
    secret = np.unique(hashes[np.concatenate([*held, validation])])
    return [_split(hashes, pool, val, secret, questions) for pool, val in zip(pools, held, strict=True)]


def _split(hashes: Hashes, pool: Indices, val: Indices, secret: Hashes, questions: Mapping[str, Hashes]) -> Split:
    left_out: Counter[str] = Counter()
    train = pool
    for reason, contents in {VALIDATION: secret, **questions}.items():
        kept = train[~draws.among(hashes[train], contents)] if len(contents) else train
        lost = len(train) - len(kept) - (len(val) if reason == VALIDATION else 0)
        left_out += Counter({reason: lost})  # adding leaves out what is zero
        train = kept
    return Split(train, val, left_out, left_out.total() - _copies_asked_for(hashes, pool, val))


def _copies_asked_for(hashes: Hashes, pool: Indices, val: Indices) -> int:
    """Copies of the rows set apart that go with them, up to what as many average contents have."""
    if not len(val):
        return 0
    copies = int(draws.among(hashes[pool], hashes[val]).sum()) - len(val)
    if not copies:
        return 0
    average = len(pool) / draws.distinct(hashes[pool])
    return min(copies, int(np.ceil(len(val) * (average - 1))))

"""Which rows, how often: hashes, splits, shares, draws and repeats as pure functions of arrays and a seed."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Floats = NDArray[np.float64]

# What splitmix64 counts by (2^64 over the golden ratio), and the 64 bits it keeps.
GAMMA, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
# Streams of random numbers that must not meet: sources are numbered from 0.
_SHUFFLE = 1 << 40
_UPSAMPLE = 1 << 41


def splitmix64(bits: Any) -> Any:
    """The output function of splitmix64 (Steele, Lea, Flood 2014) for an int or an array of uint64."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
    return bits ^ (bits >> 31)


def scrambled(numbers: Hashes, seed: int) -> Hashes:
    """64 random-looking bits per number, always the same for a number and seed."""
    step = np.uint64(GAMMA)
    bits = numbers ^ (np.array([seed], np.uint64) * step)
    for _ in range(2):
        bits = splitmix64(bits + step)
    return bits


def generator(seed: int, stream: int) -> np.random.Generator:
    """A generator of its own for every seed and stream."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def validation_rows(hashes: Hashes, ratio: float, seed: int) -> Indices:
    """Rows to set apart, in order: one of each of round(contents × ratio) different contents, at least 1, never all.

    Chosen by content: a row keeps its side when rows are added, when its data set appears twice in a mix or in a later
    stage with the same seed.
    """
    # Different contents are scrambled differently: one sort of what comes out counts them and finds the smallest, where
    # telling them apart first and ordering them takes 14 times as long (docs/log.md).
    order = scrambled(hashes, seed)
    different = np.sort(order)
    different = different[_first_of_sorted(different)]
    if ratio <= 0 or len(different) < 2:
        return np.empty(0, np.int64)
    count = min(max(1, round(len(different) * ratio)), len(different) - 1)
    chosen = np.flatnonzero(order <= different[count - 1])
    _, first = np.unique(order[chosen], return_index=True)
    return chosen[np.sort(first)]


def distinct(hashes: Hashes) -> int:
    """How many different ones there are."""
    return int(np.count_nonzero(_first_of_sorted(np.sort(hashes))))


def _first_of_sorted(numbers: Hashes) -> NDArray[np.bool_]:
    """Of equal neighbours the first."""
    first = np.ones(len(numbers), bool)
    np.not_equal(numbers[1:], numbers[:-1], out=first[1:])
    return first


# Places of a table of marks: few of the contents that are looked for share one with another row's.
_MARKS = 1 << 22


def among(hashes: Hashes, contents: Hashes) -> NDArray[np.bool_]:
    """np.isin(hashes, contents) in one pass for hashes, whose lowest bits alone rule nearly all of them out."""
    marks, contents = np.zeros(_MARKS, bool), np.asarray(contents, np.uint64)
    marks[contents & np.uint64(_MARKS - 1)] = True
    found = marks[hashes & np.uint64(_MARKS - 1)]
    maybe = np.flatnonzero(found)
    found[maybe] = np.isin(hashes[maybe], contents)
    return found


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` rows shared out by weight with the largest remainders, so that the sum is exact; ties go to the first."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = sum(exact)
    quotas = [total * weight / whole for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def repeated_size(rows: int, repeat: float) -> int:
    """Rows of a source after `repeat`: at least one where there is any."""
    return max(1, round(rows * repeat)) if rows else 0


def draw(rows: Indices, size: int, count: int, *, seed: int, stream: int, ordered: bool = False) -> Indices:
    """`count` of the rows: each one whole times, the rest a random choice without replacement.

    `size` below the number of rows (a `repeat` under 1) first leaves a random part of them. `ordered` rows come pass
    by pass in ascending order, else in random order.
    """
    shuffled = generator(seed, stream).permutation(rows)[: min(size, len(rows))]
    drawn = np.resize(shuffled, count)
    return drawn[np.lexsort((drawn, np.arange(count) // max(len(shuffled), 1)))] if ordered else drawn


def shuffled(rows: Indices, seed: int) -> Indices:
    """The rows in random order."""
    return generator(seed, _SHUFFLE).permutation(rows)


def matches(rule: str, *, task_key: str, pack: str) -> bool:
    """`pack:X` is the row's pack; anything else the whole task key or one of its parts around `_to_`."""
    kind, colon, name = rule.partition(":")
    if colon and kind == "pack":
        return name.strip() == pack
    return rule == task_key or rule in task_key.split("_to_")


def multiplier(rules: Mapping[str, float], *, task_key: str, pack: str) -> float:
    """The product of the multipliers of the rules that match; 1 without one."""
    factors = [factor for rule, factor in rules.items() if matches(rule, task_key=task_key, pack=pack)]
    return float(np.prod(factors)) if factors else 1.0


def repeats(multipliers: Floats, rows: Indices, *, seed: int) -> Indices:
    """How often each row is kept: floor(m), and once more with probability m - floor(m) by the row's own number.

    A row that stands there several times is decided for each time.
    """
    whole = np.floor(multipliers)
    numbers = rows.astype(np.uint64) + (_occurrence(rows).astype(np.uint64) << np.uint64(44))
    chance = (scrambled(numbers, seed + _UPSAMPLE) >> np.uint64(11)) * 2.0**-53
    return (whole + (chance < multipliers - whole)).astype(np.int64)


def _occurrence(rows: Indices) -> Indices:
    """For each entry, how many equal ones stand before it."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(rows) else np.empty(0, int)
    counts = np.diff(np.append(starts, len(rows)))
    result = np.empty(len(rows), np.int64)
    result[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    return result

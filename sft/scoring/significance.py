"""Is a difference between two models real? Paired bootstrap over the questions that both answered."""

import math
from collections.abc import Sequence
from typing import NamedTuple

DRAWS, LEVEL, SEED = 10_000, 0.95, 3407  # draws: an interval's ends are exact to 3 % of a standard error
FEWEST = 6  # all five of five better is chance in 1 of 16 comparisons of equals
_AT_ONCE = 5_000_000  # drawn numbers held in memory


class Difference(NamedTuple):
    """The mean difference of two models' scores on the same questions, and its 95 % interval."""

    mean: float
    low: float
    high: float
    questions: int
    needed: int | None  # questions at which such a difference would stand outside its interval; None for none at all

    @property
    def real(self) -> bool:
        """Whether the interval leaves out 0. Fewer than FEWEST questions prove nothing, however they fall."""
        return self.questions >= FEWEST and (self.low > 0 or self.high < 0)

    def sentence(self) -> str:
        """ "+0.042, 95 % interval -0.010 to +0.094 over 64 questions: within noise; about 100 would settle it"."""
        text = f"{self.mean:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f} over {self.questions:,} questions"
        if self.real:
            return f"{text}: a real difference"
        return f"{text}: within noise" + (f"; about {self.needed:,} would settle it" if self.needed else "")


def paired_difference(before: Sequence[float], after: Sequence[float], *, seed: int = SEED) -> Difference:
    """`after` minus `before`, question by question, resampled 10,000 times with replacement.

    The interval is the basic percentile one, widened by sqrt(n / (n - 1)), without which it is too narrow for few
    questions. The same seed gives the same interval. Raises ValueError for lists of unequal length or empty ones.
    """
    import numpy as np

    if len(before) != len(after) or not len(before):
        raise ValueError(f"{len(before)} and {len(after)} scores can't be compared question by question")
    differences = np.asarray(after, float) - np.asarray(before, float)
    count, mean = len(differences), float(differences.mean())
    if count == 1 or not differences.std():
        return Difference(mean, mean, mean, count, None)
    random, means = np.random.default_rng(seed), []
    size = max(_AT_ONCE // count, 1)
    for start in range(0, DRAWS, size):
        picked = random.integers(count, size=(min(size, DRAWS - start), count))
        means.append(differences[picked].mean(axis=1))
    wide = math.sqrt(count / (count - 1))
    spread = (np.concatenate(means) - mean) * wide
    low, high = np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + mean
    return Difference(mean, float(low), float(high), count, _needed(mean, float(differences.std(ddof=1))))


def _needed(mean: float, deviation: float) -> int | None:
    """Questions at which 1.96 standard errors are as large as the difference; None beyond a million."""
    if not mean:
        return None
    needed = math.ceil((1.96 * deviation / mean) ** 2)
    return needed if needed <= 1_000_000 else None

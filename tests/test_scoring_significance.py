"""Intervals of a difference hold what they promise."""

import numpy as np
import pytest

from sft.scoring.significance import paired_difference


@pytest.mark.parametrize("questions", [40, 150])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(questions, monkeypatch):
    """300 simulated comparisons of scores in 0, 0.2 ... 1: 95 % of the intervals hold the truth, give or take 3.5 %."""
    monkeypatch.setattr("sft.scoring.significance.DRAWS", 1_000)
    random, held = np.random.default_rng(questions), 0
    for trial in range(300):
        easy = random.random(questions)
        before = np.round((random.random(questions) < easy) * (0.2 + 0.8 * random.random(questions)), 1)
        shift = np.where(random.random(questions) < 0.3, random.choice([-0.2, 0.4], questions), 0.0)
        found = paired_difference(before, before + shift, seed=trial)
        held += found.low <= 0.3 * 0.1 <= found.high
    assert 0.915 <= held / 300 <= 0.985


def test_a_clear_difference_is_real_and_a_small_one_is_not():
    """64 questions, a fifth of them better; then one better and one worse."""
    before = [0.0, 0.5, 1.0, 0.2] * 16
    better = [score + 0.3 * (place % 5 == 0) for place, score in enumerate(before)]
    found = paired_difference(before, better)
    assert found.real and found.low > 0 and found.mean == pytest.approx(0.3 * 13 / 64)
    noise = [*before[:-2], before[-2] - 0.9, before[-1] + 0.8]
    found = paired_difference(before, noise)
    assert not found.real and found.low < 0 < found.high
    assert found.sentence().startswith("-0.002, 95 % interval -0.0")
    assert "over 64 questions: within noise; about " in found.sentence()
    assert found.needed > 64


def test_the_same_seed_gives_the_same_interval_and_memory_stays_bounded(monkeypatch):
    """In blocks or at once."""
    before, after = [0.1 * (place % 7) for place in range(50)], [0.1 * (place % 5) for place in range(50)]
    whole = paired_difference(before, after)
    assert whole == paired_difference(before, after)
    monkeypatch.setattr("sft.scoring.significance._AT_ONCE", 5_000)
    assert paired_difference(before, after).low == pytest.approx(whole.low, abs=0.01)


def test_what_never_differs_has_no_interval():
    """Equal or better by the same everywhere, too few questions to tell; lists that don't match are refused."""
    assert paired_difference([0.5] * 9, [0.5] * 9)[:3] == (0.0, 0.0, 0.0)
    assert paired_difference([0.5] * 9, [0.75] * 9).real
    assert not paired_difference([0.0] * 5, [1.0] * 5).real
    assert paired_difference([0.0] * 6, [1.0] * 6).real
    for before, after in (([], []), ([1.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="can't be compared"):
            paired_difference(before, after)

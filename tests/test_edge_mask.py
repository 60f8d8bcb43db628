"""Inverse-frequency masked loss: counts, keep probabilities, draws, masked labels and weights."""

import json
import math
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sft.data.masked_loss import edge_mask
from sft.data.masked_loss.edge_mask import EdgeMask
from sft.data.masked_loss.units import path_edges, path_edges_from_paths, render_paths

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
# Counts 6, 2 and 1: M = 9/3 = 3, so the first edge is kept with probability 1/2 and the others always.
COMMON, SECOND, RARE = (f'["path", "root", "{child}"]' for child in ("common", "second", "rare"))
TOY_ROWS = [[COMMON, SECOND, COMMON], [COMMON, RARE, COMMON], [SECOND], [], [COMMON, COMMON]]


def toy_mask(**options) -> EdgeMask:
    return EdgeMask.build(TOY_ROWS, np.arange(5), **{"seed": 3407, **options})


# ---- counts and keep probabilities


def test_counts_mean_and_keep_probabilities():
    """n = 6, 2, 1; M = 3; keep = min(1, M/n); the masked share is (6 - 3)/9."""
    mask = toy_mask()
    assert dict(zip(mask.edges, mask.counts.tolist(), strict=True)) == {COMMON: 6, SECOND: 2, RARE: 1}
    assert mask.mean_count == 3.0
    assert mask.keep.tolist() == [0.5, 1.0, 1.0]
    assert mask.weights(mask.ids(1)).tolist() == [0.5, 1.0, 0.5]
    report = mask.report(2)
    assert (report["units"], report["distinct_units"], report["mean_count"]) == (9, 3, 3.0)
    assert report["masked_share"] == pytest.approx(3 / 9)


def test_only_rows_in_use_count_as_often_as_they_are_drawn():
    """Row 0 twice, row 2 three times: n(common) = 4, n(second) = 5, the edge of the unused row 1 is not in the mean."""
    mask = EdgeMask.build(TOY_ROWS, [2, 0, 2, 0, 2, 3], seed=0)
    assert mask.counts.tolist() == [4, 5, 0]
    assert mask.mean_count == 4.5
    assert mask.keep.tolist() == [1.0, 0.9, 1.0]
    assert [mask.edges[edge] for edge in mask.ids(1)] == [COMMON, SECOND, COMMON]
    assert len(mask.ids(5)) == 0
    assert mask.report(1)["distinct_units"] == 2


@pytest.mark.parametrize("rows", [[], [[]], [None, []]])
def test_rows_without_units_draw_and_report_nothing(rows):
    """A stage whose rows have no edge at all reports zeros and masks nothing."""
    mask = EdgeMask.build(rows, np.arange(len(rows)), seed=0)
    assert mask.report(3) == {
        "units": 0, "distinct_units": 0, "mean_count": 0.0, "masked_share": 0.0, "top": [],
        "trained_at_least_once": {"expected": 0.0, "drawn": 0.0},
    }  # fmt: skip
    assert all(len(mask.draw(0, row, mask.ids(row))) == 0 for row in range(len(rows)))


def test_the_report_names_the_most_frequent_edges_and_is_json():
    """Ten edges at most, most frequent first, with count and keep probability, as people read them."""
    answer, units = path_edges_from_paths([["r", f"t{number}"] for number in range(12) for _ in range(number + 1)])
    report = EdgeMask.build([[unit.edge for unit in units]], [0], seed=0).report(1)
    assert [entry["edge"] for entry in report["top"]] == [f"r -> t{number}" for number in range(11, 1, -1)]
    assert report["top"][0] == {"edge": "r -> t11", "count": 12, "keep": 6.5 / 12}
    assert json.loads(json.dumps(report)) == report
    assert answer.count("\n") == 78


# ---- draws


def test_draws_are_these():
    """Under seed 3407 the toy set is drawn the same on every machine; literals from plain Python ints."""
    mask = toy_mask()
    drawn = [[mask.draw(epoch, row, mask.ids(row)).astype(int).tolist() for row in range(5)] for epoch in (0, 1)]
    assert drawn == [[[0, 0, 1], [0, 0, 1], [0], [], [1, 1]], [[1, 0, 1], [1, 0, 0], [0], [], [1, 1]]]


def test_a_draw_depends_on_seed_epoch_and_row_only():
    """Same arguments, same draw, after pickling too; another seed, epoch or row gives another stream."""
    rows = [[COMMON] * 64 + [RARE]] * 3
    draws = {}
    for seed in (0, 1, -1, 2**64):
        mask = EdgeMask.build(rows, np.arange(3), seed=seed)
        for epoch in (0, 1, 10**6):
            for row in (2, 0, 1):
                draws[seed, epoch, row] = tuple(mask.draw(epoch, row, mask.ids(row)).tolist())
                copied = pickle.loads(pickle.dumps(mask))
                assert tuple(copied.draw(epoch, row, copied.ids(row)).tolist()) == draws[seed, epoch, row]
    assert draws[0, 0, 0] == draws[2**64, 0, 0]
    assert len(set(draws.values())) == 27


def test_redraw_once_repeats_epoch_zero():
    """`once` is the published behaviour: one draw for all epochs, the same as the first of `epoch`."""
    rows = [[COMMON] * 64 + [RARE]]
    fresh, once = (EdgeMask.build(rows, [0], seed=5, redraw=redraw) for redraw in ("epoch", "once"))
    first = fresh.draw(0, 0, fresh.ids(0))
    assert all(np.array_equal(once.draw(epoch, 0, once.ids(0)), first) for epoch in range(4))
    assert not np.array_equal(fresh.draw(1, 0, fresh.ids(0)), first)


def test_draws_are_uniform_and_independent_of_their_neighbours():
    """512 x 512 draws at probability 1/2: every row mean, column mean and pair rate within five standard errors."""
    size = 512
    rows = [[COMMON] * size for _ in range(size)] + [[f'["path", "root", "rare {number}"]' for number in range(size)]]
    mask = EdgeMask.build(rows, np.arange(size + 1), seed=0)
    keep = float(mask.keep[0])
    drawn = np.array([mask.draw(0, row, mask.ids(row)) for row in range(size)])
    standard_error = math.sqrt(keep * (1 - keep) / size)
    assert np.abs(drawn.mean(axis=0) - (1 - keep)).max() < 5 * standard_error
    assert np.abs(drawn.mean(axis=1) - (1 - keep)).max() < 5 * standard_error
    for neighbours in (drawn[:, 1:] & drawn[:, :-1], drawn[1:] & drawn[:-1]):
        assert abs(neighbours.mean() - (1 - keep) ** 2) < 5 * 2 * standard_error / math.sqrt(size)


def outside_chernoff(masked: int, total: int, rate: float, tests: int) -> bool:
    """Whether `masked` of `total` is too far from `rate`, error 0.001 over all `tests` (Chernoff: exp(-total * KL))."""
    seen = masked / total
    terms = [(part, true) for part, true in ((seen, rate), (1 - seen, 1 - rate)) if part > 0]
    if any(true == 0 for _, true in terms):
        return True
    return total * sum(part * math.log(part / true) for part, true in terms) > math.log(2 * tests / 0.001)


def masked_over_epochs(mask: EdgeMask, rows: int, epochs: int) -> Counter[int]:
    masked: Counter[int] = Counter()
    for epoch in range(epochs):
        for row in range(rows):
            ids = mask.ids(row)
            masked.update(ids[mask.draw(epoch, row, ids)].tolist())
    return masked


def test_masked_rates_over_many_epochs():
    """200 epochs of a set with counts 1 to 30: each edge is masked at max(1 - M/n, 0); the bound would see 5 % more."""
    rows = [[f"edge{number}" for number in range(position, 30)] for position in range(30)]
    mask = EdgeMask.build(rows, np.arange(30), seed=1)
    assert mask.mean_count == 15.5
    masked = masked_over_epochs(mask, 30, 200)
    for edge, count in enumerate(mask.counts.tolist()):
        assert not outside_chernoff(masked[edge], 200 * count, max(1 - 15.5 / count, 0), 30)
    assert outside_chernoff(masked[29], 200 * 30, 1 - 15.5 / 30 + 0.05, 30)


@pytest.mark.parametrize(
    ("redraw", "epochs"), [("epoch", 1), ("epoch", 3), ("epoch", 2.5), ("once", 3), ("epoch", 0.5)]
)
def test_trained_at_least_once_equals_counting_the_draws(redraw, epochs):
    """`drawn` equals a count over every epoch's draws (half an epoch: half of it); `expected` is near it."""
    rows = [[COMMON] * 40 + [f'["path", "root", "rare {number}"]'] for number in range(20)]
    mask = EdgeMask.build(rows, np.arange(20), seed=2, redraw=redraw)
    trained = []
    for whole in (math.floor(epochs), math.ceil(epochs)):
        ever = [~np.all([mask.draw(epoch, row, mask.ids(row)) for epoch in range(whole)], axis=0) for row in range(20)]
        trained.append(sum(int(np.sum(row)) for row in ever) if whole else 0)
    part = epochs - math.floor(epochs)
    report = mask.report(epochs)["trained_at_least_once"]
    assert report["drawn"] == trained[0] + part * (trained[1] - trained[0])
    keep = 820 / 21 / 800
    chance = keep if redraw == "once" else 1 - (1 - keep) ** math.floor(epochs) * (1 - part * keep)
    rare = min(epochs, 1)
    assert report["expected"] == pytest.approx(800 * chance + 20 * rare)
    assert abs(report["drawn"] - report["expected"]) < 5 * math.sqrt(800 * chance)


# ---- labels and weights


def test_apply_masks_the_spans_of_masked_units_only():
    """A copy: prompt labels stay -100, spans of kept units stay, an empty span and one cut by truncation do no harm."""
    labels = [-100, -100, 5, 6, 7, 8, 9]
    masked = edge_mask.masked_labels(labels, [2, 4, 0, 6], [4, 5, 0, 9], [True, False, True, True])
    assert masked.tolist() == [-100, -100, -100, -100, 7, 8, -100]
    assert labels == [-100, -100, 5, 6, 7, 8, 9]
    assert edge_mask.masked_labels(labels, [], [], []).tolist() == labels


def test_token_weights_spread_the_keep_probabilities():
    """Weight 1 outside the units; the same spans as `apply`, cut off in the same way."""
    weights = edge_mask.token_weights(7, [2, 4, 0, 6], [4, 5, 0, 9], [0.5, 1.0, 0.25, 0.75])
    assert weights.dtype == np.float32
    assert weights.tolist() == [1, 1, 0.5, 0.5, 1, 1, 0.75]
    assert edge_mask.token_weights(2, [], [], []).tolist() == [1, 1]


def test_weight_gradient_is_the_mean_of_sample_gradients():
    """A toy linear language model: the gradient with keep weights equals the mean over 4,000 epochs of draws within
    five standard errors in every coordinate, both divided by the same number of tokens; unmasked it does not."""
    torch.manual_seed(0)
    rows, length, words = 6, 5, 4
    mask = EdgeMask.build(
        [[COMMON] * 4 if row else [COMMON, COMMON, RARE, SECOND] for row in range(rows)], np.arange(rows), seed=0
    )
    inputs, targets = torch.randn(rows, length, 3), torch.randint(words, (rows, length))
    starts, ends = np.arange(4), np.arange(4) + 1
    matrix = torch.randn(3, words, requires_grad=True)
    losses = torch.nn.functional.cross_entropy((inputs @ matrix).flatten(0, 1), targets.flatten(), reduction="none")
    per_token = torch.stack([torch.autograd.grad(loss, matrix, retain_graph=True)[0] for loss in losses])

    def gradient(weights: np.ndarray) -> np.ndarray:
        return np.tensordot(weights.reshape(-1), per_token.numpy(), axes=1) / (rows * length)

    weighted = gradient(
        np.stack([edge_mask.token_weights(length, starts, ends, mask.weights(mask.ids(row))) for row in range(rows)])
    )
    sampled = []
    for epoch in range(4_000):
        drawn = [
            edge_mask.masked_labels(targets[row].numpy(), starts, ends, mask.draw(epoch, row, mask.ids(row)))
            for row in range(rows)
        ]
        sampled.append(gradient((np.stack(drawn) != -100).astype(np.float64)))
    standard_error = np.std(sampled, axis=0) / math.sqrt(len(sampled))
    assert np.all(np.abs(np.mean(sampled, axis=0) - weighted) < 5 * standard_error)
    assert np.any(np.abs(np.mean(sampled, axis=0) - gradient(np.ones((rows, length)))) > 20 * standard_error)


# ---- house and real data


def test_import_is_light():
    """Masks are counted in `--check` and in workers: no torch, transformers or datasets comes along."""
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, sft.data.masked_loss.edge_mask; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture(scope="module")
def doid() -> EdgeMask:
    path = SHARED / "doid_paths_train.jsonl"
    if not path.is_file():
        pytest.skip("needs ../shared")
    rows = [json.loads(line)["paths"] for line in path.read_text(encoding="utf-8").splitlines()]
    units = [path_edges_from_paths(paths)[1] for paths in rows]
    assert units == [path_edges(render_paths(paths)) for paths in rows]
    return EdgeMask.build([[unit.edge for unit in row] for row in units], np.arange(len(rows)), seed=0)


@pytest.mark.shared
def test_disease_ontology_figures(doid):
    """Issue 4: 941 distinct edges, M = 12.6, masked share 65.6 % of 11,880 occurrences."""
    report = doid.report(2)
    assert (report["units"], report["distinct_units"]) == (11_880, 941)
    assert round(report["mean_count"], 1) == 12.6
    assert round(report["masked_share"], 3) == 0.656
    assert report["top"][0] == {
        "edge": "disease -> disease of anatomical entity",
        "count": 1315,
        "keep": pytest.approx(11_880 / 941 / 1315),
    }


@pytest.mark.shared
def test_disease_ontology_draws_over_200_epochs(doid):
    """Each of the 941 edges is masked at max(1 - M/n, 0) within sampling error, Bonferroni over all of them."""
    masked = masked_over_epochs(doid, len(doid.row_index), 200)
    mean_count = 11_880 / 941
    for edge, count in enumerate(doid.counts.tolist()):
        assert not outside_chernoff(masked[edge], 200 * count, max(1 - mean_count / count, 0), 941)

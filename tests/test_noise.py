"""NEFTune's noise: that of each row, however rows are joined."""

import math
from pathlib import Path

import pytest
import torch

from sft.training.noise import RowNoise
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

ALPHA, WIDTH = 5.0, 16


def embedded(rows: list[tuple[int, int, int]], *, training: bool = True) -> torch.Tensor:
    """The noise itself: embeddings of zeros."""
    embeddings = torch.nn.Embedding(8, WIDTH)
    torch.nn.init.zeros_(embeddings.weight)
    noise = RowNoise(embeddings.train(training), ALPHA, seed=3)
    noise.expect(rows)
    return embeddings(torch.zeros(1, sum(length for length, _, _ in rows), dtype=torch.long)).detach()[0]


def test_a_rows_noise_does_not_depend_on_its_neighbours():
    """Alone, first, last: the same numbers, within alpha / sqrt(L d) of its own length and close to that limit."""
    row, other = (37, 0, 5), (11, 0, 9)
    alone = embedded([row])
    limit = ALPHA / math.sqrt(37 * WIDTH)
    assert torch.equal(embedded([row, other])[:37], alone)
    assert torch.equal(embedded([other, row])[11:], alone)
    assert 0.95 * limit < alone.abs().max() <= limit
    assert alone.mean().abs() < 0.1 * limit


def test_rows_that_go_one_by_one_have_the_noise_of_joined_ones():
    """Models that mix joined rows get them in passes of their own: each pass takes the next row's noise."""
    rows = [(5, 0, 1), (7, 0, 2), (4, 0, 3)]
    joined = embedded(list(rows))
    embeddings = torch.nn.Embedding(8, WIDTH)
    torch.nn.init.zeros_(embeddings.weight)
    RowNoise(embeddings, ALPHA, seed=3).expect(list(rows))
    passes = [embeddings(torch.zeros(1, length, dtype=torch.long)).detach()[0] for length, _, _ in rows]
    assert torch.equal(torch.cat(passes), joined)


def test_every_epoch_and_row_has_noise_of_its_own_and_evaluation_none():
    """Equal lengths, other numbers; nothing for a stand-in row, nothing outside training."""
    alone = embedded([(37, 0, 5)])
    assert not torch.equal(embedded([(37, 1, 5)]), alone)
    assert not torch.equal(embedded([(37, 0, 6)]), alone)
    assert embedded([(2, 0, -1)]).abs().max() == 0
    assert embedded([(37, 0, 5)], training=False).abs().max() == 0


@pytest.mark.slow
def test_losses_with_noise_do_not_depend_on_how_the_global_batch_is_divided(tmp_path: Path):
    """8 x 1 and 2 x 4 rows: the same losses to 1e-5, and others without noise."""
    common = {
        "SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_DATASET_ID": write_rows(tmp_path / "rows.jsonl", 24),
        "SFT_MAX_STEPS": 3, "SFT_VAL_RATIO": 0,
    }  # fmt: skip
    losses = []
    for size, accumulation, alpha in ((8, 1, 50), (2, 4, 50), (8, 1, 0)):
        divided = {"SFT_PER_DEVICE_TRAIN_BS": size, "SFT_GRAD_ACCUM": accumulation, "SFT_NEFTUNE_NOISE_ALPHA": alpha}
        out = tmp_path / f"{size}_{alpha}"
        write_stage(tmp_path, 1, common | divided | {"SFT_OUT_LORA_DIR": out / "out"})
        assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
        losses.append(metric_lines(out / "out_stage1", "loss"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[2][0] - losses[0][0]) > 1e-3

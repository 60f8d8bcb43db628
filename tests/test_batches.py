"""Batches: packing, joining, order; everything a pure function of seed, epoch and row."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch

from sft.data.masked_loss.edge_mask import EdgeMask
from sft.training.batches import (
    EpochBatches,
    EpochLoader,
    Order,
    TrainingRows,
    blocks_of,
    join_rows,
    pack,
    pack_in_order,
    packs_of,
    rows_of_tokens,
)


def rows() -> datasets.Dataset:
    """Three rows of 3, 2 and 4 tokens; the first token of row 2 is trained, as in rows of plain text."""
    return datasets.Dataset.from_list([
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5], "labels": [-100, 5]},
        {"input_ids": [6, 7, 8, 9], "labels": [6, 7, 8, 9]},
    ])  # fmt: skip


def test_packs_are_full_and_hold_every_row_once():
    """7+3, 6+4 and 5 fill sequences of ten: three packs, the best there are."""
    assert sorted(pack([3, 7, 4, 6, 5], 10)) == [[0, 1], [2, 3], [4]]


def test_a_row_longer_than_the_capacity_gets_a_pack_of_its_own():
    """Over-long rows are the label step's business; packing neither loses nor cuts them."""
    assert sorted(pack([12, 3], 10)) == [[0], [1]]


def test_joined_rows_restart_their_positions_and_mask_the_first_token():
    """Row 2's first token would be predicted from row 0's last one: it carries no loss."""
    training = TrainingRows(rows())
    batch = join_rows([training[0], training[2]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch["rows"] == [0, 2]
    assert batch["num_items"] == 5


def test_a_rank_without_rows_gets_masked_tokens():
    """An empty micro-batch keeps collective calls in step and counts nothing."""
    batch = join_rows([])
    assert batch["labels"].tolist() == [[-100, -100]]
    assert batch["num_items"] == 0


def test_every_trained_token_has_its_row_and_every_row_its_source():
    """Rows 2, 1 and 0 have three, one and two trained tokens; rows 0 and 2 are of source 1, row 1 of source 0."""
    training = TrainingRows(rows().add_column("source", [1, 0, 1]), names=["a", "b"])
    batch = join_rows([training[2], training[1], training[0]])
    assert rows_of_tokens(batch, batch["labels"]).tolist() == [2, 2, 2, 1, 0, 0]
    nothing = join_rows([])
    assert rows_of_tokens(nothing, nothing["labels"]).tolist() == []
    sums = torch.tensor([[0.5, 2.0], [3.0, 1.0], [1.5, 3.0]])
    assert training.sums_of_sources(sums).tolist() == [[3.0, 1.0], [2.0, 5.0]]


def test_packs_are_items():
    """With packing an item is the rows of one pack, in row order."""
    training = TrainingRows(rows(), packs=[[0, 1], [2]])
    assert len(training) == 2
    assert [row["position"] for row in training[0]] == [0, 1]


def order_of(ranks: int, batch_size: int, epoch: int, num: int = 10) -> list[list[list[int]]]:
    """[micro-step][rank] -> keys."""
    samplers = [EpochBatches(Order(num, seed=3), batch_size=batch_size, rank=r, ranks=ranks) for r in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(step) for step in zip(*samplers, strict=True)]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 2), (4, 1)])
def test_the_global_batches_are_the_same_whatever_the_number_of_ranks(ranks: int, batch_size: int):
    """Every global batch of four rows holds the same rows in the same order; nothing is repeated to fill the last."""
    steps = [[key for share in step for key in share] for step in order_of(ranks, batch_size, epoch=1)]
    assert steps == [step[0] for step in order_of(1, 4, epoch=1)]
    assert sorted(key for step in steps for key in step) == list(range(10, 20))


def test_every_epoch_has_its_own_order_and_the_same_seed_the_same():
    """Keys carry the epoch: key = epoch * rows + row."""
    first, second = ([key % 10 for step in order_of(1, 10, epoch=e) for key in step[0]] for e in (0, 1))
    assert first != second
    assert first == [key for step in order_of(1, 10, epoch=0) for key in step[0]]


def test_grouping_by_length_does_not_train_the_longest_first():
    """80 lengths in 40 global batches: about half of the batches are shorter than the one before, in another order
    each epoch. Trained longest first, the last steps would see nothing but short rows."""
    lengths = list(range(1, 81))
    order = Order(80, seed=0, lengths=np.array(lengths), group=2)
    orders = []
    for epoch in (0, 1):
        orders.append(order.of(epoch))
        means = np.array(lengths)[orders[-1]].reshape(-1, 2).mean(axis=1)
        assert 12 <= (np.diff(means) < 0).sum() <= 27
        assert abs(means[:20].mean() - means[20:].mean()) < 20
    assert orders[0].tolist() != orders[1].tolist()


def test_grouping_by_length_puts_similar_rows_together():
    """Rows of lengths 1 and 100: every global batch of two holds rows of one length, and no row is lost."""
    lengths = [1, 100] * 6
    order = Order(12, seed=0, lengths=np.array(lengths), group=2)
    batches = list(EpochBatches(order, batch_size=2))
    assert all(len({lengths[key] for key in keys}) == 1 for keys in batches)
    assert sorted(key for keys in batches for key in keys) == list(range(12))


def epoch_order(blocks: list[int], epoch: int, *, ranks: int = 1) -> list[int]:
    """Rows in the order in which the ranks together see them, one row a micro-batch."""
    samplers = [
        EpochBatches(Order(len(blocks), seed=3, blocks=np.array(blocks)), batch_size=1, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [key % len(blocks) for step in zip(*samplers, strict=True) for keys in step for key in keys]


def test_blocks_keep_their_order_and_are_shuffled_inside():
    """SFT_SHUFFLE=sources: rows 0 to 6 of the first source, then 7 to 15; each epoch otherwise, over ranks alike."""
    blocks = [0] * 7 + [1] * 9
    first, second = (epoch_order(blocks, epoch) for epoch in (0, 1))
    for order in (first, second):
        assert (sorted(order[:7]), sorted(order[7:])) == (list(range(7)), list(range(7, 16)))
    assert first != second
    assert first != sorted(first)
    assert epoch_order(blocks, 1, ranks=2) == second
    assert epoch_order(list(range(16)), 1, ranks=4) == list(range(16))  # SFT_SHUFFLE=none


def test_packs_keep_the_order_asked_for(make_settings: Any):
    """none: consecutive rows share a sequence; sources: only rows of one source do; mix: whatever fits best."""
    table = datasets.Dataset.from_dict({"length": [6, 3, 3, 5, 2, 4], "source": [0, 0, 0, 0, 1, 1]})
    found = {}
    for shuffle in ("mix", "sources", "none"):
        settings = make_settings(packing=True, shuffle=shuffle, max_seq_len=10)
        packs = packs_of(table, settings)
        blocks = blocks_of(table, settings, packs)
        found[shuffle] = (packs, None if blocks is None else blocks.tolist())
    assert found["none"] == ([[0, 1], [2, 3, 4], [5]], [0, 1, 2])
    assert found["sources"] == ([[0, 1], [2, 3], [4, 5]], [0, 0, 1])
    assert found["mix"][1] is None
    assert pack_in_order([12, 3, 8], 10) == [[0], [1], [2]]


def masked_rows(mode: str) -> TrainingRows:
    """Twenty rows with one unit at tokens 2:4; the same edge everywhere but in row 0, so M = 10 and keep = 10/19."""
    table = datasets.Dataset.from_list([
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, 4, 5], "unit_edges": ["rare" if row == 0 else "usual"],
         "unit_starts": [2], "unit_ends": [4]} for row in range(20)
    ])  # fmt: skip
    mask = EdgeMask.build(table["unit_edges"], range(20), seed=5)
    return TrainingRows(table, edge_mask=mask, mode=mode)


def test_the_mask_is_drawn_anew_each_epoch_and_only_from_the_key():
    """The same key gives the same labels; over 400 epochs the frequent edge is masked with probability 1 - 10/19."""
    training = masked_rows("sample")
    drawn = [training[epoch * 20 + 7][0]["labels"][2] == -100 for epoch in range(400)]
    assert drawn == [training[epoch * 20 + 7][0]["labels"][2] == -100 for epoch in range(400)]
    expected, error = 9 / 19, (9 / 19 * 10 / 19 / 400) ** 0.5
    assert abs(np.mean(drawn) - expected) < 4 * error
    assert all(training[epoch * 20][0]["labels"][2] == 3 for epoch in range(50))


def test_both_modes_are_divided_by_the_expected_number_of_trained_tokens():
    """Two tokens outside the unit count whole, its two tokens 10/19 each, masked or not."""
    expected = 2 + 2 * 10 / 19
    for mode in ("sample", "weight"):
        batch = join_rows([masked_rows(mode)[7]])
        assert batch["num_items"] == pytest.approx(expected, rel=1e-6)
    assert batch["loss_weights"][0].tolist() == pytest.approx([1, 1, 10 / 19, 10 / 19, 1])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers: int):
    """The loader's batches with two workers are those without."""
    training = masked_rows("sample")

    def labels(count: int) -> list[list[int]]:
        sampler = EpochBatches(Order(20, seed=1), batch_size=3)
        loader = EpochLoader(training, batch_sampler=sampler, collate_fn=join_rows, num_workers=count)
        loader.set_epoch(4)
        return [batch["labels"][0].tolist() for batch in loader]

    torch.manual_seed(workers)
    assert labels(workers) == labels(0)

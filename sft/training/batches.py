"""From labelled rows to the batches of a run: order, packing, joining; a pure function of seed, epoch and row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sft.data.chosen import REPLAYED, numbers_of
from sft.data.masked_loss.edge_mask import MASKED, masked_labels, token_weights
from sft.distributed.launch import launched
from sft.distributed.signals import follow_parent
from sft.models.attention import row_ends

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from sft.data.masked_loss.edge_mask import EdgeMask
    from sft.settings import Settings


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows packed into sequences of at most `capacity` tokens, best fit on falling length; rows keep their order.

    Best-fit decreasing as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830): each row goes where the
    least room is left over.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        spot = bisect_left(room, (lengths[row], -1))
        if spot < len(room):
            left, number = room.pop(spot)
        else:
            left, number = capacity, len(packs)
            packs.append([])
        packs[number].append(row)
        insort(room, (left - lengths[row], number))
    return [sorted(rows) for rows in packs]


def pack_in_order(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows packed one after the other: a row that does not fit any more begins the next sequence."""
    packs: list[list[int]] = []
    left = -1
    for row, length in enumerate(lengths):
        left -= length
        if left < 0:
            packs.append([])
            left = capacity - length
        packs[-1].append(row)
    return packs


class TrainingRows(Dataset):
    """Labelled rows addressed by key = epoch * len + item, so that a worker needs nothing but the key to draw masks.

    An item is one row, or the rows of one pack. `labels` of the first token of every row are masked: with rows joined
    it would otherwise be predicted from the row before. `names` are those of the rows' sources.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        packs: list[list[int]] | None = None,
        edge_mask: EdgeMask | None = None,
        mode: str = "sample",
        names: Sequence[str] = (),
    ) -> None:
        self.rows, self.packs, self.edge_mask, self.mode = rows, packs, edge_mask, mode
        self.names = names
        self._sources = numbers_of(rows, "source") if len(names) > 1 else np.zeros(len(rows), np.int64)

    def __len__(self) -> int:
        return len(self.rows) if self.packs is None else len(self.packs)

    def __getitem__(self, key: int) -> list[dict[str, Any]]:
        epoch, item = divmod(key, len(self))
        return [self.row(epoch, position) for position in ([item] if self.packs is None else self.packs[item])]

    def row(self, epoch: int, position: int) -> dict[str, Any]:
        row = self.rows[position]
        labels = np.asarray(row["labels"], dtype=np.int64).copy()
        labels[0] = MASKED
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        example = {"position": position, "epoch": epoch, "input_ids": ids, "labels": labels}
        return (
            example if self.edge_mask is None else example | self.masked(self.edge_mask, epoch, position, row, labels)
        )

    def named(self, position: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """A row so that a person finds it: position, source and how the trained text begins."""
        row = self.rows[position]
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != MASKED]
        text = tokenizer.decode(trained[:24], skip_special_tokens=True)
        number = row["source"]
        source = "an earlier stage" if number == REPLAYED else self.names[number] if self.names else "the data"
        return f"{position} from {source} ({text[:60]!r})"

    def sums_of_sources(self, sums: torch.Tensor) -> torch.Tensor:
        """(sources, columns) from sums of each row, (rows, columns)."""
        found = torch.zeros((max(len(self.names), 1), sums.shape[1]), dtype=sums.dtype)
        return found.index_add_(0, torch.from_numpy(self._sources), sums)

    def masked(
        self, mask: EdgeMask, epoch: int, position: int, row: dict[str, Any], labels: np.ndarray
    ) -> dict[str, Any]:
        """Labels with this epoch's frequent edges masked out, or, in mode `weight`, each token's chance to be kept.

        `expected_tokens`, what both modes are normalised by, is the sum of these chances over the trained tokens: so
        the two have the same gradient on average, and a heavily masked row counts no more than its share.
        """
        ids = mask.ids(position)
        spans = row["unit_starts"], row["unit_ends"]
        weights = token_weights(len(labels), *spans, mask.weights(ids))
        expected = {"expected_tokens": float(weights[labels != MASKED].sum())}
        if self.mode == "weight":
            return expected | {"loss_weights": weights}
        return expected | {"labels": masked_labels(labels, *spans, mask.draw(epoch, position, ids))}


def join_rows(items: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Joins the rows of a micro-batch into one sequence of shape (1, tokens) without padding; `position_ids` restart
    with every row, by which transformers confines attention to the row; `row_lengths` and `row_ends` say the same once
    for all layers. A micro-batch without rows (a rank that has none left at the end of an epoch) becomes two masked
    tokens."""
    rows = [row for item in items for row in item]
    if not rows:
        ids = np.zeros(2, np.int64)
        rows = [{"position": -1, "epoch": 0, "input_ids": ids, "labels": np.full_like(ids, MASKED)}]
    batch: dict[str, Any] = {
        name: torch.from_numpy(np.concatenate([row[name] for row in rows]))[None]
        for name in ("input_ids", "labels", "loss_weights")
        if name in rows[0]
    }
    batch["position_ids"] = torch.from_numpy(np.concatenate([np.arange(len(row["input_ids"])) for row in rows]))[None]
    batch["row_lengths"] = [len(row["input_ids"]) for row in rows]
    batch["row_ends"] = row_ends(batch["row_lengths"])
    batch["rows"], batch["epochs"] = [row["position"] for row in rows], [row["epoch"] for row in rows]
    trained = int((batch["labels"] != MASKED).sum())
    batch["num_items"] = sum(row["expected_tokens"] for row in rows) if "expected_tokens" in rows[0] else trained
    return batch


def rows_of_tokens(batch: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """The position of the row of every trained token of a joined batch, shape (trained tokens,), on the CPU."""
    row_of_token = (batch["position_ids"][0] == 0).cumsum(0) - 1
    return torch.tensor(batch["rows"])[row_of_token[labels[0] != MASKED].cpu()]


@dataclass(frozen=True)
class Order:
    """The order of `num` items in every epoch, a pure function of seed and epoch.

    With `lengths` items of similar length are put into the same global batch (`group`: its size in items). With
    `blocks` (a number per item) they are only shuffled among those with their number, and numbers ascend.
    """

    num: int
    seed: int
    lengths: np.ndarray | None = None
    group: int = 1
    blocks: np.ndarray | None = None

    def of(self, epoch: int) -> np.ndarray:
        """Item positions, shape (num,)."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.num)
        if self.blocks is not None:
            return order[np.argsort(self.blocks[order], kind="stable")]
        if self.lengths is None:
            return order
        # As transformers' LengthGroupedSampler: sorted inside windows of 50 global batches, the batches then shuffled.
        window = self.group * 50
        chunks = [order[start : start + window] for start in range(0, self.num, window)]
        order = np.concatenate([chunk[np.argsort(-self.lengths[chunk], kind="stable")] for chunk in chunks])
        whole = self.num // self.group * self.group
        groups = order[:whole].reshape(-1, self.group)
        return np.concatenate([groups[random.permutation(len(groups))].ravel(), order[whole:]])


class EpochBatches(Sampler[list[int]]):
    """Keys of this rank's micro-batches for one epoch.

    Micro-step k of all ranks together is items k*W*B to (k+1)*W*B of the order: the same global batch whatever the
    number of processes W, and nothing is repeated to fill up the last one.
    """

    def __init__(self, order: Order, *, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.order, self.batch_size, self.rank, self.ranks = order, batch_size, rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.order.num // (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        keys = self.order.of(self.epoch) + self.epoch * self.order.num
        together = self.batch_size * self.ranks
        for start in range(0, len(keys), together):
            share = np.array_split(keys[start : start + together], self.ranks)
            yield share[self.rank].tolist()


class EpochLoader(DataLoader):
    """A DataLoader whose batches follow the epoch: the Trainer calls `set_epoch`. It seeds its workers, which draw
    nothing, from a generator of its own: the random state at the end of a step is that at the start of the next."""

    def __init__(self, rows: TrainingRows, **keywords: Any) -> None:
        super().__init__(rows, generator=torch.Generator(), **keywords)

    @classmethod
    def of_rank(cls, rows: TrainingRows, settings: Settings, args: TrainingArguments) -> EpochLoader:
        """The micro-batches of this rank as the training arguments have them."""
        batches = EpochBatches(
            order_of(rows.rows, settings, rows.packs, processes=args.world_size),
            batch_size=args.per_device_train_batch_size,
            rank=args.process_index,
            ranks=args.world_size,
        )
        return cls(
            rows,
            batch_sampler=batches,
            collate_fn=join_rows,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=follow_parent,
            pin_memory=args.dataloader_pin_memory,
        )

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


# Epochs whose order is looked through for the largest micro-batch.
_EPOCHS = 3


def packs_of(rows: datasets.Dataset, settings: Settings) -> list[list[int]] | None:
    """The rows of each packed sequence, as the trainer packs them; None without packing.

    Where SFT_SHUFFLE keeps an order no sequence joins what that order keeps apart.
    """
    if not settings.packing:
        return None
    lengths = numbers_of(rows, "length").tolist()
    if settings.shuffle == "mix":
        return pack(lengths, settings.max_seq_len)
    if settings.shuffle == "none":
        return pack_in_order(lengths, settings.max_seq_len)
    packs = []
    for part in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(_blocks(rows))) + 1):
        found = pack([lengths[row] for row in part], settings.max_seq_len)
        packs += [part[rows_of].tolist() for rows_of in found]
    return packs


def blocks_of(
    rows: datasets.Dataset, settings: Settings, packs: Sequence[Sequence[int]] | None = None
) -> np.ndarray | None:
    """What SFT_SHUFFLE keeps in order, as `Order` takes it; None where all is mixed."""
    if settings.shuffle == "mix":
        return None
    if settings.shuffle == "none":
        return np.arange(len(rows) if packs is None else len(packs))
    sources = _blocks(rows)
    return sources if packs is None else sources[[rows_of[0] for rows_of in packs]]


def _blocks(rows: datasets.Dataset) -> np.ndarray:
    """The source of each of the rows that come source after source; a replayed one, of none, stays where it stands."""
    return np.maximum.accumulate(numbers_of(rows, "source")).clip(min=0)


def order_of(
    rows: datasets.Dataset, settings: Settings, packs: Sequence[Sequence[int]] | None, *, processes: int
) -> Order:
    """The order that SFT_SHUFFLE and SFT_GROUP_BY_LENGTH ask for; packs are about equally long already."""
    return Order(
        len(rows) if packs is None else len(packs),
        settings.seed,
        lengths=numbers_of(rows, "length") if settings.group_by_length and packs is None else None,
        group=settings.per_device_train_bs * processes * settings.grad_accum,
        blocks=blocks_of(rows, settings, packs),
    )


def largest_items(rows: datasets.Dataset, settings: Settings, *, processes: int | None = None) -> list[int]:
    """Rows of the micro-batch with most tokens."""
    return _largest(rows, settings, micro_batches=1, processes=processes or launched().processes)


def heaviest_step(rows: datasets.Dataset, settings: Settings, *, processes: int | None = None) -> list[int]:
    """Rows of the step with most tokens on one device."""
    return _largest(rows, settings, micro_batches=settings.grad_accum, processes=processes or launched().processes)


def _rest(order: np.ndarray, size: int, processes: int) -> list[np.ndarray]:
    """What each device has of a step that an epoch does not fill; [] for none."""
    together = size * processes
    shares = [np.array_split(order[start : start + together], processes) for start in range(0, len(order), together)]
    return [np.concatenate(parts) for parts in zip(*shares, strict=True)]


def _largest(rows: datasets.Dataset, settings: Settings, *, micro_batches: int, processes: int) -> list[int]:
    """Rows of those successive micro-batches of one device that have most tokens together."""
    lengths, packs = numbers_of(rows, "length"), packs_of(rows, settings)
    sizes = lengths if packs is None else np.array([lengths[pack].sum() for pack in packs])
    size, in_order = settings.per_device_train_bs, order_of(rows, settings, packs, processes=processes)
    together = size * processes * micro_batches
    best: np.ndarray = np.zeros(0, np.int64)
    for epoch in range(min(_EPOCHS, max(1, int(np.ceil(settings.epochs))))):
        order = in_order.of(epoch)
        whole = len(order) // together * together
        shape = -1, micro_batches, processes, size
        of_devices = order[:whole].reshape(shape).swapaxes(1, 2).reshape(-1, micro_batches * size)
        heaviest = [of_devices[sizes[of_devices].sum(axis=1).argmax()]] if whole else []
        best = max([best, *heaviest, *_rest(order[whole:], size, processes)], key=lambda items: sizes[items].sum())
    return best.tolist() if packs is None else [row for item in best for row in packs[item]]

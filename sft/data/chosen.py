"""Which rows of some sources are trained on and how often: split, shared out by weight, repeated by rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft.data import draws
from sft.data.draws import Hashes, Indices
from sft.data.split import Split, first_of_equal, splits

if TYPE_CHECKING:
    from sft.data.sources.load import Rows
    from sft.settings import Settings

REPLAYED = -1
"""The number of the source of a row that an earlier stage was trained on: it is of none of this stage's sources."""


def column_of(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """One column whole, without decoding the others."""
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def numbers_of(dataset: datasets.Dataset, name: str) -> Indices:
    """One column of numbers, (rows,); a view, asked for it, would put together a slice for every one of its rows: a
    second for 200,000."""
    whole = dataset.data.column(name).to_numpy().astype(np.int64, copy=False)
    return whole if dataset._indices is None else whole[dataset._indices.column(0).to_numpy()]


class Base:
    """All sources one after the other, with the columns that are needed as arrays. Those after the first `own` are
    earlier stages'."""

    def __init__(self, sources: Sequence[Rows], own: int) -> None:
        self.sources = sources
        self.sizes = [len(rows.dataset) for rows in sources]
        self.starts = [0, *np.cumsum(self.sizes).tolist()]
        joined = datasets.concatenate_datasets([rows.dataset for rows in sources])
        numbers = np.array([number if number < own else REPLAYED for number in range(len(sources))], np.int32)
        place = {
            "source": np.repeat(numbers, self.sizes),
            "row": np.concatenate([np.arange(size, dtype=np.int64) for size in self.sizes]),
        }
        self.rows = datasets.concatenate_datasets([joined, datasets.Dataset(pa.table(place))], axis=1)
        self.hashes: Hashes = self.column("content_hash").to_numpy()

    def column(self, name: str) -> pa.ChunkedArray:
        return column_of(self.rows, name)

    def numbers(self, source: int) -> Indices:
        """The numbers of a source's rows among all rows."""
        return np.arange(self.starts[source], self.starts[source + 1], dtype=np.int64)

    def view(self, numbers: Indices) -> datasets.Dataset:
        return self.rows.select(numbers)

    def tokens(self, numbers: Indices) -> dict[str, int]:
        lengths, trained = (self.column(name).to_numpy()[numbers] for name in ("length", "trained"))
        longest = int(lengths.max(initial=0))
        return {"total": int(lengths.sum()), "trained": int(trained.sum()), "longest_row": longest}


@dataclass
class Chosen:
    """`rows` to train on, source after source, with repetitions; the split of each source and the rows `drawn` from it
    before any rule repeated them; what is to be said about it."""

    splits: list[Split]
    drawn: list[Indices]
    rows: Indices
    dropped: Counter[str] = field(default_factory=Counter)
    unasked: int = 0
    upsampling: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def choose(
    base: Base,
    places: Sequence[int],
    settings: Settings,
    *,
    validation: Indices | None = None,
    questions: Mapping[str, Hashes] = MappingProxyType({}),
) -> Chosen:
    """What of the sources at these places of the base is trained on.

    With `validation`, rows of other sources, nothing is split off. No row equal to one of them, or whose content is
    among `questions` (by who asks them), is trained on.
    """
    chosen = Chosen([], [], np.empty(0, np.int64))
    pools = [base.numbers(place) for place in places]
    if settings.deduplicate:
        pools = _without_duplicates(base, pools, chosen)
    ratio = settings.val_ratio if validation is None else 0.0
    others = np.empty(0, np.int64) if validation is None else validation
    chosen.splits = splits(base.hashes, pools, ratio=ratio, seed=settings.seed, validation=others, questions=questions)
    sources = [base.sources[place].source for place in places]
    for source, split in zip(sources, chosen.splits, strict=True):
        chosen.dropped += split.left_out
        chosen.unasked += split.unasked
        if split.unasked:
            reasons = ", ".join(f"{number} {reason}" for reason, number in split.left_out.items())
            chosen.warnings.append(f"[WARNING] {source.id}: rows are left out ({reasons})")
    chosen.drawn = _drawn(sources, settings, chosen)
    chosen.rows = np.concatenate(chosen.drawn)
    if settings.use_upsampling:
        chosen.rows = _upsampled(base, settings, chosen)
    return chosen


def _without_duplicates(base: Base, pools: Sequence[Indices], chosen: Chosen) -> list[Indices]:
    kept = first_of_equal(base.hashes, np.concatenate(pools))
    chosen.dropped += Counter(duplicate=sum(map(len, pools)) - len(kept))
    return [np.intersect1d(pool, kept, assume_unique=True) for pool in pools]


def _drawn(sources: Sequence[Any], settings: Settings, chosen: Chosen) -> list[Indices]:
    """The rows drawn from each source: their numbers in the base, with repetitions."""
    found = chosen.splits
    sizes = [draws.repeated_size(len(split.train), source.repeat) for source, split in zip(sources, found, strict=True)]
    chosen.warnings += [
        f"[WARNING] {source.id}: no row is left to train on"
        for source, size in zip(sources, sizes, strict=True)
        if not size
    ]
    weights = [source.weight if size else 0.0 for source, size in zip(sources, sizes, strict=True)]
    total = max(sizes, default=0) if settings.dataset_mix_total_size < 0 else settings.dataset_mix_total_size
    counts = draws.shares(weights, total) if any(weights) else [0] * len(sources)
    return [
        draws.draw(split.train, size, count, seed=settings.seed, stream=i, ordered=settings.shuffle == "none")
        for i, (split, size, count) in enumerate(zip(found, sizes, counts, strict=True))
    ]


def _upsampled(base: Base, settings: Settings, chosen: Chosen) -> Indices:
    """Rows repeated by the rules' multipliers. Multipliers are worked out once per task key and pack, not per row."""
    rows = chosen.rows
    keys, packs = (pc.dictionary_encode(base.column(name)).combine_chunks() for name in ("task_key", "pack"))
    kinds = keys.indices.to_numpy().astype(np.int64) * len(packs.dictionary) + packs.indices.to_numpy()
    present, kind_of_row = np.unique(kinds[rows], return_inverse=True)
    names = [
        {
            "task_key": keys.dictionary[kind // len(packs.dictionary)].as_py(),
            "pack": packs.dictionary[kind % len(packs.dictionary)].as_py(),
        }
        for kind in present.tolist()
    ]
    counts = np.bincount(kind_of_row, minlength=len(names))
    for rule, factor in settings.upsample_rules.items():
        matched = sum(int(count) for name, count in zip(names, counts, strict=True) if draws.matches(rule, **name))
        chosen.upsampling.append({"rule": rule, "multiplier": factor, "matched": matched})
        if not matched:
            chosen.warnings.append(_nothing_matched(rule, names))
    factors = np.array([draws.multiplier(settings.upsample_rules, **name) for name in names])
    times = draws.repeats(factors[kind_of_row], rows, seed=settings.seed)
    chosen.dropped += Counter({"left out by SFT_UPSAMPLE_RULES": int((times == 0).sum())})
    return np.repeat(rows, times)


def _nothing_matched(rule: str, names: Sequence[dict[str, str]]) -> str:
    keys = sorted({name["task_key"] for name in names} - {""})
    packs = sorted({f"pack:{name['pack']}" for name in names if name["pack"]})
    return f"[WARNING] SFT_UPSAMPLE_RULES: {rule} matches no row; there are {', '.join(keys + packs) or 'no task keys'}"

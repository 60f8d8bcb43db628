"""Sources -> the rows of a stage: load, label, split, mix, upsample, audit. Mixing copies no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft.data import draws
from sft.data.draws import Hashes, Indices
from sft.data.labels.audit import audit
from sft.data.labels.label import label
from sft.data.sources.load import Rows, load_source
from sft.data.sources.readers import SourceError
from sft.errors import Problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.settings import Settings, Source

_MOST_DROPPED = 0.1

# Columns a validation row has and a training row needs not: reading them would slow down every step.
VAL_COLUMNS = ("messages", "task_key", "pack")


@dataclass
class Mix:
    """The rows of a stage. `train` and `val` are views; `source` and `row` say where a row comes from.

    `sources` and `upsampling` are the records of the contract's `--check --json`; `tokens` those of `train`.
    """

    train: datasets.Dataset
    val: datasets.Dataset
    sources: list[dict[str, Any]]
    upsampling: list[dict[str, Any]]
    dropped: Counter[str]
    warnings: list[str] = field(default_factory=list)
    noted: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Split:
    """Rows of one source: those to train on and those set apart."""

    train: Indices
    val: Indices


def prepare(settings: Settings, tokenizer: PreTrainedTokenizerBase, *, say: Callable[[str], object] = print) -> Mix:
    """The rows of a stage, labelled, mixed and audited. Sources that cannot be loaded are told to `say`.

    Raises:
        Problems: no source is left, a template is missing, too many rows are lost, or the audit fails.
    """
    rows = load(settings.sources, settings, tokenizer, say=say)
    evaluation = load(settings.eval_sources, settings, tokenizer, say=say) if settings.eval_sources else []
    problems = _losses([*rows, *evaluation], settings)
    if problems:
        raise Problems(problems)
    mixed = mix(rows, settings, evaluation=evaluation)
    problems = [problem for part in (*rows, *evaluation) for problem in audit(part, tokenizer, settings)]
    if not len(mixed.train):
        problems.append(f"{_asked(settings)}: no row is left to train on")
    if problems:
        raise Problems(problems)
    return mixed


def load(
    sources: Sequence[Source], settings: Settings, tokenizer: PreTrainedTokenizerBase, *, say: Callable[[str], object]
) -> list[Rows]:
    """The labelled rows of every source that can be loaded.

    Raises:
        Problems: none can be, or one cannot and the run is strict.
    """
    loaded, failed = [], []
    for source in sources:
        try:
            loaded.append(label(load_source(source, settings), tokenizer, settings))
        except SourceError as error:
            failed.append(f"[ERROR] Failed to load {source.id}: {error}")
    if failed and (settings.strict or not loaded):
        raise Problems(failed)
    for text in failed:
        say(text)
    return loaded


def _losses(loaded: Sequence[Rows], settings: Settings) -> list[str]:
    """Problems where more rows are lost than the person may expect."""
    dropped = sum((rows.dropped for rows in loaded), Counter[str]())
    total = dropped.total() + sum(len(rows.dataset) for rows in loaded)
    if settings.overlong == "error" and dropped["over-long"]:
        return [
            f"SFT_OVERLONG=error: {dropped['over-long']} rows are longer than SFT_MAX_SEQ_LEN={settings.max_seq_len};"
            " raise it, shorten them, or choose drop or truncate"
        ]
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    remedy = f"raise SFT_MAX_SEQ_LEN={settings.max_seq_len}" if dropped["over-long"] else "repair the rows"
    if total and dropped.total() == total:
        return [f"{_asked(settings)}: none of its {total} rows can be trained on ({reasons}); {remedy}"]
    if settings.origins.get("SFT_OVERLONG", "default") != "default" or dropped.total() <= _MOST_DROPPED * total:
        return []
    return [
        f"SFT_OVERLONG={settings.overlong}: {dropped.total()} of {total} rows would be dropped ({reasons}); {remedy}, "
        f"or write SFT_OVERLONG=drop into stage{settings.stage}.env to accept it"
    ]


def _asked(settings: Settings) -> str:
    """The setting that names the sources."""
    return "SFT_DATASET_MIX" if settings.dataset_mix else "SFT_DATASET_ID"


def mix(sources: Sequence[Rows], settings: Settings, *, evaluation: Sequence[Rows] = ()) -> Mix:
    """The training and validation rows of labelled sources; the same for the same rows, settings and seed.

    With `evaluation` these are the validation rows, else they are split off each source before anything is mixed.
    No row equal to a validation row is in `train`.
    """
    base = _Base([*sources, *evaluation])
    report = Mix(base.rows, base.rows, [], [], base.counted("dropped"), noted=base.counted("noted"))
    splits = _splits(base, len(sources), settings, report)
    drawn = _drawn([rows.source for rows in sources], splits, settings, report)
    rows = np.concatenate([part + base.starts[i] for i, part in enumerate(drawn)])
    if settings.use_upsampling:
        rows = _upsampled(base, rows, settings, report)
    rows = draws.shuffled(rows, settings.seed)
    held = [base.numbers(i) for i in range(len(sources), len(base.sizes))]
    held = held or [split.val + base.starts[i] for i, split in enumerate(splits)]
    held_rows = _first_of_equal(base.hashes, np.concatenate(held))
    report.train = base.view(rows).remove_columns([*VAL_COLUMNS, "content_hash", "trained"])
    report.val = base.view(held_rows).remove_columns(["content_hash", "trained"])
    report.sources = [
        _record(source, split, len(part)) for source, split, part in zip(sources, splits, drawn, strict=True)
    ]
    report.tokens = base.tokens(rows)
    return report


class _Base:
    """All sources one after the other, with the columns that are needed as arrays."""

    def __init__(self, sources: Sequence[Rows]) -> None:
        self.sources = sources
        self.sizes = [len(rows.dataset) for rows in sources]
        self.starts = [0, *np.cumsum(self.sizes).tolist()]
        joined = datasets.concatenate_datasets([rows.dataset for rows in sources])
        place = {
            "source": np.repeat(np.arange(len(sources), dtype=np.int32), self.sizes),
            "row": np.concatenate([np.arange(size, dtype=np.int64) for size in self.sizes]),
        }
        self.rows = datasets.concatenate_datasets([joined, datasets.Dataset(pa.table(place))], axis=1)
        self.hashes: Hashes = self.column("content_hash").to_numpy()

    def column(self, name: str) -> pa.ChunkedArray:
        return self.rows.select_columns([name]).with_format("arrow")[:][name]

    def numbers(self, source: int) -> Indices:
        """The numbers of a source's rows among all rows."""
        return np.arange(self.starts[source], self.starts[source + 1], dtype=np.int64)

    def view(self, numbers: Indices) -> datasets.Dataset:
        return self.rows.select(numbers)

    def counted(self, what: str) -> Counter[str]:
        return sum((getattr(rows, what) for rows in self.sources), Counter[str]())

    def tokens(self, numbers: Indices) -> dict[str, int]:
        lengths, trained = (self.column(name).to_numpy()[numbers] for name in ("length", "trained"))
        longest = int(lengths.max(initial=0))
        return {"total": int(lengths.sum()), "trained": int(trained.sum()), "longest_row": longest}


def _splits(base: _Base, count: int, settings: Settings, report: Mix) -> list[_Split]:
    """The split of each of the first `count` sources; the sources after them are validation rows as a whole."""
    pools = [base.numbers(i) for i in range(count)]
    if settings.deduplicate:
        pools = _without_duplicates(base, pools, report)
    ratio = 0.0 if count < len(base.sizes) else settings.val_ratio
    held = [pool[draws.validation_rows(base.hashes[pool], ratio, settings.seed)] for pool in pools]
    secret = np.unique(base.hashes[np.concatenate([*held, np.arange(base.starts[count], base.starts[-1])])])
    splits = []
    for i, (pool, val) in enumerate(zip(pools, held, strict=True)):
        train = pool[~np.isin(base.hashes[pool], secret)]
        equal = len(pool) - len(train) - len(val)
        if equal:
            report.dropped["equal to a validation row"] += equal
            report.warnings.append(
                f"[WARNING] {base.sources[i].source.id}: {equal} rows equal a validation row and are left out"
            )
        splits.append(_Split(train - base.starts[i], val - base.starts[i]))
    return splits


def _without_duplicates(base: _Base, pools: Sequence[Indices], report: Mix) -> list[Indices]:
    kept = _first_of_equal(base.hashes, np.concatenate(pools))
    report.dropped["duplicate"] += sum(map(len, pools)) - len(kept)
    return [np.intersect1d(pool, kept, assume_unique=True) for pool in pools]


def _first_of_equal(hashes: Hashes, numbers: Indices) -> Indices:
    """Of rows with equal content the first, in order."""
    _, first = np.unique(hashes[numbers], return_index=True)
    return numbers[np.sort(first)]


def _drawn(sources: Sequence[Any], splits: Sequence[_Split], settings: Settings, report: Mix) -> list[Indices]:
    """The rows drawn from each source: their numbers in the source, with repetitions."""
    sizes = [
        draws.repeated_size(len(split.train), source.repeat) for source, split in zip(sources, splits, strict=True)
    ]
    report.warnings += [
        f"[WARNING] {source.id}: no row is left to train on"
        for source, size in zip(sources, sizes, strict=True)
        if not size
    ]
    weights = [source.weight if size else 0.0 for source, size in zip(sources, sizes, strict=True)]
    total = max(sizes, default=0) if settings.dataset_mix_total_size < 0 else settings.dataset_mix_total_size
    counts = draws.shares(weights, total) if any(weights) else [0] * len(sources)
    return [
        draws.draw(split.train, size, count, seed=settings.seed, stream=i)
        for i, (split, size, count) in enumerate(zip(splits, sizes, counts, strict=True))
    ]


def _upsampled(base: _Base, rows: Indices, settings: Settings, report: Mix) -> Indices:
    """Rows repeated by the rules' multipliers. Multipliers are worked out once per task key and pack, not per row."""
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
        report.upsampling.append({"rule": rule, "multiplier": factor, "matched": matched})
        if not matched:
            report.warnings.append(_nothing_matched(rule, names))
    factors = np.array([draws.multiplier(settings.upsample_rules, **name) for name in names])
    return np.repeat(rows, draws.repeats(factors[kind_of_row], rows, seed=settings.seed))


def _nothing_matched(rule: str, names: Sequence[dict[str, str]]) -> str:
    keys = sorted({name["task_key"] for name in names} - {""})
    packs = sorted({f"pack:{name['pack']}" for name in names if name["pack"]})
    return f"[WARNING] SFT_UPSAMPLE_RULES: {rule} matches no row; there are {', '.join(keys + packs) or 'no task keys'}"


def _record(rows: Rows, split: _Split, drawn: int) -> dict[str, Any]:
    source = rows.source
    return {
        "id": source.id, "split": source.split, "weight": source.weight, "rows": len(rows.dataset),
        "validation_rows": len(split.val), "drawn": drawn, "fingerprint": rows.fingerprint,
    }  # fmt: skip

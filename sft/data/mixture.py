"""Sources -> the rows of a stage: load, label, split, mix, upsample, audit. Mixing copies no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft.data import draws
from sft.data.draws import Hashes, Indices
from sft.data.labels.audit import audit
from sft.data.labels.label import label
from sft.data.labels.parity import Parity, compare_prompts
from sft.data.losses import asked, in_words, losses, placed
from sft.data.sources.load import Rows, load_source
from sft.data.sources.readers import SourceError
from sft.data.split import EARLIER, GENERATION, Split, first_of_equal, splits
from sft.errors import Problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.settings import Settings, Source

# Columns a validation row has and a training row needs not: reading them would slow down every step.
VAL_COLUMNS = ("messages", "extras", "task_key", "pack")


@dataclass
class Mix:
    """The rows of a stage. `train` and `val` are views; `source` and `row` say where a row comes from.

    `sources` and `upsampling` are the records of the contract's `--check --json`; `tokens` those of `train`.
    `held` are the contents that no later stage may train on; `unasked` counts rows left out beyond the share asked for.
    `first` says where a row was first dropped, `unread` which columns and keys with text nothing reads, by source;
    `parity` whether a source's prompts are those a server asks with; `names` are those of the sources by their number.
    """

    train: datasets.Dataset
    val: datasets.Dataset
    sources: list[dict[str, Any]]
    upsampling: list[dict[str, Any]]
    dropped: Counter[str]
    warnings: list[str] = field(default_factory=list)
    noted: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, int] = field(default_factory=dict)
    held: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    unasked: int = 0
    first: dict[str, str] = field(default_factory=dict)
    unread: dict[str, list[str]] = field(default_factory=dict)
    parity: dict[str, Parity] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def rows_in_words(self) -> str:
        """How many rows there are and how they add up."""
        sources = ", ".join(f"{Path(source['id']).name} {source['drawn']:,}" for source in self.sources)
        added = len(self.train) - sum(source["drawn"] for source in self.sources)
        upsampled = f"; upsampling {added:+,}" if self.upsampling else ""
        return f"{len(self.train):,} to train ({sources}{upsampled}), {len(self.val):,} to validate"

    def remarks(self) -> list[str]:
        """What was lost, what was done to rows that are kept, and what of them nobody reads."""
        kept = ", ".join(f"{count:,} {what}" for what, count in self.noted.items() if count)
        unread = (f"{Path(name).name}: {', '.join(columns)}" for name, columns in self.unread.items())
        texts = {
            "Dropped": in_words(self.dropped, self.first), "Kept, but": kept, "Not read": "; ".join(unread),
            "Prompts": self._prompts_in_words(),
        }  # fmt: skip
        return [f"{title}: {text}" for title, text in texts.items() if text]

    def _prompts_in_words(self) -> str:
        compared = sum(found.compared for found in self.parity.values())
        equal = compared and not any(found.difference for found in self.parity.values())
        return f"same as a server renders them, token for token ({compared} rows compared)" if equal else ""


def prepare_mix(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    say: Callable[[str], object] = print,
    earlier: Collection[int] = (),
) -> Mix:
    """The rows of a stage, labelled, mixed and audited. Sources that cannot be loaded are told to `say`; `earlier` are
    the contents that earlier stages ask questions about.

    Raises:
        Problems: no source is left, a template is missing, too many rows are lost, or the audit fails.
    """
    rows = load_mix(settings.sources, settings, tokenizer, say=say)
    evaluation = load_mix(settings.eval_sources, settings, tokenizer, say=say) if settings.eval_sources else []
    questions = {EARLIER: np.array(sorted(earlier), np.uint64), GENERATION: _contents(load_questions(settings))}
    mixed = mix(rows, settings, evaluation=evaluation, questions=questions)
    problems = losses([*rows, *evaluation], mixed.unasked, mixed.dropped, settings)
    if problems:
        raise Problems(problems)
    problems = [problem for part in (*rows, *evaluation) for problem in audit(part, tokenizer, settings)]
    if not len(mixed.train):
        lost = f" ({in_words(mixed.dropped, mixed.first)})" if mixed.dropped else ""
        problems.append(f"{asked(settings)}: no row is left to train on{lost}")
    if problems:
        raise Problems(problems)
    mixed.parity = {part.source.id: compare_prompts(part.dataset, tokenizer, settings) for part in rows}
    mixed.warnings += [
        f"[WARNING] {name}: the prompt at training is not the prompt at inference: {found.difference}"
        for name, found in mixed.parity.items()
        if found.difference
    ]
    return mixed


def load_questions(settings: Settings) -> list[datasets.Dataset]:
    """The rows of SFT_GEN_EVAL_DATASET as messages, per source; none when nothing is generated.

    Raises:
        Problems: one of its sources can't be loaded.
    """
    if settings.gen_eval == "none":
        return []
    loaded = []
    for source in settings.gen_eval_sources:
        try:
            loaded.append(load_source(source, settings).dataset)
        except SourceError as error:
            raise Problems([f"SFT_GEN_EVAL_DATASET={source.id}: {error}"]) from error
    return loaded


def _contents(loaded: Sequence[datasets.Dataset]) -> Hashes:
    hashes = [_column(dataset, "content_hash").to_numpy() for dataset in loaded]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))


def _column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def load_mix(
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


def mix(
    sources: Sequence[Rows],
    settings: Settings,
    *,
    evaluation: Sequence[Rows] = (),
    questions: Mapping[str, Hashes] = MappingProxyType({}),
) -> Mix:
    """The training and validation rows of labelled sources; the same for the same rows, settings and seed.

    With `evaluation` these are the validation rows, else they are split off each source before anything is mixed.
    No row equal to a validation row is in `train`, nor one whose content is among `questions` (by who asks them).
    """
    base = _Base([*sources, *evaluation])
    dropped, first = placed(base.sources)
    report = Mix(base.rows, base.rows, [], [], dropped, noted=base.counted("noted"), first=first)
    report.names = _names(base.sources)
    report.unread = {rows.source.id: list(rows.unread) for rows in base.sources if rows.unread}
    found = _splits(base, len(sources), settings, report, questions=questions)
    drawn = _drawn([rows.source for rows in sources], found, settings, report)
    rows = np.concatenate(drawn)
    if settings.use_upsampling:
        rows = _upsampled(base, rows, settings, report)
    rows = _ordered(base, rows, settings)
    held = [base.numbers(i) for i in range(len(sources), len(base.sizes))]
    held_rows = first_of_equal(base.hashes, np.concatenate(held or [split.val for split in found]))
    report.held = np.unique(np.concatenate([base.hashes[held_rows], questions.get(GENERATION, base.hashes[:0])]))
    report.train = base.view(rows).remove_columns([*VAL_COLUMNS, "number", "content_hash", "trained"])
    report.val = base.view(held_rows).remove_columns(["number", "content_hash", "trained"])
    report.sources = [
        _record(source, split, len(part)) for source, split, part in zip(sources, found, drawn, strict=True)
    ]
    report.tokens = base.tokens(rows)
    return report


def _names(sources: Sequence[Rows]) -> list[str]:
    """Short names, each another: the file's or folder's, with a number where several have it."""
    names: list[str] = []
    for rows in sources:
        name = Path(rows.source.id).name
        same = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{same + 1}" if same else name)
    return names


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
        return _column(self.rows, name)

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


def _splits(
    base: _Base, count: int, settings: Settings, report: Mix, *, questions: Mapping[str, Hashes]
) -> list[Split]:
    """The split of each of the first `count` sources; the sources after them are validation rows as a whole."""
    pools = [base.numbers(i) for i in range(count)]
    if settings.deduplicate:
        pools = _without_duplicates(base, pools, report)
    ratio = 0.0 if count < len(base.sizes) else settings.val_ratio
    validation = np.arange(base.starts[count], base.starts[-1])
    found = splits(base.hashes, pools, ratio=ratio, seed=settings.seed, validation=validation, questions=questions)
    for rows, split in zip(base.sources, found, strict=False):
        report.dropped += split.left_out
        report.unasked += split.unasked
        if split.unasked:
            reasons = ", ".join(f"{number} {reason}" for reason, number in split.left_out.items())
            report.warnings.append(f"[WARNING] {rows.source.id}: rows are left out ({reasons})")
    return found


def _without_duplicates(base: _Base, pools: Sequence[Indices], report: Mix) -> list[Indices]:
    kept = first_of_equal(base.hashes, np.concatenate(pools))
    report.dropped += Counter(duplicate=sum(map(len, pools)) - len(kept))
    return [np.intersect1d(pool, kept, assume_unique=True) for pool in pools]


def _drawn(sources: Sequence[Any], found: Sequence[Split], settings: Settings, report: Mix) -> list[Indices]:
    """The rows drawn from each source: their numbers in the source, with repetitions."""
    sizes = [draws.repeated_size(len(split.train), source.repeat) for source, split in zip(sources, found, strict=True)]
    report.warnings += [
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


def _ordered(base: _Base, rows: Indices, settings: Settings) -> Indices:
    """Rows of one source after the other -> the order SFT_SHUFFLE asks for."""
    if settings.shuffle == "none":
        return rows
    if settings.shuffle == "mix":
        return draws.shuffled(rows, settings.seed)
    of_source = np.searchsorted(base.starts, rows, side="right")
    borders = np.flatnonzero(np.diff(of_source)) + 1
    return np.concatenate([draws.shuffled(part, settings.seed) for part in np.split(rows, borders)])


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
    times = draws.repeats(factors[kind_of_row], rows, seed=settings.seed)
    report.dropped += Counter({"left out by SFT_UPSAMPLE_RULES": int((times == 0).sum())})
    return np.repeat(rows, times)


def _nothing_matched(rule: str, names: Sequence[dict[str, str]]) -> str:
    keys = sorted({name["task_key"] for name in names} - {""})
    packs = sorted({f"pack:{name['pack']}" for name in names if name["pack"]})
    return f"[WARNING] SFT_UPSAMPLE_RULES: {rule} matches no row; there are {', '.join(keys + packs) or 'no task keys'}"


def _record(rows: Rows, split: Split, drawn: int) -> dict[str, Any]:
    source = rows.source
    return {
        "id": source.id, "split": source.split, "weight": source.weight, "rows": len(rows.dataset),
        "validation_rows": len(split.val), "drawn": drawn, "fingerprint": rows.fingerprint,
    }  # fmt: skip

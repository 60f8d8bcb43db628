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

from sft.data import draws
from sft.data.chosen import Base, choose, column_of
from sft.data.draws import Hashes, Indices
from sft.data.labels.audit import audit
from sft.data.labels.label import label
from sft.data.labels.parity import Parity, compare_prompts
from sft.data.losses import asked, in_words, losses, nothing_left, placed
from sft.data.replay import Loaded, load_taught, replay, spread
from sft.data.sources.load import Rows, load_source
from sft.data.sources.readers import SourceError
from sft.data.split import EARLIER, GENERATION, VALIDATION, Split, first_of_equal
from sft.errors import Problems
from sft.settings.values import SourceRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.data.taught import Taught
    from sft.settings import Settings, Source

# Columns a validation row has and a training row needs not: reading them would slow down every step.
VAL_COLUMNS = ("messages", "extras", "task_key", "pack")


@dataclass
class Mix:
    """The rows of a stage. `train` and `val` are views; `source` and `row` say where a row comes from.

    `sources` and `upsampling` are the records of the contract's `--check --json`; `tokens` those of `train`.
    `held` are the contents that no later stage may train on; `unasked` counts rows left out beyond the share asked for.
    `first` says where a row was first dropped, `unread` which columns and keys with text nothing reads, by source;
    `parity` whether a source's prompts are those a server asks with; `names` are those of the sources by their number;
    `replay` has a record per earlier stage whose rows come again.
    """

    train: datasets.Dataset
    val: datasets.Dataset
    sources: list[SourceRecord]
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
    replay: list[dict[str, Any]] = field(default_factory=list)

    def rows_in_words(self) -> str:
        """How many rows there are and how they add up."""
        sources = ", ".join(f"{Path(source.id).name} {source.drawn or 0:,}" for source in self.sources)
        again = sum(stage["rows"] for stage in self.replay)
        added = len(self.train) - again - sum(source.drawn or 0 for source in self.sources)
        upsampled = f"; upsampling {added:+,}" if self.upsampling else ""
        replayed = "".join(f" + {stage['rows']:,} replayed from stage {stage['stage']}" for stage in self.replay)
        return f"{len(self.train):,} to train ({sources}{upsampled}{replayed}), {len(self.val):,} to validate"

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
    taught: Sequence[Taught] = (),
) -> Mix:
    """The rows of a stage, labelled, mixed and audited. Sources that cannot be loaded are told to `say`; `earlier` are
    the contents that earlier stages ask questions about, `taught` the stages whose rows come again.

    Raises:
        Problems: no source is left, a template is missing, too many rows are lost, or the audit fails.
    """
    rows = load_mix(settings.sources, settings, tokenizer, say=say)
    evaluation = load_mix(settings.eval_sources, settings, tokenizer, say=say) if settings.eval_sources else []
    questions = {EARLIER: np.array(sorted(earlier), np.uint64), GENERATION: _contents(load_questions(settings))}
    again = load_taught(taught, settings, tokenizer)
    mixed = mix(rows, settings, evaluation=evaluation, questions=questions, taught=again)
    problems = nothing_left("SFT_EVAL_DATASET", evaluation, settings)
    problems += losses([*rows, *evaluation], mixed.unasked, mixed.dropped, settings)
    if problems:
        raise Problems(problems)
    parts = [*rows, *evaluation, *(part for _, loaded in again for part in loaded)]
    problems = [problem for part in parts for problem in audit(part, tokenizer, settings)]
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
            loaded.append(load_source(source, processes=settings.num_proc).dataset)
        except SourceError as error:
            raise Problems([f"SFT_GEN_EVAL_DATASET={source.id}: {error}"]) from error
    return loaded


def _contents(loaded: Sequence[datasets.Dataset]) -> Hashes:
    hashes = [column_of(dataset, "content_hash").to_numpy() for dataset in loaded]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))


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
            loaded.append(label(load_source(source, processes=settings.num_proc), tokenizer, settings))
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
    taught: Loaded = (),
) -> Mix:
    """The training and validation rows of labelled sources; the same for the same rows, settings and seed.

    With `evaluation` these are the validation rows, else they are split off each source before anything is mixed.
    No row equal to a validation row is in `train`, nor one whose content is among `questions` (by who asks them).
    Of the rows of `taught` as many come again as are SFT_REPLAY of all.
    """
    own, count = [*sources, *evaluation], len(sources)
    base = Base([*own, *(rows for _, loaded in taught for rows in loaded)], len(own))
    validation = np.arange(base.starts[count], base.starts[len(own)]) if evaluation else None
    chosen = choose(base, range(count), settings, validation=validation, questions=questions)
    dropped, first = placed(own)
    report = Mix(base.rows, base.rows, [], chosen.upsampling, dropped + chosen.dropped, chosen.warnings, first=first)
    report.noted = sum((rows.noted for rows in own), Counter[str]())
    report.names, report.unasked = _names(own), chosen.unasked
    report.unread = {rows.source.id: list(rows.unread) for rows in own if rows.unread}
    held = [validation] if validation is not None else [split.val for split in chosen.splits]
    held_rows = first_of_equal(base.hashes, np.concatenate(held))
    report.held = np.unique(np.concatenate([base.hashes[held_rows], questions.get(GENERATION, base.hashes[:0])]))
    again = np.empty(0, np.int64)
    if taught:
        secret = {**questions, VALIDATION: report.held}
        again, report.replay = replay(base, taught, settings, first=len(own), own=len(chosen.rows), held=secret)
    rows = _ordered(base, chosen.rows, again, settings)
    report.train = base.view(rows).remove_columns([*VAL_COLUMNS, "number", "content_hash", "trained"])
    report.val = base.view(held_rows).remove_columns(["number", "content_hash", "trained"])
    report.sources = [
        _record(source, split, len(part))
        for source, split, part in zip(sources, chosen.splits, chosen.drawn, strict=True)
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


def _ordered(base: Base, rows: Indices, again: Indices, settings: Settings) -> Indices:
    """Rows of one source after the other -> the order SFT_SHUFFLE asks for, those that come again mixed in or, where
    an order is kept, spread over it: all at once they would be forgotten again, or forget what they stand behind."""
    if settings.shuffle == "mix":
        return draws.shuffled(np.concatenate([rows, again]), settings.seed)
    if settings.shuffle == "sources":
        of_source = np.searchsorted(base.starts, rows, side="right")
        borders = np.flatnonzero(np.diff(of_source)) + 1
        rows = np.concatenate([draws.shuffled(part, settings.seed) for part in np.split(rows, borders)])
    return spread(again, rows)


def _record(rows: Rows, split: Split, drawn: int) -> SourceRecord:
    source = rows.source
    return SourceRecord(
        id=source.id, split=source.split, weight=source.weight, rows=len(rows.dataset),
        validation_rows=len(split.val), drawn=drawn, fingerprint=rows.fingerprint,
    )  # fmt: skip

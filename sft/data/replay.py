"""Rows of earlier stages that come into a stage's mix again (SFT_REPLAY): how many, which, and where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.data import draws
from sft.data.chosen import Base, choose
from sft.data.draws import Hashes, Indices
from sft.data.labels.label import label
from sft.data.losses import in_words, placed
from sft.data.sources.load import Rows, load_source
from sft.data.sources.readers import SourceError
from sft.data.taught import Taught
from sft.errors import Problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.settings import Settings

Loaded = Sequence[tuple[Taught, Sequence[Rows]]]
# The stream of random numbers of stage k's replayed rows is this plus k; sources are numbered from 0.
_STREAM = 1 << 42


def load_taught(taught: Sequence[Taught], settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """The rows of earlier stages, labelled as this stage labels its own.

    Raises:
        Problems: a source can't be loaded, or nothing of a stage can be trained on here.
    """
    found, problems = [], []
    for earlier in taught:
        loaded: list[Rows] = []
        for source in earlier.sources:
            try:
                rows = load_source(source, processes=settings.num_proc)
                loaded.append(label(rows, tokenizer, settings))
            except SourceError as error:
                problems.append(f"SFT_REPLAY={settings.replay:g}: stage {earlier.stage}'s {source.id}: {error}")
        found.append((earlier, loaded))
    if problems:
        raise Problems(problems)
    return found


def replayed_rows(own: int, share: float) -> int:
    """How many rows beside `own` rows make up this share of all; at least one."""
    return max(1, round(own * share / (1 - share)))


def replay(
    base: Base, loaded: Loaded, settings: Settings, *, first: int, own: int, held: Mapping[str, Hashes]
) -> tuple[Indices, list[dict[str, Any]]]:
    """Rows of the base to train on again, in random order, and a record per stage.

    The sources of the stages stand in the base from place `first` on. A stage's rows are drawn from those it was
    trained on; each has the same number of rows, so that a short stage is not forgotten for a long one. `own`: rows of
    the stage itself; `held`: contents that must not be trained on, by who asks them.

    Raises:
        Problems: nothing is left of a stage.
    """
    counts = draws.shares([1.0] * len(loaded), replayed_rows(own, settings.replay))
    drawn, records = [], []
    for (earlier, rows), count in zip(loaded, counts, strict=True):
        places = range(first, first := first + len(rows))
        pool = choose(base, places, earlier.settings, questions=held).rows
        if not len(pool):
            lost = in_words(*placed(rows))
            why = f" ({lost})" if lost else ": all of them are validation rows or questions"
            text = f"SFT_REPLAY={settings.replay:g}: no row of stage {earlier.stage} can be trained on here{why}"
            raise Problems([f"{text}; set SFT_REPLAY=0, or what leaves them out"])
        drawn.append(draws.draw(pool, len(pool), count, seed=settings.seed, stream=_STREAM + earlier.stage))
        available = len(np.unique(pool))
        ids = [each.source.id for each in rows]
        records.append({"stage": earlier.stage, "rows": count, "available": available, "sources": ids})
    return draws.shuffled(np.concatenate(drawn), settings.seed), records


def spread(rows: Indices, among: Indices) -> Indices:
    """`rows` at even distances among others whose order stays."""
    places = ((np.arange(len(rows)) + 0.5) * len(among) / max(len(rows), 1)).astype(np.int64)
    return np.insert(among, places, rows)

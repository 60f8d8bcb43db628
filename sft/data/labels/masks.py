"""Which tokens of a row are trained: assistant turns, output markers, length, units of the masked loss."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sft.data.labels.rendering import CONTEXT_LOST, Rendered
from sft.data.labels.template import Span
from sft.data.labels.tokens import Encoded
from sft.data.masked_loss import edge_mask
from sft.data.masked_loss.edge_mask import MASKED
from sft.data.masked_loss.units import answer_units
from sft.data.sources.load import SCHEMA
from sft.data.sources.turns import Dropped

if TYPE_CHECKING:
    from sft.settings import Settings

# Of the rows of messages; the paths have become units.
CARRIED = SCHEMA.remove(SCHEMA.get_field_index("paths"))
_INTEGERS = pa.list_(pa.int32())
_LABELS = {"input_ids": _INTEGERS, "labels": _INTEGERS, "length": pa.int32(), "trained": pa.int32()}
_UNITS = {"unit_edges": pa.list_(pa.string()), "unit_starts": _INTEGERS, "unit_ends": _INTEGERS}


@dataclass(frozen=True)
class Labelled:
    """One row: its ids, the token spans that are trained, and its units with their token spans."""

    ids: Sequence[int]
    trained: Sequence[Span]
    edges: Sequence[str] = ()
    unit_spans: Sequence[Span] = ()


def schema(settings: Settings) -> pa.Schema:
    """Columns of labelled rows: those of messages, the labels, and the units under a masked loss."""
    return pa.schema([*CARRIED, *_LABELS.items(), *(_UNITS.items() if settings.masked_loss != "none" else ())])


def label_row(
    rendered: Rendered | Dropped,
    encoded: Encoded,
    settings: Settings,
    *,
    noted: Counter[str],
    paths: Sequence[Sequence[str]] | None = None,
) -> Labelled:
    """What is trained of one row; `noted` counts what happened to rows that are kept. Raises Dropped.

    `paths`: of an ontology row, the units' own borders."""
    if isinstance(rendered, Dropped):
        raise rendered
    spans = _learned(rendered, settings, noted)
    ids, limit = encoded.ids, len(encoded.ids)
    if limit > settings.max_seq_len:
        limit = settings.max_seq_len
        if settings.overlong != "truncate" or encoded.first(rendered.turns[0][0]) >= limit:
            raise Dropped("over-long")
        noted["truncated"] += 1
    tokens = [(encoded.first(start), min(encoded.end(end), limit)) for start, end in spans]
    trained = [(start, end) for start, end in tokens if start < end]
    if not trained:
        raise Dropped("fully masked")
    noted.update(rendered.noted)
    if settings.masked_loss == "none" or rendered.shift is None:
        return Labelled(ids[:limit], trained)
    edges, unit_spans = _units(rendered, encoded, settings, noted, paths)
    inside = [any(a <= start and end <= b for a, b in trained) for start, end in unit_spans]
    return Labelled(ids[:limit], trained, _chosen(edges, inside), _chosen(unit_spans, inside))


def _chosen(items: Sequence, inside: Sequence[bool]) -> list:
    return [item for item, chosen in zip(items, inside, strict=True) if chosen]


def _learned(rendered: Rendered, settings: Settings, noted: Counter[str]) -> list[Span]:
    """The characters that are trained."""
    if not settings.train_on_prompt:
        return _answers(rendered, list(rendered.turns), settings, noted)
    spans = _answers(rendered, [(0, len(rendered.text))], settings, noted)
    if None in rendered.context:
        raise Dropped(CONTEXT_LOST)
    for start, end in filter(None, rendered.context):
        spans = [piece for a, b in spans for piece in ((a, min(b, start)), (max(a, end), b)) if piece[0] < piece[1]]
    return spans


def _answers(rendered: Rendered, spans: list[Span], settings: Settings, noted: Counter[str]) -> list[Span]:
    """The spans without the reasoning of the final answer, where SFT_MASK_COT asks for that."""
    if not settings.mask_cot or rendered.content is None:
        return spans
    start, end = rendered.turns[-1]
    # Reasoning is context, whatever markers it holds; without a marker behind it all of the answer is trained.
    found = _markers(settings.output_markers).search(rendered.text, rendered.answer or start, end)
    if found is None and rendered.answer is None:
        noted["no output marker"] += 1
        return spans
    if found is None:
        learned = behind = rendered.answer or start
    else:
        learned = found.start() if settings.output_learn_mode == "from_marker" else found.end()
        behind = found.end()
    if rendered.shift is not None and behind >= rendered.shift + len(rendered.content.rstrip()):
        raise Dropped("fully masked")  # only the end-of-turn mark would be left
    return [(0, start), (learned, spans[-1][1])] if settings.train_on_prompt else [*spans[:-1], (learned, end)]


@lru_cache
def _markers(markers: tuple[str, ...]) -> re.Pattern[str]:
    """The first of the markers, the longest where several begin; with the rest of its line when that is blank."""
    longest_first = sorted(markers, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?:[ \\t]*\\r?\\n)?")


def _units(
    rendered: Rendered,
    encoded: Encoded,
    settings: Settings,
    noted: Counter[str],
    paths: Sequence[Sequence[str]] | None,
) -> tuple[list[str], list[Span]]:
    """Edges of the final answer and their token spans; those without a token of their own are left out."""
    content = rendered.content or ""
    marker = _markers(settings.output_markers).search(content)
    payload_start = marker.end() if marker else 0
    found = answer_units(content, settings.masked_loss_unit, payload_start=payload_start, paths=paths)
    noted["no JSON in the answer"] += found is None
    units = found or []
    starts, ends = edge_mask.token_spans(encoded.offsets(), units, shift=rendered.shift or 0, text=rendered.text)
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    own = [start < end for start, end in spans]
    return _chosen([unit.edge for unit in units], own), _chosen(spans, own)


def with_labels(table: pa.Table, rows: Sequence[Labelled], columns: pa.Schema) -> pa.Table:
    """The table of messages with the labels of its rows beside them."""
    lengths = [len(row.ids) for row in rows]
    borders = _borders(lengths)
    ids = np.fromiter(chain.from_iterable(row.ids for row in rows), dtype=np.int32, count=int(borders[-1]))
    labels = np.full_like(ids, MASKED)
    for border, row in zip(borders.tolist(), rows, strict=False):
        for start, end in row.trained:
            labels[border + start : border + end] = ids[border + start : border + end]
    trained = [sum(end - start for start, end in row.trained) for row in rows]
    added = [
        _lists(borders, ids),
        _lists(borders, labels),
        pa.array(lengths, pa.int32()),
        pa.array(trained, pa.int32()),
    ]
    if "unit_edges" in columns.names:
        added.append(pa.array([list(row.edges) for row in rows], _UNITS["unit_edges"]))
        added += [pa.array([[span[i] for span in row.unit_spans] for row in rows], _INTEGERS) for i in (0, 1)]
    return pa.Table.from_arrays([*table.select(CARRIED.names).columns, *added], schema=columns)


def _borders(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def _lists(borders: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(values))

"""Answers in, numbers out: one entry for every kind of generation evaluation (SFT_GEN_EVAL)."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.scoring import edges, extraction, own, structured
from sft.scoring.faults import faults_of_extraction
from sft.scoring.metrics import KINDS
from sft.scoring.payload import DEFAULT_MARKERS

_Scored = tuple[list[dict[str, Any]], dict[str, float]]


def score(
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    markers: Sequence[str] = DEFAULT_MARKERS,
    fields: Sequence[str] = (),
    schema: Path | None = None,
    complain: Callable[[str], object] = lambda text: None,
) -> _Scored:
    """Score rows of `answer`, `reference` and, optional, `task` (the task key) and `paths` (StructEval's key paths).

    A row's `cut` says that its answer ended at the limit of new tokens. Returns one dict a row, in order, with at least
    `score`, within [0, 1] or None where the kind does not judge the row, and `faults` where they are looked for; and
    the metrics. Every kind that judges gives `gen_score` (mean of the rows' scores, also per task) and
    `gen_samples` (rows judged). Under `structured` a row whose task names a format is judged by it, one whose reference
    is lines of `A -> B` by its edges, any other not at all. `none` and `samples` judge nothing. `path.py:function` is a
    measure of one's own: it gives the metrics, and what is wrong with it is told to `complain`. With a `schema` rows
    that ask for JSON, or for no format, have `schema_error`: None where the answer holds to it.
    """
    if kind == "extraction":
        pairs = [(row["answer"], row["reference"]) for row in rows]
        scores, metrics = extraction.score_rows(pairs, fields=fields)
        for row, result in zip(rows, scores, strict=True):
            result["faults"] = faults_of_extraction(row["answer"], result, cut=bool(row.get("cut")))
    elif kind == "structured":
        scores, metrics = _score_structured(rows, markers)
    elif kind in KINDS:
        scores, metrics = [{"score": None} for _ in rows], {}
    elif own.parts_of(kind):
        scores, metrics = [{"score": None} for _ in rows], _own_metrics(kind, rows, complain)
    else:
        raise ValueError(f"{kind!r} is not a kind of generation evaluation: {', '.join(KINDS)}")
    if schema and kind != "none":
        metrics |= _hold_to_schema(schema, rows, scores, markers)
    return scores, metrics | _mean_scores(rows, scores)


def _own_metrics(kind: str, rows: Sequence[Mapping[str, Any]], complain: Callable[[str], object]) -> dict[str, float]:
    known = ("task", "prompt", "reference", "extras")
    questions = [{name: row[name] for name in known if name in row} for row in rows]
    try:
        loaded = own.load_own(kind)
        assert loaded is not None
        measured = own.measure(loaded, [row["answer"] for row in rows], questions)
    except own.MeasureError as error:
        measured = own.Measured({}, [str(error)])
    for text in measured.complaints:
        complain(f"[WARNING] SFT_GEN_EVAL={kind}: {text}; left out of this evaluation")
    return measured.metrics


def _hold_to_schema(
    path: Path, rows: Sequence[Mapping[str, Any]], scores: Sequence[dict[str, Any]], markers: Sequence[str]
) -> dict[str, float]:
    """Writes `schema_error` into the rows' scores; the share of answers without one, over all and per task."""
    validator, held = own.load_schema(path), defaultdict[str, list[bool]](list)
    for row, result in zip(rows, scores, strict=True):
        task = row.get("task") or ""
        if structured.target_format(task) in (None, "json"):
            result["schema_error"] = own.first_error(validator, row["answer"], markers)
            for name in {own.SCHEMA_METRIC, f"{own.SCHEMA_METRIC}/{task}" if task else own.SCHEMA_METRIC}:
                held[name].append(result["schema_error"] is None)
    return {name: sum(each) / len(each) for name, each in sorted(held.items())}


def _score_structured(rows: Sequence[Mapping[str, Any]], markers: Sequence[str]) -> _Scored:
    scores: list[dict[str, Any]] = [{"score": None, "note": "no format and no paths to judge by"} for _ in rows]
    judged: list[tuple[str, str, structured.StructuredScore]] = []
    path_rows: list[int] = []
    for index, row in enumerate(rows):
        task_key = row.get("task") or ""
        if output_format := structured.target_format(task_key):
            result = structured.score_answer(
                row["answer"],
                output_format,
                reference=row["reference"],
                paths=row.get("paths") or (),
                markers=markers,
                cut=bool(row.get("cut")),
            )
            judged.append((task_key, output_format, result))
            scores[index] = result._asdict()
        elif edges.looks_like_paths(row["reference"]):
            path_rows.append(index)
    pairs = [(rows[index]["answer"], rows[index]["reference"]) for index in path_rows]
    edge_scores, edge_metrics = edges.score_rows(pairs, markers=markers)
    for index, edge_score in zip(path_rows, edge_scores, strict=True):
        scores[index] = edge_score
    return scores, structured.aggregate(judged) | edge_metrics


def _mean_scores(rows: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row, result in zip(rows, scores, strict=True):
        if result["score"] is not None:
            for name in {"gen_score", f"gen_score/{row['task']}" if row.get("task") else "gen_score"}:
                groups[name].append(result["score"])
    metrics = {name: sum(group) / len(group) for name, group in sorted(groups.items())}
    return metrics | ({"gen_samples": float(len(groups["gen_score"]))} if metrics else {})

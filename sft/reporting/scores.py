"""The generation-evaluation part of a report: scores over time, per format and task, forgetting, answers to read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.reporting.text import short
from sft.scoring import forgetting
from sft.scoring.faults import FAULTS, counted
from sft.scoring.formats import FORMATS
from sft.scoring.metrics import STRUCTURED_FIELDS, metric_direction
from sft.scoring.significance import Difference, paired_difference
from sft.stages import paths
from sft.storage.json_files import Facts, is_number, read_object, read_records

SHOWN_ANSWERS = 5
LONGEST_ANSWER = 2_000  # characters; an answer that never stopped would fill the page
DETAIL_METRICS = tuple(name for name in STRUCTURED_FIELDS if name.endswith("_rate"))


def _numbered(folder: Path, stem: str, suffix: str) -> list[tuple[int, Path]]:
    """Files such as gen_metrics_step40.json with their steps, in order of the step."""
    found = ((re.fullmatch(rf"{stem}(\d+)\.{suffix}", path.name), path) for path in folder.glob(f"{stem}*.{suffix}"))
    return sorted((int(match.group(1)), path) for match, path in found if match)


def read_evaluations(folder: Path, lines: list[Facts], notices: list[str]) -> dict[int, dict[str, float]]:
    """step -> generation metrics; the files count where metrics.jsonl has the same step."""
    evaluations: dict[int, dict[str, float]] = {}
    for line in lines:
        if metrics := _gen_metrics(line):
            evaluations.setdefault(line["step"], {}).update(metrics)
    for step, path in _numbered(folder, paths.GEN_METRICS, "json"):
        if metrics := _gen_metrics(read_object(path, notices)):
            evaluations.setdefault(step, {}).update(metrics)
    return dict(sorted(evaluations.items()))


def _gen_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k.startswith("gen_") and k != "gen_global_step" and is_number(v)}


def score_names(evaluations: Mapping[int, Mapping[str, float]]) -> list[str]:
    """gen_score and its formats; where there is none (extraction), the first six overall rates."""
    present = {name for metrics in evaluations.values() for name in metrics}
    if "gen_score" in present:
        return ["gen_score", *(f"gen_score/{name}" for name in FORMATS if f"gen_score/{name}" in present)]
    return sorted(name for name in present if "/" not in name and "_count" not in name)[:6]


def compared_scores(evaluations: Mapping[int, Mapping[str, float]]) -> Facts | None:
    """First against last evaluation: overall metrics, then per format, task and extracted field."""
    if not evaluations:
        return None
    steps = list(evaluations)
    first, last = evaluations[steps[0]] if len(steps) > 1 else {}, evaluations[steps[-1]]
    suffixes = sorted({name.split("/", 1)[1] for name in (*first, *last) if name.startswith("gen_score/")})
    fields = sorted({n.split("/", 1)[1] for n in (*first, *last) if n.startswith("gen_field_exact_match_rate/")})
    overall = sorted((n for n in {*first, *last} if "/" not in n), key=lambda name: (name != "gen_score", name))
    return {
        "first_step": steps[0] if len(steps) > 1 else None,
        "last_step": steps[-1],
        "details": [metric for metric in DETAIL_METRICS if any(name.startswith(f"{metric}/") for name in last)],
        "overall": [_compared(name, name, first, last) for name in overall],
        "formats": [_detailed(name, first, last) for name in FORMATS if name in suffixes],
        "tasks": [_detailed(name, first, last) for name in suffixes if name not in FORMATS],
        "fields": [_compared(name, f"gen_field_exact_match_rate/{name}", first, last) for name in fields],
    }


def _compared(label: str, name: str, first: Mapping[str, float], last: Mapping[str, float]) -> Facts:
    before, after = first.get(name), last.get(name)
    delta = after - before if before is not None and after is not None else None
    return {"name": label, "first": before, "last": after, "delta": delta, "better": _better(name, delta)}


def _better(name: str, delta: float | None) -> bool | None:
    if not delta:
        return None
    try:
        return delta > 0 if metric_direction(name) else delta < 0
    except ValueError:  # a count: neither way is better
        return None


def _detailed(name: str, first: Mapping[str, float], last: Mapping[str, float]) -> Facts:
    detail = {metric: last[f"{metric}/{name}"] for metric in DETAIL_METRICS if f"{metric}/{name}" in last}
    return _compared(name, f"gen_score/{name}", first, last) | {"detail": detail}


def matrix_facts(matrix: forgetting.Matrix | None) -> Facts | None:
    """The forgetting matrix as rows of cells, with the drops beyond the margin and their sentences."""
    if not matrix:
        return None
    found = forgetting.drops(matrix)
    lost = {(drop.model, drop.tasks): drop for drop in found}
    rows = [
        {"model": model, "cells": [_cell(matrix, model, tasks, lost.get((model, tasks))) for tasks in matrix.tasks]}
        for model in matrix.models
    ]
    columns, scores = forgetting.format_scores(matrix)
    facts = {"metric": matrix.metric, "margin": matrix.margin, "tasks": matrix.tasks, "rows": rows}
    return facts | {"drops": [drop.sentence() for drop in found], "columns": columns, "format_scores": scores}


def _cell(matrix: forgetting.Matrix, model: str, tasks: str, drop: forgetting.Drop | None) -> Facts:
    fall = drop and {"since": drop.since, "before": drop.before, "lost": drop.before - drop.after}
    return {"score": matrix.cell(model, tasks), "drop": fall, "change": _change(matrix, model, tasks)}


def _change(matrix: forgetting.Matrix, model: str, tasks: str) -> Facts | None:
    """Against the model before that was asked the same: the difference and its 95 % interval, where it is known."""
    before = [name for name in matrix.models[: matrix.models.index(model)] if matrix.cell(name, tasks) is not None]
    found = matrix.difference(before[-1], model, tasks) if before else None
    return found and {"since": before[-1], "real": found.real} | found._asdict()


def best_against_last(folder: Path, best: Mapping[str, Any]) -> Difference | None:
    """How much better the best model answered than that of the last evaluation, question by question; None where they
    are the same or the metric is no score of single answers."""
    metric, _, task = str(best.get("best_metric_name")).partition("/")
    files = dict(_numbered(folder, paths.GEN_SAMPLES, "jsonl"))
    if metric != "gen_score" or best.get("step") not in files or best["step"] == max(files):
        return None
    last, chosen = (
        [s["score"] for s in read_records(files[step]) if is_number(s.get("score")) and task in ("", s.get("task"))]
        for step in (max(files), best["step"])
    )
    return paired_difference(last, chosen) if last and len(last) == len(chosen) else None


def read_answers(folder: Path, notices: list[str]) -> Facts | None:
    """Answers of the last generation evaluation to read: the lowest and the highest scores where they differ, some of
    them where all are equal or (mode samples) nothing is scored; and how often which fault was found."""
    files = _numbered(folder, paths.GEN_SAMPLES, "jsonl")
    samples = read_records(files[-1][1], notices) if files else []
    if not samples:
        return None
    groups = {name: [_sample(sample) for sample in group] for name, group in _groups(samples).items()}
    faults = counted(sample.get("faults") or () for sample in samples)
    named = [{"name": name, "answers": count, "meaning": FAULTS[name]} for name, count in faults.items()]
    return {"step": files[-1][0], "count": len(samples), "faults": named} | groups


def _groups(samples: list[Facts]) -> dict[str, list[Facts]]:
    """No answer stands in two groups, and none of the lowest scores as much as one of the highest."""
    scored = sorted((s for s in samples if is_number(s.get("score"))), key=lambda sample: sample["score"])
    groups: dict[str, list[Facts]] = {"worst": [], "best": [], "equal": [], "unscored": []}
    if not scored:
        groups["unscored"] = samples[:SHOWN_ANSWERS]
    elif scored[0]["score"] == scored[-1]["score"]:
        groups["equal"] = scored[:SHOWN_ANSWERS]
    else:
        half = max(len(scored) // 2, 1)
        groups["worst"] = [s for s in scored[: min(SHOWN_ANSWERS, half)] if s["score"] < scored[-1]["score"]]
        best = scored[::-1][: min(SHOWN_ANSWERS, len(scored) - half)]
        groups["best"] = [s for s in best if s["score"] > groups["worst"][-1]["score"]]
    return groups


def _sample(sample: Facts) -> Facts:
    prompt = sample.get("prompt") or []
    turns = prompt if isinstance(prompt, list) else [{"role": "prompt", "content": prompt}]
    text = "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns if isinstance(turn, dict))
    texts = {"prompt": text, "answer": sample.get("answer"), "reference": sample.get("reference")}
    shown = {name: short("" if value is None else str(value), LONGEST_ANSWER) for name, value in texts.items()}
    known = [name for name in sample.get("faults") or () if name in FAULTS]
    judged = {name: sample.get(name) for name in ("score", "schema_error")}
    return {"task": sample.get("task") or "", "faults": known} | judged | shown

"""The variants of a stage beside each other: which is best, whether that is real, curves, scores and matrix rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from sft.reporting.facts import differing, stage_facts
from sft.reporting.language import Say, english
from sft.reporting.report import html_page, lines_chart, spoken
from sft.reporting.text import aligned, duration, printable, score, signed
from sft.scoring.forgetting import GENERAL, stage_number
from sft.scoring.significance import paired_difference
from sft.stages import paths
from sft.stages.variants import Variant, differences
from sft.storage.atomic import write_text
from sft.storage.json_files import Facts, read_object, read_records, write_json

Values = list[float | None]
_FIGURES = ("gen_score", "eval_loss", "general_accuracy")
_CURVES = {
    "gen_score": "Scores of generated answers",
    "eval_loss": "Evaluation loss",
    "loss": "Training loss",
    "learning_rate": "Learning rate",
}


def variants_facts(variants: Sequence[Variant], number: int) -> Facts:
    """What the page of a stage's variants holds. Ranked are those that are complete and asked the same; `left_out` says
    of every other one why it is not among them."""
    complete = [each for each in variants if each.status == "complete"]
    apart = {each.name: differences(complete[0].manifest, each.manifest) for each in complete[1:]}
    ranked = [each for each in complete if not apart.get(each.name)]
    left_out = [f"{each.name}: {each.status}" for each in variants if each not in complete]
    left_out += [f"{name}: differs in {', '.join(found)}" for name, found in apart.items() if found]
    metric, values = _compared(ranked)
    stages = {each.name: stage_facts(each.folder) for each in ranked}
    rows = [_row(each, stages[each.name], number) for each in ranked]
    rows = _ranked(rows, metric, values)
    facts = {
        "stage": number,
        "base_model": next((stage["base_model"] for stage in stages.values() if stage["base_model"]), None),
        "metric": metric,
        "questions": len(next(iter(values.values()), ())),
        "variants": rows,
        "columns": [name for name in _FIGURES if name != metric and any(row[name] is not None for row in rows)],
        "lead": lead(rows, metric, english),
        "left_out": left_out,
        "matrix": _matrix({row["name"]: stages[row["name"]] for row in rows}, f"stage {number}"),
        "differing_settings": differing({row["name"]: stages[row["name"]]["settings"] for row in rows}),
    }
    return printable(facts)


def _compared(variants: Sequence[Variant]) -> tuple[str | None, dict[str, Values]]:
    """By what variants can be compared, one by one: their answers' scores, else their loss on every validation row."""
    for metric, values_of in (("gen_score", _answer_scores), ("eval_loss", _row_losses)):
        found = {each.name: values_of(each) for each in variants}
        lengths = {len(values) for values in found.values()}
        if len(lengths) == 1 and any(value is not None for values in found.values() for value in values):
            return metric, found
    return None, {}


def _answer_scores(variant: Variant) -> Values:
    samples = read_records(variant.folder / f"{paths.GEN_SAMPLES}{variant.manifest.steps}.jsonl")
    return [sample.get("score") for sample in samples]


def _row_losses(variant: Variant) -> Values:
    """What each row adds to the mean loss per trained token: their mean is eval_loss."""
    record = read_object(variant.folder / paths.ROW_LOSSES, [])
    losses, tokens = record.get("losses") or [], record.get("tokens") or []
    return [loss * len(losses) / sum(tokens) for loss in losses] if sum(tokens) else []


def _row(variant: Variant, stage: Facts, number: int) -> Facts:
    metrics = variant.manifest.metrics
    return {name: metrics.get(name) for name in _FIGURES} | {
        "name": variant.name,
        "folder": variant.folder.name,
        "adopted": variant.adopted,
        "steps": stage["steps"],
        "seconds": stage["seconds"],
        "curves": stage["curves"],
    }


def _ranked(rows: list[Facts], metric: str | None, values: Mapping[str, Values]) -> list[Facts]:
    """Best first, each with its difference from the best, question by question."""
    if metric is None:
        return [row | {"value": None, "difference": None} for row in rows]
    means = {name: fmean(each for each in found if each is not None) for name, found in values.items()}
    order = sorted(rows, key=lambda row: means[row["name"]], reverse=metric == "gen_score")
    best = values[order[0]["name"]]
    return [
        row | {"value": means[row["name"]], "difference": _difference(best, values[row["name"]]) if place else None}
        for place, row in enumerate(order)
    ]


def _difference(best: Values, other: Values) -> Facts | None:
    pairs = [(x, y) for x, y in zip(best, other, strict=True) if x is not None and y is not None]
    found = paired_difference(*zip(*pairs, strict=True)) if pairs else None
    return found and {"real": found.real} | found._asdict()


def lead(rows: Sequence[Facts], metric: str | None, say: Say) -> list[str]:
    """The sentences on top: which variant is best, which can't be told from it, what would settle it."""
    if metric is None or len(rows) < 2:
        return []
    best, others = rows[0], [row for row in rows[1:] if row["difference"]]
    found = [say("Best: {name}, {metric} {value}.", name=best["name"], metric=metric, value=score(best["value"]))]
    unclear = [row for row in others if not row["difference"]["real"]]
    if not unclear:
        return [*found, say("The difference to every other variant is real: its 95 % interval leaves out 0.")]
    found.append(
        say("Not to be told from it: {names}: the 95 % interval of the difference holds 0.", names=_listed(unclear))
    )
    if needed := unclear[0]["difference"]["needed"]:
        pair = {"best": best["name"], "other": unclear[0]["name"]}
        found.append(
            say("About {needed} questions or rows would settle {best} against {other}.", needed=f"{needed:,}", **pair)
        )
    return found


def _listed(rows: Sequence[Facts]) -> str:
    return ", ".join(row["name"] for row in rows)


def _matrix(stages: Mapping[str, Facts], own: str) -> Facts | None:
    """The rows of the forgetting matrix that tell the variants apart: the model they all start from, then each."""
    found = {name: stage["forgetting"] for name, stage in stages.items() if stage["forgetting"]}
    if not found:
        return None
    first = next(iter(found.values()))
    named = {name for each in found.values() for name in each["tasks"]}
    tasks = sorted(named, key=lambda name: (name == GENERAL, stage_number(name)))
    before = [row for row in first["rows"] if row["model"] != own]
    start = [cell | {"change": None} for cell in _cells(first, before[-1], tasks)] if before else []
    rows = [{"model": before[-1]["model"], "cells": start}] if before else []
    for name, each in found.items():
        mine = next((row for row in each["rows"] if row["model"] == own), None)
        rows += [{"model": name, "cells": _cells(each, mine, tasks)}] if mine else []
    drops = [f"{name}: {text}" for name, each in found.items() for text in each["drops"] if text.startswith(own)]
    return {"metric": first["metric"], "margin": first["margin"], "tasks": tasks, "rows": rows, "drops": drops}


def _cells(matrix: Facts, row: Facts, tasks: Sequence[str]) -> list[Facts]:
    cells = dict(zip(matrix["tasks"], row["cells"], strict=True))
    return [cells.get(name) or {"score": None, "drop": None, "change": None} for name in tasks]


def variants_table(facts: Facts) -> str:
    """Plain text: the variants from the best down, with the interval of the difference from the best."""
    metric, extra = facts["metric"] or "eval_loss", facts["columns"]
    table = [["variant", metric, "against the best", "95 % interval", *extra, "steps", "time"]]
    for row in facts["variants"]:
        gap = row["difference"]
        interval = f"{signed(gap['low'])} to {signed(gap['high'])}{' ' if gap['real'] else '?'}" if gap else ""
        shown = score(row[metric] if row["value"] is None else row["value"])
        figures = [shown, signed(gap["mean"]) if gap else "", interval, *(score(row[name]) for name in extra)]
        table.append([row["name"], *figures, f"{row['steps']:,}", duration(row["seconds"])])
    lines = [aligned(table)] if facts["variants"] else []
    if any(row["difference"] and not row["difference"]["real"] for row in facts["variants"]):
        lines.append("? holds 0: may be chance")
    return "\n".join([*lines, *facts["lead"], *(f"Not compared: {text}" for text in facts["left_out"])])


def write_variants_report(variants: Sequence[Variant], target: Path, number: int, language: str = "auto") -> Facts:
    """Writes the page of a stage's variants to `target` and its facts beside it as .json, and returns them."""
    facts = variants_facts(variants, number)
    say = spoken(language)["_"]
    links = [quote(f"{row['folder']}/{paths.REPORT}") for row in facts["variants"]]
    extra = {
        "links": links,
        "charts": _charts(facts["variants"], say),
        "lead": lead(facts["variants"], facts["metric"], say),
    }
    write_json(target.with_suffix(".json"), facts)
    write_text(target, html_page("variants.html.jinja", facts | extra, language))
    return facts


def _charts(rows: Sequence[Facts], say: Say) -> list[Facts]:
    """One figure per kind of curve, one line per variant."""
    charts: list[Facts] = []
    for name, title in _CURVES.items():
        curves: dict[str, Any] = {row["name"]: row["curves"][name] for row in rows if name in row["curves"]}
        axis = {"unit": name == "gen_score", "zero": name == "learning_rate"}
        charts += lines_chart(curves, say(title), label=say("step"), **axis)
    return charts

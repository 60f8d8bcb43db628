"""The forgetting matrix: what each model of a ladder scores on each stage's tasks, and which earlier skills fell.

A matrix is the manifest's ``forgetting`` record (contract section 7):
``{"models": ["base", "stage 1"], "tasks": ["stage 1"], "scores": [[0.1], [0.9]], "metric": "gen_score",
"by_task": {model: {tasks: {task key: score}}}}``; a cell that was not scored is None or absent.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sft.scoring.formats import FORMATS
from sft.scoring.metrics import FORGETTING_MARGIN

NAMED = 6  # task keys in a sentence, the rest are counted


@dataclass(frozen=True)
class Drop:
    """A model scores lower on an earlier stage's tasks than a model before it did, by more than the margin."""

    model: str
    tasks: str
    since: str  # the model that scored best on these tasks before
    before: float
    after: float
    fell: tuple[tuple[str, float, float], ...]  # (task key, before, after), the largest loss first

    def sentence(self) -> str:
        named = "; ".join(f"{key} {before:.3f} -> {after:.3f}" for key, before, after in self.fell[:NAMED])
        named += f"; and {len(self.fell) - NAMED} more" if len(self.fell) > NAMED else ""
        lost = f"{self.model} lost {self.before - self.after:.3f} on the tasks of {self.tasks}"
        return f"{lost} ({self.since} scored {self.before:.3f}, now {self.after:.3f})" + (f": {named}" if named else "")


def stage_number(label: str) -> int:
    """ "stage 2" -> 2; "base" -> 0."""
    digits = re.search(r"\d+$", label)
    return int(digits.group()) if digits else 0


def cell(matrix: Mapping[str, Any], model: str, tasks: str) -> float | None:
    """The score of one model on one stage's tasks, None where it was not measured."""
    try:
        score = matrix["scores"][matrix["models"].index(model)][matrix["tasks"].index(tasks)]
    except (IndexError, ValueError):
        return None
    return score if _is_score(score) else None


def _is_score(score: Any) -> bool:
    return isinstance(score, int | float) and math.isfinite(score)


def drops(matrix: Mapping[str, Any], margin: float = FORGETTING_MARGIN) -> list[Drop]:
    """Every model's losses on stages before its own, against the best earlier model that had learnt them."""
    found = (_drop(matrix, model, tasks) for model in matrix["models"] for tasks in matrix["tasks"])
    return [drop for drop in found if drop and drop.before - drop.after > margin]


def _drop(matrix: Mapping[str, Any], model: str, tasks: str) -> Drop | None:
    after, learnt = cell(matrix, model, tasks), stage_number(tasks)
    earlier = {
        other: score
        for other in matrix["models"]
        if learnt <= stage_number(other) < stage_number(model) and (score := cell(matrix, other, tasks)) is not None
    }
    if after is None or not earlier:
        return None
    since = max(earlier, key=lambda other: earlier[other])
    return Drop(model, tasks, since, earlier[since], after, _fallen(matrix, since, model, tasks))


def _fallen(matrix: Mapping[str, Any], since: str, model: str, tasks: str) -> tuple[tuple[str, float, float], ...]:
    by_task = matrix.get("by_task") or {}
    before, after = (by_task.get(name, {}).get(tasks, {}) for name in (since, model))
    both = [key for key in before if _is_score(before[key]) and _is_score(after.get(key))]
    lost = [(key, before[key], after[key]) for key in both if after[key] < before[key]]
    return tuple(sorted(lost, key=lambda item: (round(item[2] - item[1], 6), item[0])))


def joined(recorded: Iterable[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """One matrix from those of several stages; of two entries for a cell the later one counts. None from nothing."""
    matrices = [matrix for matrix in recorded if matrix]
    if not matrices:
        return None
    models, tasks = (_labels(matrices, axis) for axis in ("models", "tasks"))
    scores = [[_latest(matrices, model, name) for name in tasks] for model in models]
    by_task: dict[str, dict[str, dict[str, float]]] = {model: {} for model in models}
    for matrix in matrices:
        for model, stages in (matrix.get("by_task") or {}).items():
            by_task.setdefault(model, {}).update(stages)
    metric = matrices[-1].get("metric", "gen_score")
    return {"models": models, "tasks": tasks, "scores": scores, "metric": metric, "by_task": by_task}


def _labels(matrices: list[Mapping[str, Any]], axis: str) -> list[str]:
    return sorted(
        {label for matrix in matrices for label in matrix[axis]}, key=lambda label: (stage_number(label), label)
    )


def _latest(matrices: list[Mapping[str, Any]], model: str, tasks: str) -> float | None:
    scores = [cell(matrix, model, tasks) for matrix in matrices]
    return next((score for score in reversed(scores) if score is not None), None)


def format_of(task_key: str) -> str:
    """The output format of a task key (``text_to_toml`` -> ``toml``); the key itself when it names none."""
    return task_key.rsplit("_to_", 1)[-1] or "other"


def format_scores(matrix: Mapping[str, Any]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Columns ("overall", then the formats there are) and each model's scores.

    Overall is the mean over the stages' tasks that the model was scored on, a format the mean over its task keys.
    """
    scores: dict[str, dict[str, float]] = {}
    for model in matrix["models"]:
        overall = [score for tasks in matrix["tasks"] if (score := cell(matrix, model, tasks)) is not None]
        by_format = _by_format((matrix.get("by_task") or {}).get(model, {}))
        scores[model] = ({"overall": fmean(overall)} if overall else {}) | by_format
    present = {column for row in scores.values() for column in row} - {"overall"}
    known = [column for column in FORMATS if column in present]
    return ["overall", *known, *sorted(present - set(known))], scores


def _by_format(stages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for by_key in stages.values():
        for key, score in by_key.items():
            if _is_score(score):
                grouped.setdefault(format_of(key), []).append(score)
    return {name: fmean(values) for name, values in grouped.items()}

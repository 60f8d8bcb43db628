"""The forgetting matrix: what each model of a ladder scores on each stage's tasks, and which earlier skills fell."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from sft.scoring.formats import FORMATS
from sft.scoring.metrics import FORGETTING_MARGIN
from sft.scoring.significance import Difference, paired_difference
from sft.scoring.structured import target_format

NAMED = 6  # task keys in a sentence, the rest are counted
GENERAL = "general"
"""The column of the general questions, which belong to no stage: the base model could answer them."""
TaskScores = dict[str, float]
"""Scores of one model on one stage's tasks: "" is the score over all of them, any other name a task key."""


def stage_number(label: str) -> int:
    """ "stage 2" -> 2; "base" -> 0."""
    digits = re.search(r"\d+$", label)
    return int(digits.group()) if digits else 0


def _place(label: str) -> tuple[float, str]:
    """Base, stages by number, the general questions last."""
    return math.inf if label == GENERAL else stage_number(label), label


def _is_score(score: Any) -> bool:
    return isinstance(score, int | float) and math.isfinite(score)


@dataclass
class Matrix:
    """Scores by model ("base", "stage 1") and by the stage whose questions were asked; what was not asked is absent."""

    table: dict[str, dict[str, TaskScores]] = field(default_factory=dict)
    metric: str = "gen_score"
    margin: float = FORGETTING_MARGIN
    # The same cells question by question, in the order of the stage's questions; None where one was not judged.
    questions: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return sorted(self.table, key=_place)

    @property
    def tasks(self) -> list[str]:
        names = {name for scores in self.table.values() for name in scores}
        return sorted(names, key=_place)

    def cell(self, model: str, tasks: str) -> float | None:
        """The score of one model on one stage's tasks, None where it was not measured."""
        return self.table.get(model, {}).get(tasks, {}).get("")

    def by_key(self, model: str, tasks: str) -> TaskScores:
        return {key: score for key, score in self.table.get(model, {}).get(tasks, {}).items() if key}

    def put(self, model: str, tasks: str, scores: TaskScores, questions: Sequence[float | None] = ()) -> None:
        """Sets one cell."""
        self.table.setdefault(model, {})[tasks] = scores
        self.questions.setdefault(model, {})[tasks] = list(questions)

    def update(self, other: "Matrix") -> None:
        """Adds the cells of another; of two for one cell the later counts."""
        for model, stages in other.table.items():
            for tasks, scores in stages.items():
                self.put(model, tasks, scores, other.questions.get(model, {}).get(tasks, ()))

    def difference(self, before: str, after: str, tasks: str) -> Difference | None:
        """How two models differ on a stage's tasks, with its interval; None where they can't be paired."""
        first, second = (self.questions.get(model, {}).get(tasks, []) for model in (before, after))
        if len(first) != len(second):
            return None
        pairs = [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]
        return paired_difference(*zip(*pairs, strict=True)) if pairs else None

    @classmethod
    def read(cls, record: Any) -> "Matrix | None":
        """The matrix of a manifest's `forgetting`; None where there is none, or it is not whole."""
        if not isinstance(record, dict):
            return None
        models, tasks, scores = (record.get(name) or [] for name in ("models", "tasks", "scores"))
        named = all(isinstance(label, str) for label in (*models, *tasks))
        rows = isinstance(scores, list) and len(scores) == len(models) and all(isinstance(row, list) for row in scores)
        if not (models and tasks and named and rows):
            return None
        by_task, asked = record.get("by_task") or {}, record.get("by_question") or {}
        table: dict[str, dict[str, TaskScores]] = {
            model: {
                name: {key: s for key, s in by_task.get(model, {}).get(name, {}).items() if _is_score(s)} | {"": score}
                for name, score in zip(tasks, row, strict=False)
                if _is_score(score)
            }
            for model, row in zip(models, scores, strict=True)
        }
        questions = {model: {name: asked.get(model, {}).get(name, []) for name in table[model]} for model in table}
        return cls(table, record.get("metric", "gen_score"), record.get("margin", FORGETTING_MARGIN), questions)

    def record(self) -> dict[str, Any]:
        """The manifest's form: models, tasks, scores as rows with None where nothing was measured, and by_task."""
        models, tasks = self.models, self.tasks
        return {
            "metric": self.metric,
            "margin": self.margin,
            "models": models,
            "tasks": tasks,
            "scores": [[self.cell(model, name) for name in tasks] for model in models],
            "by_task": {model: {name: self.by_key(model, name) for name in self.table[model]} for model in models},
            "by_question": {
                model: {name: found for name, found in self.questions.get(model, {}).items() if found}
                for model in models
            },
        }


@dataclass(frozen=True)
class Drop:
    """A model scores lower on an earlier stage's tasks than a model before it did, by more than the margin."""

    model: str
    tasks: str
    since: str  # the model that scored best on these tasks before
    before: float
    after: float
    fell: tuple[tuple[str, float, float], ...]  # (task key, before, after), the largest loss first
    difference: Difference | None = None  # question by question, where that is known

    def sentence(self) -> str:
        named = "; ".join(f"{key} {before:.3f} -> {after:.3f}" for key, before, after in self.fell[:NAMED])
        named += f"; and {len(self.fell) - NAMED} more" if len(self.fell) > NAMED else ""
        where = "general questions" if self.tasks == GENERAL else f"tasks of {self.tasks}"
        lost = f"{self.model} lost {self.before - self.after:.3f} on the {where}"
        lost += f" ({self.since} scored {self.before:.3f}, now {self.after:.3f}{self._interval()})"
        return lost + (f": {named}" if named else "")

    def _interval(self) -> str:
        if self.difference is None:
            return ""
        low, high, needed = -self.difference.high, -self.difference.low, self.difference.needed
        text = f"; 95 % interval of the loss {low:.3f} to {high:.3f}"
        if self.difference.real:
            return text
        return f"{text}, within noise" + (f"; about {needed:,} questions would settle it" if needed else "")


def drops(matrix: Matrix) -> list[Drop]:
    """Every model's losses on stages before its own, against the best earlier model that had learnt them."""
    found = (_drop(matrix, model, tasks) for model in matrix.models for tasks in matrix.tasks)
    return [drop for drop in found if drop and drop.before - drop.after > matrix.margin]


def _drop(matrix: Matrix, model: str, tasks: str) -> Drop | None:
    after, learnt = matrix.cell(model, tasks), stage_number(tasks)
    earlier = {
        other: score
        for other in matrix.models
        if learnt <= stage_number(other) < stage_number(model) and (score := matrix.cell(other, tasks)) is not None
    }
    if after is None or not earlier:
        return None
    since = max(earlier, key=lambda other: earlier[other])
    # Most cells fell by nothing worth an interval.
    real = matrix.difference(since, model, tasks) if earlier[since] - after > matrix.margin else None
    return Drop(model, tasks, since, earlier[since], after, _fallen(matrix, since, model, tasks), real)


def _fallen(matrix: Matrix, since: str, model: str, tasks: str) -> tuple[tuple[str, float, float], ...]:
    before, after = (matrix.by_key(name, tasks) for name in (since, model))
    lost = [(key, before[key], after[key]) for key in before if after.get(key, math.inf) < before[key]]
    return tuple(sorted(lost, key=lambda item: (round(item[2] - item[1], 6), item[0])))


def joined(matrices: Iterable[Matrix | None]) -> Matrix | None:
    """One matrix from those of several stages; of two entries for a cell the later one counts. None from nothing."""
    found = [matrix for matrix in matrices if matrix]
    if not found:
        return None
    whole = Matrix(metric=found[-1].metric, margin=found[-1].margin)
    for matrix in found:
        whole.update(matrix)
    return whole


def format_of(task_key: str) -> str:
    """The output format of a task key (``text_to_toml`` -> ``toml``); the key itself when it names none."""
    return target_format(task_key) or task_key.rsplit("_to_", 1)[-1] or "other"


def format_scores(matrix: Matrix) -> tuple[list[str], dict[str, TaskScores]]:
    """Columns ("overall", then the formats there are) and each model's scores.

    Overall is the mean over the stages' tasks that every model was asked, a format the mean over those of its task keys
    that every model asked for that format has: whatever stands in one column can be compared.
    """
    models, pairs = matrix.models, {model: _by_format(matrix, model) for model in matrix.models}
    asked_of_stages = [tasks for tasks in matrix.tasks if tasks != GENERAL]
    common = [tasks for tasks in asked_of_stages if all(matrix.cell(model, tasks) is not None for model in models)]
    scores: dict[str, TaskScores] = {model: {} for model in models}
    for model in models if common else ():
        scores[model]["overall"] = fmean(matrix.table[model][tasks][""] for tasks in common)
    present = {name for found in pairs.values() for name in found}
    known = [name for name in FORMATS if name in present]
    columns = [*known, *sorted(present - set(known))]
    for name in columns:
        asked = [model for model in models if name in pairs[model]]
        same = set.intersection(*(set(pairs[model][name]) for model in asked))
        for model in asked if same else ():
            scores[model][name] = fmean(pairs[model][name][pair] for pair in sorted(same))
    return ["overall", *(name for name in columns if any(name in row for row in scores.values()))], scores


def _by_format(matrix: Matrix, model: str) -> dict[str, dict[tuple[str, str], float]]:
    """format -> {(stage, task key): score}."""
    grouped: dict[str, dict[tuple[str, str], float]] = {}
    for tasks in matrix.table[model].keys() - {GENERAL}:
        for key, score in matrix.by_key(model, tasks).items():
            grouped.setdefault(format_of(key), {})[tasks, key] = score
    return grouped

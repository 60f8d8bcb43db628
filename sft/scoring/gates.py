"""Whether a stage may be built upon: its own tasks rose, and nothing that was there before fell (SFT_GATE)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sft.scoring.forgetting import GENERAL, Drop, Matrix, drops, stage_number
from sft.scoring.significance import Difference

NOTHING_COMPARED = "nothing could be compared: the stage has no scores beside those of a model before it"


class Check(NamedTuple):
    """One comparison of a stage's model with one before it. `reason` says why it failed, "" where it held."""

    tasks: str
    since: str
    before: float
    after: float
    difference: Difference | None
    reason: str = ""

    def sentence(self) -> str:
        where = "general questions" if self.tasks == GENERAL else f"tasks of {self.tasks}"
        known = self.difference.sentence() if self.difference else f"{self.after - self.before:+.3f}"
        return f"{where}: {self.before:.3f} -> {self.after:.3f} ({known})"

    def record(self) -> dict[str, Any]:
        """As JSON: the interval of the difference where the answers could be paired."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in ("tasks", "since", "before", "after")}
        found = self.difference
        interval = found and found._asdict() | {"real": found.real}
        return plain | {"difference": interval, "failed": bool(self.reason), "reason": self.reason}


class Gate(NamedTuple):
    """What was compared for a stage; it passes where something was and all of it held."""

    stage: int
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> list[str]:
        """Why it fails; [] where it passes."""
        return [check.reason for check in self.checks if check.reason] if self.checks else [NOTHING_COMPARED]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def record(self) -> dict[str, Any]:
        """The `gate` of stage.json and report.json."""
        checks = [check.record() for check in self.checks]
        return {"passed": self.passed, "reasons": self.reasons, "checks": checks}


def judge(matrix: Matrix | None, stage: int) -> Gate:
    """The gate of a stage by the matrix it recorded and its margin."""
    return Gate(stage, tuple(_checks(matrix, stage)) if matrix else ())


def _checks(matrix: Matrix, stage: int) -> Iterator[Check]:
    model = f"stage {stage}"
    fallen = {drop.tasks: drop for drop in drops(matrix) if drop.model == model}
    for tasks in matrix.tasks:
        after = matrix.cell(model, tasks)
        before = {
            other: score
            for other in matrix.models
            if stage_number(other) < stage and (score := matrix.cell(other, tasks)) is not None
        }
        if after is None or not before:
            continue
        if tasks == model:
            yield _own(matrix, tasks, list(before)[-1], after)
        elif stage_number(tasks) < stage:
            learnt = {other: score for other, score in before.items() if stage_number(other) >= stage_number(tasks)}
            if learnt:
                since = max(learnt, key=lambda other: learnt[other])
                difference = matrix.difference(since, model, tasks)
                yield _earlier(Check(tasks, since, learnt[since], after, difference), fallen.get(tasks))


def _own(matrix: Matrix, model: str, since: str, after: float) -> Check:
    before = matrix.cell(since, model)
    assert before is not None
    check = Check(model, since, before, after, matrix.difference(since, model, model))
    rose = after > before
    return check if rose else check._replace(reason=f"{model} did not raise its own {check.sentence()}")


def _earlier(check: Check, drop: Drop | None) -> Check:
    """A fall counts beyond the margin and outside its interval; one that can't be paired, by the margin alone."""
    if drop is None or (check.difference is not None and not check.difference.real):
        return check
    return check._replace(reason=drop.sentence())

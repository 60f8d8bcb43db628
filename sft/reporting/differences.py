"""Where the answers of two stages to the same questions lie on disk, and what changed in them."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sft.reporting.text import aligned
from sft.scoring.differences import CHANGES, Change, changes, counted, score_difference
from sft.scoring.significance import Difference
from sft.stages import paths
from sft.storage.json_files import Facts, read_records


class Compared(NamedTuple):
    """Two models on one stage's questions. `missing` says why there is nothing to compare, "" where there is, and
    `again` which stage would leave the answers when trained again."""

    questions: int
    found: list[Change]
    difference: Difference | None = None
    missing: str = ""
    again: int = 0


def answers_of(folders: dict[int, Path], model: int, questions: int) -> Path:
    """The file with a stage's model's final answers to the questions of a stage; it need not be there."""
    if model == questions:
        steps = _steps(folders[model])
        return folders[model] / f"{paths.GEN_SAMPLES}{max(steps, default=0)}.jsonl"
    if model > questions:
        return folders[model] / f"{paths.SAMPLES_OF_STAGE}{questions}.jsonl"
    if model == questions - 1:  # what the stage started from
        return folders[questions] / f"{paths.GEN_SAMPLES}0.jsonl"
    return folders[questions] / f"{paths.SAMPLES_BY_STAGE}{model}.jsonl"


def _steps(folder: Path) -> list[int]:
    found = (re.fullmatch(rf"{paths.GEN_SAMPLES}(\d+)\.jsonl", path.name) for path in folder.glob("*.jsonl"))
    return [int(match[1]) for match in found if match]


def compare_stages(folders: dict[int, Path], one: int, other: int) -> list[Compared]:
    """What changed from the model of stage `one` to that of stage `other`, on the questions of every stage up to the
    later of them. `folders`: of all stages by number."""
    return [_compare(folders, one, other, number) for number in folders if number <= max(one, other)]


def _compare(folders: dict[int, Path], one: int, other: int, questions: int) -> Compared:
    files = [answers_of(folders, model, questions) for model in (one, other)]
    absent = {
        model: f"no answers of stage {model} to the questions of stage {questions} ({file})"
        for model, file in zip((one, other), files, strict=True)
        if not file.is_file()
    }
    if absent:
        again = min(max(model, questions) for model in absent)
        return Compared(questions, [], missing="; ".join(absent.values()), again=again)
    before, after = (read_records(file) for file in files)
    try:
        return Compared(questions, changes(before, after), score_difference(before, after))
    except (ValueError, KeyError, TypeError):
        missing = f"{files[0]} and {files[1]} are not about the same questions"
        return Compared(questions, [], missing=missing, again=max(one, other))


def table(found: Sequence[Change]) -> str:
    """Per format and task how many answers changed in which way."""
    rows = [["", *CHANGES]]
    rows += [[name or "all", *(str(counts[kind]) for kind in CHANGES)] for name, counts in counted(found).items()]
    return aligned(rows)


def ladder_changes(folders: dict[int, Path], shown: int = 3) -> list[Facts]:
    """For the ladder's report: from each stage to the next, on the questions of each, with the first answers that
    broke. Pairs without answers are left out."""
    numbers = sorted(folders)
    facts: list[Facts] = []
    for one, other in pairwise(numbers):
        for each in compare_stages(folders, one, other):
            if each.found:
                broken = [record(change) for change in each.found if change.kind == "broken"]
                counts = [{"name": name, **found} for name, found in counted(each.found).items()]
                pair = {"before": one, "after": other, "questions": each.questions}
                facts.append(pair | {"counts": counts, "broken": broken[:shown]})
    return facts


def record(change: Change) -> dict[str, Any]:
    """As JSON."""
    return change._asdict() | {"keys": [key._asdict() for key in change.keys]}

#!/usr/bin/env python3
"""Score answers made elsewhere: `python official_content/score_outputs.py TASKS.json OUTPUTS.json [--json]`.

`--with OTHER.json` compares with another model's answers to the same tasks, and says whether the difference is real.

TASKS.json is a list of StructEval rows: `task_id`, `output_type` ("JSON") or `task_name` ("Text to JSON"), and, where
there are any, `raw_output_metric` (key paths). OUTPUTS.json is a list of {"task_id", "generation"}, one per task.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft.errors import Problems
from sft.programs.command_line import run_program
from sft.scoring.faults import FAULTS, counted
from sft.scoring.formats import FORMATS
from sft.scoring.significance import Difference, paired_difference
from sft.scoring.structured import StructuredScore, aggregate, score_answer, target_format

_COLUMNS = {
    "parses": "gen_parse_rate",
    "format": "gen_format_rate",
    "only": "gen_only_rate",
    "keys": "gen_key_rate",
    "score": "gen_score",
    "StructEval": "gen_structeval_score",
}
_SHOWN = 5


def main() -> None:
    """Scores on stdout; Problems for what is wrong with the files."""
    options = _parse_arguments()
    # A lone surrogate in a task's name must not end the program with a traceback.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    tasks, left_out = read_tasks(options.tasks)
    generations = read_generations(options.outputs, tasks)
    left_out["answers to none of the tasks scored"] = len(generations) - len(tasks)
    scores = _scores(generations, tasks)
    metrics = aggregate([(task["key"], task["format"], score) for task, score in scores])
    document, table = _document(scores, metrics, +left_out), _table(scores, metrics, +left_out)
    if options.other:
        differences = _differences(scores, _scores(read_generations(options.other, tasks), tasks))
        document["difference"] = {name: found._asdict() | {"real": found.real} for name, found in differences.items()}
        table += f"\n\n{options.other} against {options.outputs} (gen_score, on the same tasks)\n" + "\n".join(
            f"{name:<12}{found.sentence()}" for name, found in differences.items()
        )
    print(json.dumps(document, ensure_ascii=False, indent=2) if options.json else table)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score structured answers as StructEval-T does, and more strictly.")
    parser.add_argument("tasks", metavar="TASKS.json", type=Path, help="StructEval rows")
    parser.add_argument("outputs", metavar="OUTPUTS.json", type=Path, help='[{"task_id": ..., "generation": ...}]')
    parser.add_argument("--with", dest="other", metavar="OTHER.json", type=Path, help="another model's answers")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the tables")
    return parser.parse_args()


# Reading -------------------------------------------------------------------------------------------------------------


def read_tasks(path: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Tasks as {task_id, key, format, paths}, and counts of the rows left out: other formats (HTML, ...)."""
    rows = _read_rows(path)
    problems = _shape_problems(path, rows) or _task_problems(path, rows)
    if problems:
        raise Problems(problems)
    tasks, left_out = [], Counter[str]()
    for row in rows:
        if output_format := target_format(_asked_format(row)):
            tasks.append(
                {
                    "task_id": row["task_id"],
                    "key": _task_key(row, output_format),
                    "format": output_format,
                    "paths": row.get("raw_output_metric") or [],
                }
            )
        else:
            left_out[f"tasks of format {_asked_format(row)}"] += 1
    if not tasks:
        raise Problems([f"{path}: no task asks for one of {', '.join(FORMATS).upper()}; these are what is scored here"])
    return tasks, left_out


def read_generations(path: Path, tasks: Sequence[dict[str, Any]]) -> dict[str, str]:
    """All answers by task_id, one to every task at least."""
    rows = _read_rows(path)
    problems = _shape_problems(path, rows) or [
        f'{path}, task {row["task_id"]}: generation={row.get("generation")!r:.60} is not text; write "" for no answer'
        for row in rows
        if not isinstance(row.get("generation"), str)
    ]
    if problems:
        raise Problems(problems[:_SHOWN])
    answered = {row["task_id"]: row["generation"] for row in rows}
    if missing := [task["task_id"] for task in tasks if task["task_id"] not in answered]:
        raise Problems([f'{path}: no answer to {_listed(missing)}; every task needs one, "" if the model gave none'])
    return answered


def _read_rows(path: Path) -> list[Any]:
    try:
        # json finds UTF-8, -16 and -32, with and without a byte order mark.
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise Problems([f"{path}: cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise Problems([f"{path}: is not UTF-8 (at byte {error.start:,}); convert it, e.g. with iconv"]) from error
    except json.JSONDecodeError as error:
        raise Problems([f"{path}, line {error.lineno}, column {error.colno}: is not JSON: {error.msg}"]) from error
    except (RecursionError, ValueError) as error:
        raise Problems([f"{path}: is not usable JSON: {error}"]) from error
    if not isinstance(rows, list) or not rows:
        raise Problems([f"{path}: must be a JSON list of objects with at least one entry"])
    return rows


def _shape_problems(path: Path, rows: Sequence[Any]) -> list[str]:
    wrong = [
        f"{path}, entry {number}: must be an object with a task_id in quotes"
        for number, row in enumerate(rows, 1)
        if not isinstance(row, dict) or not isinstance(row.get("task_id"), str)
    ]
    if wrong:
        return wrong[:_SHOWN]
    twice = [identity for identity, count in Counter(row["task_id"] for row in rows).items() if count > 1]
    return [f"{path}: more than one entry for {_listed(twice)}; keep one"] if twice else []


def _task_problems(path: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    problems = []
    for row in rows:
        paths = row.get("raw_output_metric") or []
        if not isinstance(paths, list) or not all(isinstance(key_path, str) for key_path in paths):
            problems.append(f"{path}, task {row['task_id']}: raw_output_metric must be a list of key paths (texts)")
        if not _asked_format(row):
            problems.append(f"{path}, task {row['task_id']}: needs output_type (JSON, ...) or task_name (Text to JSON)")
    return problems[:_SHOWN]


def _asked_format(row: dict[str, Any]) -> str:
    output_type, task_name = row.get("output_type"), row.get("task_name")
    if isinstance(output_type, str) and output_type.strip():
        return output_type
    return task_name if isinstance(task_name, str) else ""


def _task_key(row: dict[str, Any], output_format: str) -> str:
    """`text_to_json`, from the task's name, else from its input and output types."""
    if isinstance(row.get("task_name"), str) and row["task_name"].strip():
        return "_".join(row["task_name"].lower().split())
    source = row.get("input_type")
    return f"{source.strip().lower()}_to_{output_format}" if isinstance(source, str) and source.strip() else ""


def _listed(identities: Sequence[str]) -> str:
    shown = ", ".join(identities[:_SHOWN])
    return shown + (f" and {len(identities) - _SHOWN} more" if len(identities) > _SHOWN else "")


# Showing -------------------------------------------------------------------------------------------------------------

_Scored = Sequence[tuple[dict[str, Any], StructuredScore]]


def _scores(generations: dict[str, str], tasks: Sequence[dict[str, Any]]) -> _Scored:
    return [(task, score_answer(generations[task["task_id"]], task["format"], paths=task["paths"])) for task in tasks]


def _differences(before: _Scored, after: _Scored) -> dict[str, Difference]:
    """How the second scores differ from the first, over all tasks and per format."""
    groups: dict[str, list[tuple[float, float]]] = {"all tasks": []}
    for (task, first), (_, second) in zip(before, after, strict=True):
        for name in ("all tasks", task["format"]):
            groups.setdefault(name, []).append((first.score, second.score))
    return {name: paired_difference(*zip(*pairs, strict=True)) for name, pairs in groups.items()}


def _document(scores: _Scored, metrics: dict[str, float], left_out: Counter[str]) -> dict[str, Any]:
    answers = [
        {"task_id": task["task_id"], "task": task["key"], "format": task["format"], **score._asdict()}
        for task, score in scores
    ]
    faults = counted(score.faults for _, score in scores)
    return metrics | {
        "answers": len(answers),
        "faults": faults,
        "left_out": dict(left_out),
        "metrics": metrics,  # as at the top level: where they stood before
        "scores": answers,
    }


def _table(scores: _Scored, metrics: dict[str, float], left_out: Counter[str]) -> str:
    formats = Counter(task["format"] for task, _ in scores)
    keys = Counter(task["key"] for task, _ in scores if task["key"])
    width = max(map(len, ("all tasks", *formats, *keys)))
    lines = [" ".join([" " * width, f"{'answers':>8}", *(f"{title:>10}" for title in _COLUMNS)])]
    for suffix, count in [("", len(scores)), *sorted(formats.items()), *sorted(keys.items())]:
        rates = [metrics.get(name + (f"/{suffix}" if suffix else "")) for name in _COLUMNS.values()]
        cells = [f"{'-' if rate is None else format(rate, '.3f'):>10}" for rate in rates]
        lines.append(" ".join([f"{suffix or 'all tasks':<{width}}", f"{count:>8}", *cells]))
    if unjudged := sum(score.key_rate is None for _, score in scores):
        lines.append(f"{unjudged} tasks have no raw_output_metric: their score is whether they parse.")
    if faults := counted(score.faults for _, score in scores):
        lines += ["", "What is wrong with the answers (one may have several faults)"]
        lines += [f"{count:>8}  {name:<16}{FAULTS[name]}" for name, count in faults.items()]
    if left_out:
        lines.append("Left out: " + ", ".join(f"{count} {what}" for what, count in left_out.items()))
    return "\n".join(lines)


def program() -> int:
    """The installed command."""
    return run_program(main)


if __name__ == "__main__":
    raise SystemExit(program())

"""Reading what a run leaves behind, also while it runs and after it was killed."""

import json
import math
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


def read_json(path: Path, notices: list[str]) -> Facts:
    """The JSON object in a file; empty when there is none, and a notice when it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        notices.append(f"{path.name} could not be read: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def read_lines(path: Path, notices: list[str]) -> list[Facts]:
    """The JSON objects of a .jsonl file; a line cut short by a kill is skipped and counted."""
    if not path.is_file():
        return []
    rows, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row, broken = None, broken + 1
        if isinstance(row, dict):
            rows.append(row)
    if broken:
        notices.append(f"{path.name}: {broken} unreadable line{'s' if broken > 1 else ''} left out")
    return rows


def metric_lines(path: Path, notices: list[str]) -> list[Facts]:
    """The lines of metrics.jsonl that say which step they belong to."""
    return [line for line in read_lines(path, notices) if isinstance(line.get("step"), int)]


def is_number(value: Any) -> bool:
    """A finite int or float; not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

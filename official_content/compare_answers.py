#!/usr/bin/env python3
"""What changed in the answers from one stage to another: `compare_answers.py --stage 2 --with 3 [--json]`.

Both models' answers to the questions of every stage, as they were kept when the stages ended: repaired (wrong before,
right after), broken, both wrong; per format and task, and for each answer the keys in which it is not as wanted.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sft.cli import show_any_text
from sft.errors import Problems
from sft.programs.command_line import run_program, whole_number
from sft.reporting.differences import Compared, compare_stages, record, table
from sft.scoring.differences import MISSING, Change, counted
from sft.settings import Settings, load_settings
from sft.stages import paths

_SHOWN, _KEYS, _WIDEST = 5, 6, 160


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", type=whole_number, required=True, metavar="N", help="the model to start from")
    add("--with", type=whole_number, required=True, metavar="M", dest="other", help="the model to compare it with")
    add("--env-dir", type=Path, default=Path(), metavar="DIR", help="where stageN.env are (default: current directory)")
    add("--set", action="append", default=[], dest="overrides", metavar="NAME=VALUE", help="override one setting")
    add("--json", action="store_true", help="one JSON document with every answer instead of the tables")
    return parser.parse_args()


def main() -> None:
    """Tables on stdout; Problems where nothing can be compared."""
    options = arguments()
    if options.stage == options.other:
        raise Problems([f"--with {options.other}: is the stage itself; name another one"])
    show_any_text()
    numbers = options.stage, options.other
    settings = [load_settings(n, env_dir=options.env_dir, overrides=options.overrides) for n in numbers]
    out = settings[0].out_lora_dir
    folders = {number: paths.stage_folder(out, number) for number in range(1, max(numbers) + 1)}
    found = compare_stages(folders, *numbers)
    absent = [f"{each.missing}; {remedy(settings[0], each.again)}" for each in found if each.missing]
    if len(absent) == len(found):
        raise Problems(absent)
    if options.json:
        print(json.dumps(document(numbers, found), ensure_ascii=False, indent=2))
    else:
        print("\n\n".join(text(numbers, each) for each in found if not each.missing))
        for line in absent:
            print(f"[WARNING] {line}", file=sys.stderr)


def remedy(settings: Settings, stage: int) -> str:
    """What makes answers that are not there."""
    again = settings.command("--fresh", stage=stage)
    return f"they are kept where SFT_GEN_EVAL is set when a stage is trained; {again} leaves them"


def document(numbers: tuple[int, int], found: list[Compared]) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "stage": numbers[0],
        "with": numbers[1],
        "questions": [
            {
                "of_stage": each.questions,
                "missing": each.missing or None,
                "counts": counted(each.found),
                "difference": each.difference and each.difference._asdict() | {"real": each.difference.real},
                "answers": [record(change) for change in each.found],
            }
            for each in found
        ],
    }


def text(numbers: tuple[int, int], each: Compared) -> str:
    """The table and, of every kind but both right, the first answers with their keys."""
    head = (
        f"From stage {numbers[0]} to stage {numbers[1]}, on the {len(each.found)} questions of stage {each.questions}"
    )
    lines = [head, table(each.found)]
    if each.difference:
        lines.append(f"score {each.difference.sentence()}")
    for kind in ("broken", "repaired", "both wrong"):
        some = [change for change in each.found if change.kind == kind]
        lines += [f"\n{kind} ({len(some)})"] * bool(some)
        for change in some[:_SHOWN]:
            lines += answer_lines(change)
        if len(some) > _SHOWN:
            lines.append(f"  and {len(some) - _SHOWN} more; --json lists all of them")
    return "\n".join(lines)


def answer_lines(change: Change) -> list[str]:
    """What was asked, and the keys that differ; the answers themselves where no key can tell."""
    lines = [f"  {change.task or 'asked'}: {cut(change.prompt)}"]
    for key in change.keys[:_KEYS]:
        wanted, before, after = map(shown, (key.wanted, key.before, key.after))
        lines.append(f"    {key.path}: {before} -> {after} (wanted {wanted})")
    if len(change.keys) > _KEYS:
        lines.append(f"    and {len(change.keys) - _KEYS} more keys")
    if not change.keys:
        named = (("before", change.before), ("after", change.after), ("wanted", change.reference))
        lines += [f"    {name:<7}{cut(answer) or '(nothing)'}" for name, answer in named]
    return lines


def shown(value: Any) -> str:
    return value if value == MISSING else cut(json.dumps(value, ensure_ascii=False, default=str))


def cut(answer: str) -> str:
    """On one line, shortened."""
    line = " ⏎ ".join(answer.strip().splitlines())
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 1]}…"


def program() -> int:
    """The installed command."""
    return run_program(main)


if __name__ == "__main__":
    raise SystemExit(program())

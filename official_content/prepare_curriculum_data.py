#!/usr/bin/env python3
"""Merge positives and negatives into one file: the positives several times over, then the first negatives.

  prepare_curriculum_data.py --positives hawks_train.json --copies 3 --negatives person_dummy.json --first 96000 \\
    --output hawks_train_curriculum.json

Reads and writes JSON lists and JSONL (by the ending of --output) row by row: of a list its text is in memory, never
all rows; of JSONL one line.
The rows stand in this order; training shuffles them. A mix does the same without a file, see the last lines printed.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sft.errors import Problems
from sft.programs.command_line import encoding_name, progress, run_program, whole_number
from sft.programs.row_streams import read_rows, written_rows

Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positives", type=Path, required=True, metavar="FILE", help="rows with an answer to find")
    parser.add_argument("--copies", type=whole_number, default=3, metavar="N", help="copies of the positives (3)")
    parser.add_argument("--negatives", type=Path, required=True, metavar="FILE", help="rows whose answer is empty")
    parser.add_argument("--first", type=whole_number, metavar="K", help="negatives to take from the start (all)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a .json or .jsonl file, not there yet"
    )
    parser.add_argument("--encoding", type=encoding_name, help="encoding of the inputs (utf-8)")
    return parser.parse_args()


def copy_rows(rows: Iterator[Row], add: Callable[[Row], None], what: str) -> int:
    """Hand every row to `add`; returns how many there were."""
    number = 0
    for number, row in enumerate(rows, start=1):
        add(row)
        if number % 10_000 == 0:
            progress(f"{what}: {number:,} rows")
    if number == 0:
        raise Problems([f"{what}: no rows"])
    progress(f"{what}: {number:,} rows", last=True)
    return number


def merge(options: argparse.Namespace) -> tuple[int, int]:
    """Write the merged file; returns how many positives (one copy) and negatives it holds."""
    missing = [file for file in (options.positives, options.negatives) if not file.exists()]
    if missing:
        raise Problems([f"{file}: no such file; a .json or .jsonl file is needed" for file in missing])
    with written_rows(options.output) as add:
        for copy in range(1, options.copies + 1):
            rows = read_rows(options.positives, options.encoding)
            positives = copy_rows(rows, add, f"{options.positives} copy {copy} of {options.copies}")
        rows = islice(read_rows(options.negatives, options.encoding), options.first)
        negatives = copy_rows(rows, add, str(options.negatives))
    return positives, negatives


def summary(options: argparse.Namespace, positives: int, negatives: int) -> str:
    repeated = positives * options.copies
    sources = [
        {"id": str(options.positives), "repeat": options.copies, "weight": repeated},
        {"id": str(options.negatives), "limit": negatives, "weight": negatives},
    ]
    shortage = ""
    if options.first and negatives < options.first:
        shortage = f"[WARNING] {options.negatives} has only {negatives:,} of the {options.first:,} rows asked for\n"
    return (
        f"{shortage}positives  {positives:,} x {options.copies} = {repeated:,}\n"
        f"negatives  {negatives:,}\n"
        f"total      {repeated + negatives:,} rows, positives to negatives 1 : {negatives / repeated:.2f}\n"
        f"written to {options.output}\n\n"
        f"The same without a file, in stageN.env:\n"
        f"SFT_DATASET_MIX='{json.dumps(sources, ensure_ascii=False)}'\n"
        f"SFT_DATASET_MIX_TOTAL_SIZE={repeated + negatives}"
    )


def main() -> None:
    options = arguments()
    print(summary(options, *merge(options)))


if __name__ == "__main__":
    raise SystemExit(run_program(main))

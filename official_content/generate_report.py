#!/usr/bin/env python3
"""Report on the benchmark runs in a folder: tables and plots of throughput, scaling, evaluation and checkpoints.

  generate_report.py results/

Writes report.html (one self-contained file) and report.md into that folder, in place of earlier ones. Scaling
efficiency is tokens/s at n nodes over n times tokens/s at one. What collect_metrics.sh recorded in or below the folder
is shown as use of the devices. Unfinished and broken runs are named and left out.
"""

import argparse
import sys
from pathlib import Path

from sft.errors import Problems
from sft.programs.command_line import run_program


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="folder of the runs (results)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the report goes (the folder of the runs)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if not options.results.is_dir():
        raise Problems([f"{options.results}: no such folder; run_benchmark.sh MODEL NODES makes the first run in it"])
    from sft.programs import benchmark_report as report
    from sft.programs.utilisation import HEADING, read_recordings
    from sft.reporting.report import html_page
    from sft.storage.atomic import write_text

    found, broken = report.read_runs(options.results)
    for text in broken:
        print(f"[WARNING] {text}", file=sys.stderr)
    if not found:
        raise Problems([f"{options.results}: no complete run in it; run_benchmark.sh MODEL NODES makes one"])
    runs = report.with_efficiency(found)
    facts = {"runs": runs, "broken": broken, "explained": report.EXPLAINED, "charts": report.charts(runs)}
    facts |= {"speed": report.SPEED, "speed_rows": report.speed_rows(runs)}
    facts |= {"costs": report.COSTS, "cost_rows": report.cost_rows(runs)}
    recorded = read_recordings(options.results)
    facts |= {"use": HEADING, "use_rows": [each.cells for each in recorded]}
    folder = options.output or options.results
    write_text(folder / "report.md", report.markdown(runs, broken, recorded))
    write_text(folder / "report.html", html_page("benchmark.html.jinja", facts))
    print(f"{len(runs)} runs: {folder / 'report.html'} and {folder / 'report.md'}")


if __name__ == "__main__":
    raise SystemExit(run_program(main))

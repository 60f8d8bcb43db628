"""Benchmark runs found in a folder -> tables, scaling efficiency and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sft.programs import utilisation
from sft.programs.utilisation import Recorded, is_recording
from sft.reporting import plots
from sft.reporting.text import figure

Summary = Mapping[str, Any]
NEEDED = {"model", "nodes", "processes", "tokens_per_second", "step_seconds", "load"}
SPEED = (
    "model",
    "device, launch",
    "nodes",
    "devices",
    "tokens/s",
    "per device",
    "efficiency",
    "s/step",
    "peak GB",
    "matrix rate",
)
COSTS = ("model", "devices", "evaluation, s per 1,000 tokens", "checkpoint, s", "checkpoint, MB")
EXPLAINED = (
    "Efficiency is tokens/s at n over n times tokens/s at the smallest run of the same work, counted in devices (with "
    "equal machines: in nodes). The matrix rate is what a large matrix product reached on the device at the same "
    "time; the share of it counts the model's own operations, not recomputed ones. Memory is that of one device, on a "
    "CPU of one process."
)


def read_runs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(complete runs in the order of their names, what is wrong with each of the others).

    What collect_metrics.sh recorded beside them is no run and no fault.
    """
    runs, broken = [], []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if is_recording(place):
            continue
        try:
            summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
            missing = NEEDED - set(summary)
        except FileNotFoundError:
            broken.append(f"{place.name}: no summary.json; the run did not end well or the folder is no run")
            continue
        except (ValueError, TypeError) as error:
            broken.append(f"{place.name}: summary.json is not readable ({error})")
            continue
        if missing:
            broken.append(f"{place.name}: summary.json has no {', '.join(sorted(missing))}")
        else:
            runs.append(summary | {"run": place.name})
    return runs, broken


def series_of(run: Summary) -> str:
    """Runs that differ only in how many devices did the work have the same text here."""
    load = run["load"]
    method = f"LoRA r {load['lora_r']}" if load["lora_r"] else "full"
    batch = f"{load['micro_batch']} x {load['accumulation']}"
    checkpointing = ", checkpointing" if load["checkpointing"] else ""
    return f"{run['model']}, {load['seq_len']} tokens, {batch}, {load['dtype']}, {method}{checkpointing}"


def with_efficiency(runs: Sequence[Summary]) -> list[dict[str, Any]]:
    """The runs by series and devices, each with `efficiency`: 1 where tokens/s grows as the devices do.

    The smallest run of a series is what the others are held against; of several, the fastest.
    """
    base: dict[str, Summary] = {}
    for run in sorted(runs, key=lambda run: (run["processes"], -run["tokens_per_second"])):
        base.setdefault(series_of(run), run)
    found = []
    for run in runs:
        smallest = base[series_of(run)]
        ideal = smallest["tokens_per_second"] * run["processes"] / smallest["processes"]
        found.append({**run, "series": series_of(run), "efficiency": run["tokens_per_second"] / ideal})
    return sorted(found, key=lambda run: (run["series"], run["processes"], run["nodes"]))


def speed_rows(runs: Sequence[Summary]) -> list[list[str]]:
    return [
        [
            run["series"],
            f"{run.get('device', '–')}, {run.get('distributed', '–')}",
            str(run["nodes"]),
            str(run["processes"]),
            f"{run['tokens_per_second']:,.0f}",
            f"{run['tokens_per_second'] / run['processes']:,.0f}",
            f"{run['efficiency']:.0%}",
            f"{run['step_seconds']:.3f}",
            _divided(run.get("peak_memory_bytes"), 1e9),
            _share(run.get("flops_share")),
        ]
        for run in runs
    ]


def cost_rows(runs: Sequence[Summary]) -> list[list[str]]:
    return [
        [
            run["series"],
            str(run["processes"]),
            figure(run.get("evaluation_seconds_per_1000_tokens")),
            figure(run.get("checkpoint_seconds")),
            _divided(run.get("checkpoint_bytes"), 1e6),
        ]
        for run in runs
    ]


def _divided(value: float | None, unit: float) -> str:
    return "–" if value is None else f"{value / unit:,.2f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def charts(runs: Sequence[Summary]) -> list[dict[str, Any]]:
    """Tokens per second and efficiency over devices, one line per series with more than one size."""
    sizes: dict[str, dict[int, Summary]] = {}
    for run in runs:
        fastest = sizes.setdefault(run["series"], {})
        before = fastest.get(run["processes"])
        if before is None or run["tokens_per_second"] > before["tokens_per_second"]:
            fastest[run["processes"]] = run
    scaled = {name: found for name, found in sizes.items() if len(found) > 1}
    if not scaled:
        return []
    return [
        _chart(scaled, "tokens_per_second", "Tokens per second over devices"),
        _chart(scaled, "efficiency", "Scaling efficiency over devices"),
    ]


def _chart(scaled: Mapping[str, Mapping[int, Summary]], name: str, title: str) -> dict[str, Any]:
    curves = {series: [[size, found[size][name]] for size in sorted(found)] for series, found in scaled.items()}
    legend = [(series, curve[-1][1], number % 6 + 1) for number, (series, curve) in enumerate(curves.items())]
    return {
        "svg": Markup(plots.line_chart(curves, title=title, zero=True, label="devices")),
        "title": title,
        "legend": legend,
    }


def markdown(runs: Sequence[Summary], broken: Sequence[str], recorded: Sequence[Recorded] = ()) -> str:
    """The tables for a README or an issue."""
    parts = ["# Benchmark", _table(SPEED, speed_rows(runs), left=2), EXPLAINED]
    parts += ["## Evaluation and checkpoints", _table(COSTS, cost_rows(runs), left=1)]
    if recorded:
        parts += ["## Use of the devices", _table(utilisation.HEADING, [each.cells for each in recorded], left=2)]
    if broken:
        parts += ["## Left out", "\n".join(f"- {text}" for text in broken)]
    return "\n\n".join(parts) + "\n"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    marks = ["---" if column < left else "---:" for column in range(len(heading))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, marks, *rows])

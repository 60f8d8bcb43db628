"""Comparisons as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BYTES = ("B", "kB", "MB", "GB", "TB")


def amount(value: float, unit: str) -> str:
    """A figure with its unit, three digits that count: "1.23 s", "412 MB", "7,013 rows/s"."""
    if unit == "bytes":
        step = 0
        while value >= 1000 and step < len(BYTES) - 1:
            value, step = value / 1000, step + 1
        unit = BYTES[step]
    number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{number} {unit}".strip()


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first one to the left, the others to the right; Markdown too."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                f"{c:<{w}}" if not k else f"{c:>{w}}" for k, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            + " |"
        )

    ruler = "|" + "|".join("-" * (width + 1) + ("-" if not k else ":") for k, width in enumerate(widths)) + "|"
    return "\n".join([line(head), ruler, *map(line, rows)])


def comparisons(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines of an item: ratio first, then both figures, what it is held against, and whether that is met."""
    rows = []
    for line in lines:
        rival = amount(line["rival"], line["unit"]) if "rival" in line else ""
        ratio = f"{line['ratio']:.2f} x" if "ratio" in line else ""
        verdict = {True: "met", False: "missed"}[line["met"]] if "met" in line else ""
        rows.append(
            [line["what"], ratio, amount(line["ours"], line["unit"]), rival, line.get("against", ""),
             line.get("target", ""), verdict]
        )  # fmt: skip
    return grid(["what", "ratio", "ours", "rival", "against", "target", ""], rows)

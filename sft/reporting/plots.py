"""Figures as inline SVG that follow the page: its font, its colours in light and dark, no outside resources."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants real colours: these stand in for the page's CSS variables until the SVG is written.
SERIES = tuple(f"#5e110{number}" for number in range(1, 7))
GRID, TEXT = "#5e1191", "#5e1192"
VARIABLES = {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)}
VARIABLES |= {GRID: "var(--grid)", TEXT: "var(--muted)"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a task may be named with dollar signs
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "text.color": TEXT,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "path.simplify_threshold": 0.3,
}

Curve = Sequence[Sequence[float]]  # [step, value] pairs


def line_chart(
    curves: Mapping[str, Curve], *, title: str, unit: bool = False, zero: bool = False, label: str = "step"
) -> str:
    """Values over steps, one colour per curve in order; `unit` fixes the axis to 0..1, `zero` its lower end."""

    def draw(axes: "Axes") -> None:
        for colour, curve in zip(_colours(len(curves)), curves.values(), strict=True):
            _line(axes, curve, colour)
        if unit:
            axes.set_ylim(-0.02, 1.02)
        if zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", integer=True)  # half a step and half a device are nothing

    return _svg(draw, title)


def ladder_chart(stages: Sequence[Curve], *, title: str) -> str:
    """One curve per stage, set one after the other over the steps of the whole ladder."""

    def draw(axes: "Axes") -> None:
        start = 0.0
        for colour, curve in zip(_colours(len(stages)), stages, strict=True):
            _line(axes, [(start + step, value) for step, value in curve], colour)
            start += curve[-1][0] if curve else 0
            axes.axvline(start, color=GRID, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_xlabel("steps of the whole ladder")

    return _svg(draw, title)


def bar_chart(
    bars: Sequence[Sequence[float | None]], columns: Sequence[str], *, title: str, numbers: Sequence[int]
) -> str:
    """Groups of bars, 0..1: one group per column, a bar for each row in its colour 1..6; None leaves a gap."""

    def draw(axes: "Axes") -> None:
        width = 0.8 / len(bars)
        for row, (number, values) in enumerate(zip(numbers, bars, strict=True)):
            places = [column - 0.4 + width * (row + 0.5) for column in range(len(columns))]
            axes.bar(places, [value or 0 for value in values], width * 0.88, color=SERIES[number - 1])
        axes.set_xticks(range(len(columns)), columns)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 1.02)

    return _svg(draw, title)


def _colours(count: int) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(count)]


def _line(axes: "Axes", curve: Curve, colour: str) -> None:
    steps, values = zip(*curve, strict=True) if curve else ((), ())
    # Points are worth showing while they are few enough to be told apart.
    axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(curve) <= 24 else None, markersize=3)


def _svg(draw: Callable[["Axes"], None], title: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=3, width=0.6)
        draw(axes)
        FigureCanvasSVG(figure)
        return _inline(figure, title)


def _inline(figure: "Figure", title: str) -> str:
    """The <svg> element alone: page font, page colours, no document header, no namespaces (HTML implies them)."""
    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same names in every figure, and nothing refers to them
    text = re.sub(r" font-family: [^;]*;", "", re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text))
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    sizes = r'<svg width="[^"]*" height="[^"]*"'
    return re.sub(sizes, f'<svg role="img" aria-label="{escape(title)}"', text, count=1)

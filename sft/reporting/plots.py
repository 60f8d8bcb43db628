"""Figures as inline SVG in the page's own colours (CSS variables, light and dark) and font; nothing is fetched."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

COLOURS = 6  # --series-1 to --series-6 of the page
_WIDTH, _HEIGHT = 560, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 40  # room for the labels of the axes
_TICKS = 5
_MOST_MARKS = 24  # points are worth showing while they are few enough to be told apart
_SIZES = 'font-size="12" fill="var(--muted)"'

Curve = Sequence[Sequence[float]]  # [step, value] pairs


@dataclass
class _Axes:
    """Places on the drawing for values within two ranges, and what has been drawn."""

    x: tuple[float, float]
    y: tuple[float, float]
    parts: list[str] = field(default_factory=list)

    def across(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1)

    def up(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str = "") -> None:
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.parts.append(f'<line {ends} stroke="var(--grid)"{style}/>')

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_SIZES}>{escape(text)}</text>')

    def curve(self, curve: Curve, number: int) -> None:
        places = [(self.across(step), self.up(value)) for step, value in curve]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        colour = f"var(--series-{(number - 1) % COLOURS + 1})"
        dash = ' stroke-dasharray="6 4"' if number > COLOURS else ""  # the colours begin again
        self.parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for x, y in places if len(places) <= _MOST_MARKS else ():
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')

    def scale(self, label: str, *, ticks: Sequence[float] | None = None) -> None:
        """Grid and numbers of the vertical axis; below, whole numbers and what they count."""
        for value in _nice(*self.y):
            self.line(_LEFT, self.up(value), _WIDTH - _RIGHT, self.up(value))
            self.text(_LEFT - 8, self.up(value) + 4, number_text(value), "end")
        whole = [value for value in _nice(*self.x) if value == int(value)] if ticks is None else ticks
        for value in whole:
            self.line(self.across(value), _HEIGHT - _BOTTOM, self.across(value), _HEIGHT - _BOTTOM + 4)
            self.text(self.across(value), _HEIGHT - _BOTTOM + 18, number_text(value))
        self.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, label)

    def svg(self, title: str) -> str:
        box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        return f'<svg role="img" aria-label={quoteattr(title)} {box}>{"".join(self.parts)}</svg>'


def number_text(value: float) -> str:
    """Thousands separated; a very small one in scientific notation: 12,000 · 0.25 · 2e-05."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _nice(low: float, high: float) -> list[float]:
    """About five round values within a range."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10 ** math.floor(math.log10(span / _TICKS))
    step = next((power * factor for factor in (1, 2, 5) if power * factor * _TICKS >= span), power * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _range(values: Sequence[float], *, unit: bool = False, zero: bool = False) -> tuple[float, float]:
    """What the axis covers: all values and a little more; 0 to 1 for `unit`, from 0 on for `zero`."""
    if unit:
        return -0.02, 1.02
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 0.5
    return 0.0 if zero and low >= 0 else low - room, high + room


def line_chart(
    curves: Mapping[str, Curve], *, title: str, unit: bool = False, zero: bool = False, label: str = "step"
) -> str:
    """Values over steps, one colour per curve in order; `unit` fixes the axis to 0..1, `zero` its lower end."""
    steps = [step for curve in curves.values() for step, _ in curve]
    values = [value for curve in curves.values() for _, value in curve]
    axes = _Axes((min(steps, default=0), max(steps, default=1)), _range(values, unit=unit, zero=zero))
    axes.scale(label)
    for number, curve in enumerate(curves.values(), 1):
        axes.curve(curve, number)
    return axes.svg(title)


def ladder_chart(stages: Sequence[Curve], *, title: str, label: str) -> str:
    """One curve per stage, set one after the other over the steps of the whole ladder."""
    total = sum(curve[-1][0] for curve in stages if curve)
    axes = _Axes((0, total), _range([value for curve in stages for _, value in curve]))
    axes.scale(label)
    start = 0.0
    for number, curve in enumerate(stages):
        axes.curve([(start + step, value) for step, value in curve], number % COLOURS + 1)
        start += curve[-1][0] if curve else 0
        axes.line(axes.across(start), _TOP, axes.across(start), _HEIGHT - _BOTTOM, ' stroke-dasharray="3 3"')
    return axes.svg(title)


def model_chart(tasks: Mapping[str, Sequence[float | None]], models: Sequence[str], *, title: str) -> str:
    """Scores 0..1 from model to model, one line per stage's tasks: a skill that stays is a level line."""
    axes = _Axes((0, max(len(models) - 1, 1)), (-0.02, 1.02))
    axes.scale("", ticks=())
    for place, model in enumerate(models):
        anchor = "start" if place == 0 else "end" if place == len(models) - 1 else "middle"
        axes.text(axes.across(place), _HEIGHT - _BOTTOM + 18, model, anchor)
    for number, scores in enumerate(tasks.values()):
        for piece in _pieces(scores):  # a model that was not asked leaves a gap
            axes.curve(piece, number % COLOURS + 1)
    return axes.svg(title)


def _pieces(scores: Sequence[float | None]) -> list[Curve]:
    """(place, score) pairs, parted where there is no score."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for place, score in enumerate(scores):
        if score is None:
            pieces.append([])
        else:
            pieces[-1].append((place, score))
    return [piece for piece in pieces if piece]


def bar_chart(
    bars: Sequence[Sequence[float | None]], columns: Sequence[str], *, title: str, numbers: Sequence[int]
) -> str:
    """Groups of bars, 0..1: one group per column, a bar for each row in its colour 1..6; None leaves a gap."""
    axes = _Axes((-0.5, len(columns) - 0.5), (0, 1.02))
    axes.scale("", ticks=())
    wide = 0.8 / max(len(bars), 1)
    for row, (number, values) in enumerate(zip(numbers, bars, strict=True)):
        for column, value in enumerate(values):
            left, right = (axes.across(column - 0.4 + wide * (row + side)) for side in (0.06, 0.94))
            top, bottom = axes.up(value or 0), axes.up(0)
            box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
            axes.parts.append(f'<rect {box} fill="var(--series-{number})"/>')
    for column, name in enumerate(columns):
        axes.text(axes.across(column), _HEIGHT - _BOTTOM + 18, name)
    return axes.svg(title)

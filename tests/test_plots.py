"""Figures say what the numbers say, in plain SVG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from sft.reporting import plots


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def points(svg: str) -> list[list[tuple[float, float]]]:
    found = [element.attrib["points"] for element in ElementTree.fromstring(svg).iter("polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found]


def test_a_line_goes_where_its_values_are():
    """The highest value at the highest place, steps from the left to the right edge of the axes."""
    svg = plots.line_chart({"loss": [[0, 4.0], [5, 2.0], [10, 0.0]]}, title="Loss <of> it", zero=True)
    (line,) = points(svg)
    assert [x for x, _ in line] == [58.0, 302.0, 546.0]
    assert line[0][1] < line[1][1] < line[2][1] == 230.0
    assert line[1][1] - line[0][1] == pytest.approx(line[2][1] - line[1][1], abs=0.2)
    assert texts(svg) == ["0", "1", "2", "3", "4", "0", "2", "4", "6", "8", "10", "step"]
    assert 'aria-label="Loss &lt;of&gt; it"' in svg


@pytest.mark.parametrize(
    ("value", "text"), [(12000.0, "12,000"), (0.25, "0.25"), (0.00002, "2e-05"), (3.0, "3"), (0.0, "0"), (-1.5, "-1.5")]
)
def test_numbers_at_the_axes_are_short(value, text):
    """Thousands separated, whole numbers without a point, small ones in scientific notation."""
    assert plots.number_text(value) == text


def test_nothing_to_draw_and_a_single_value_are_drawn_all_the_same():
    """No curve, an empty one, one point, and values that are all equal."""
    for curves in ({}, {"a": []}, {"a": [[3, 1.0]]}, {"a": [[1, 2.0], [2, 2.0]]}, {"a": [[0, -1e9], [1, 1e9]]}):
        assert "nan" not in plots.line_chart(curves, title="t")
    assert "nan" not in plots.ladder_chart([[], [[1, 0.5]]], title="t", label="steps")
    assert "nan" not in plots.bar_chart([[None, 0.5]], ["a", "b"], title="t", numbers=[1])
    assert "nan" not in plots.model_chart({"x": [None]}, ["base"], title="t")


def test_only_the_colours_of_the_page_are_used():
    """Whatever is drawn follows light and dark."""
    svg = plots.line_chart({str(number): [[0, number], [1, number]] for number in range(8)}, title="t")
    colours = set(re.findall(r'(?:fill|stroke)="([^"]+)"', svg)) - {"none"}
    assert colours == {"var(--grid)", "var(--muted)", *(f"var(--series-{number})" for number in range(1, 7))}


def test_a_model_that_was_not_asked_leaves_a_gap():
    """Three scores with a hole are a point and a line, not a line over the hole."""
    svg = plots.model_chart({"tasks of stage 1": [0.1, None, 0.5, 0.6]}, ["base", "1", "2", "3"], title="t")
    assert [len(line) for line in points(svg)] == [1, 2]


def test_bars_are_as_high_as_their_values():
    """Twice the score, twice the height; nothing for a score that is missing."""
    svg = plots.bar_chart([[0.2, 0.4, None]], ["json", "toml", "xml"], title="t", numbers=[2])
    heights = [float(element.attrib["height"]) for element in ElementTree.fromstring(svg).iter("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[2] == 0.0

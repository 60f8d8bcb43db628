"""Values become text that is safe to show, short, and the same everywhere."""

import pytest

from sft.reporting.text import duration, figure, language_of, printable, short, signed


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\tb\n", "a\tb\n"), ("\r\x7f", "⟨U+000D⟩⟨U+007F⟩"), ("\ud800", "⟨U+D800⟩"), ("佐藤🙂", "佐藤🙂")],
)
def test_printable(text, shown):
    """Tab, newline and every letter stay; what could act on a terminal or page is named by its code."""
    assert printable({"x": [text]}) == {"x": [shown]}
    assert printable(float("nan")) is None


def test_figures_and_durations():
    """Numbers as people write them."""
    shown = [figure(value) for value in (1234567, 0.12345, 0.0, 0.00001, 12345.6, None, True)]
    assert shown == ["1,234,567", "0.123", "0", "1.00e-05", "12,346", "–", "true"]
    assert [duration(value) for value in (4.25, 59, 90, 4000, None)] == [
        "4.2 s",
        "59 s",
        "1 min 30 s",
        "1 h 06 min",
        "–",
    ]
    assert short("abc", 3) == "abc"


def test_differences_have_their_sign():
    """A gain has a plus, a loss the typographic minus, and a difference too small to show has neither."""
    assert [signed(value) for value in (0.25, -0.25, -0.0001, None)] == ["+0.250", "−0.250", "0.000", "–"]


def test_language():
    """Kana or Han characters make a text Japanese."""
    assert [language_of(text) for text in ("name: Sato", "名前", "カナ", "")] == ["en", "ja", "ja", "en"]

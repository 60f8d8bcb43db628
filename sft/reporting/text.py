"""How values read on a page and in a terminal: safe to print, short, aligned."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from sft.reporting.language import Say

# Control characters but tab and newline, surrogates without a partner, and marks that turn the reading direction.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
JAPANESE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uff66-\uff9f]")


def printable(value: Any) -> Any:
    """A JSON-able value with hostile characters made visible (⟨U+0000⟩) and NaN and infinities as None."""
    if isinstance(value, str):
        return UNPRINTABLE.sub(_visible, value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {printable(str(name)): printable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    return value


def _visible(match: re.Match[str]) -> str:
    return f"⟨U+{ord(match.group()):04X}⟩"


def short(text: str, longest: int) -> str:
    """The text, or its first `longest` characters and a note of how many there were."""
    return text if len(text) <= longest else f"{text[:longest]}\n… shortened: {len(text):,} characters in all"


def plain(value: Any, longest: int = 300) -> str:
    """A setting's value as people write it: text bare, the rest as JSON, nothing as a dash."""
    if value is None:
        return "–"
    return short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), longest)


def figure(value: Any, digits: int = 3) -> str:
    """A number with thousands separated; fractions with `digits` places, tiny ones in scientific notation."""
    if value is None or isinstance(value, str | bool):
        return plain(value) if value != "" else "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    if abs(value) < 0.5 * 10**-digits:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.{digits}f}"


def score(value: float | None) -> str:
    """A score with three places, also where it is a whole number; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference with its sign; the typographic minus lines up with the plus."""
    if value is None:
        return "–"
    return f"{value:+.3f}".replace("-", "−") if abs(value) >= 0.0005 else "0.000"


# Figures that count something: whole numbers, however they were stored.
COUNTS = {"gen_samples", "gen_global_step", "step", "tokens", "num_tokens"}


def counted(value: Any, name: str) -> str:
    """A figure by its name: counts as whole numbers, everything else as `figure` has it."""
    return f"{value:,.0f}" if name in COUNTS else figure(value)


def scored(value: float | None, name: str) -> str:
    """A score with three places, a count as a whole number."""
    return f"{value:,.0f}" if value is not None and name in COUNTS else score(value)


def label(name: str, say: Say) -> str:
    """A model's or stage's name in the page's language: "base", "stage 2"."""
    if name == "base":
        return say("base")
    return say("stage {number}", number=name.removeprefix("stage ")) if name.startswith("stage ") else name


_SPACES = re.compile(r"(?P<tab>\t)|(?P<wide>[\u00a0\u2000-\u200b\u3000\ufeff])|(?P<end>[ ]+(?=\n|\Z))|(?P<last>\n+\Z)")
_SIGNS = {"tab": "⇥\t", "wide": "␣", "end": "·", "last": "⏎\n"}


def spaces(text: str) -> Markup:
    """The text with its white space to be seen: at line ends, tabs, wide blanks, line ends at its end."""
    parts, place = [], 0
    for match in _SPACES.finditer(text):
        kind = match.lastgroup or ""
        shown = _SIGNS[kind] * len(match.group())
        parts += [escape(text[place : match.start()]), Markup('<span class="space">'), shown, Markup("</span>")]
        place = match.end()
    return Markup("").join([*parts, escape(text[place:])])


def duration(seconds: float | None) -> str:
    """4000 -> "1 h 06 min"."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def language_of(text: str) -> str:
    """The lang attribute for a text: Japanese where it holds kana or Han characters: browsers pick glyphs by it."""
    return "ja" if JAPANESE.search(text) else "en"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells (the first is the heading) as plain text: first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

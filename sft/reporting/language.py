"""The languages of the reports: English as it is written in the templates, and Japanese for its fixed texts."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

Say = Callable[..., str]
_TEXTS = Path(__file__).parent / "templates" / "japanese.json"


@cache
def japanese() -> dict[str, str]:
    """English text of a template -> Japanese."""
    return json.loads(_TEXTS.read_text(encoding="utf-8"))


def say_in(language: str) -> Say:
    """A function that gives a fixed text in a language; values are put into its {places}. Others stay English."""
    table = japanese() if language == "ja" else {}

    def say(text: str, **values: Any) -> str:
        return table.get(text, text).format(**values) if values else table.get(text, text)

    return say


english = say_in("en")

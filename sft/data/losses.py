"""Rows that are lost: counted by reason and place, and a problem where they are more than a person may expect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.sources.columns import Tally
from sft.data.split import EARLIER, GENERATION, VALIDATION

if TYPE_CHECKING:
    from sft.data.sources.load import Rows
    from sft.settings import Settings

_MOST_DROPPED = 0.1  # the contract's 10 %: more is a decision for a person


def placed(loaded: Sequence[Rows]) -> tuple[Counter[str], dict[str, str]]:
    """Lost rows of all sources by reason, and of each reason the first row: `row 3`, of several sources `row 3 of x`.

    Where a reason means little without its row, that stands in the reason itself.
    """
    counted: Counter[str] = Counter()
    first: dict[str, str] = {}
    for rows in loaded:
        of = f" of {Path(rows.source.id).name}" if len(loaded) > 1 else ""
        tally = Tally(rows.dropped, rows.first)
        for reason, (text, count) in zip(rows.dropped, tally.placed(of).items(), strict=True):
            counted[text] += count
            if text == reason and reason in rows.first:
                first.setdefault(text, f"row {rows.first[reason]}{of}")
    return counted, first


def in_words(dropped: Mapping[str, int], first: Mapping[str, str]) -> str:
    """`3 empty answer (row 5), 1 over-long (row 7)`, most first."""
    ordered = sorted(dropped.items(), key=lambda entry: -entry[1])
    return ", ".join(
        f"{count:,} {reason}" + (f" ({first[reason]})" if reason in first else "") for reason, count in ordered
    )


def losses(loaded: Sequence[Rows], unasked: int, dropped: Counter[str], settings: Settings) -> list[str]:
    """Problems where more rows are lost than the person may expect: `dropped` of them, in words, `unasked` of these
    left out for their content. What SFT_DEDUPLICATE, a multiplier or SFT_VAL_RATIO takes away was asked for."""
    total = sum(rows.dropped.total() + len(rows.dataset) for rows in loaded)
    unreadable = sum((rows.dropped for rows in loaded), Counter[str]())
    if settings.overlong == "error" and unreadable["over-long"]:
        return [
            f"SFT_OVERLONG=error: {unreadable['over-long']} rows are longer than"
            f" SFT_MAX_SEQ_LEN={settings.max_seq_len}; raise it, shorten them, or choose drop or truncate"
        ]
    lost = unreadable.total() + unasked
    reasons, remedy = in_words(dropped, placed(loaded)[1]), _remedy(dropped, settings)
    if total and unreadable.total() == total:
        return [f"{asked(settings)}: none of its {total} rows can be trained on ({reasons}); {remedy}"]
    if settings.origins.get("SFT_OVERLONG", "default") != "default" or lost <= _MOST_DROPPED * total:
        return []
    return [
        f"SFT_OVERLONG={settings.overlong}: {lost} of {total} rows would be dropped ({reasons}); {remedy}, "
        f"or write SFT_OVERLONG=drop into stage{settings.stage}.env to accept it"
    ]


def nothing_left(setting: str, loaded: Sequence[Rows], settings: Settings) -> list[str]:
    """A problem for each source of `setting`, which a person names to be asked or validated on, that gives no row."""
    found = []
    for rows in loaded:
        if len(rows.dataset):
            continue
        dropped, first = placed([rows])
        reasons = in_words(dropped, first)
        what = f"none of its {dropped.total():,} rows can be used ({reasons})" if dropped else "holds no rows"
        remedy = _remedy(dropped, settings) if dropped else "give it rows"
        found.append(f"{setting}={rows.source.id}: {what}; {remedy}, or take it out of the setting")
    return found


def _remedy(dropped: Counter[str], settings: Settings) -> str:
    if dropped["over-long"]:
        return f"raise SFT_MAX_SEQ_LEN={settings.max_seq_len}"
    left_out = sum(dropped[reason] for reason in (VALIDATION, EARLIER, GENERATION))
    return "take rows that are asked out of the data" if left_out * 2 > dropped.total() else "repair the rows"


def asked(settings: Settings) -> str:
    """The setting that names the sources."""
    return "SFT_DATASET_MIX" if settings.dataset_mix else "SFT_DATASET_ID"

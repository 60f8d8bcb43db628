"""What a stage was validated on and asked, kept so that no later stage trains on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.sources.shapes import Dropped, content_hash
from sft.stages.paths import HELD_OUT, QUESTIONS, stage_folder
from sft.storage import json_files

if TYPE_CHECKING:
    from sft.settings import Settings


def write_held_out(folder: Path, contents: Iterable[int]) -> None:
    """held_out.json: the content hashes of the rows that no later stage may train on."""
    json_files.write_json(folder / HELD_OUT, {"content_hashes": list(contents)})


def earlier_questions(settings: Settings) -> set[int]:
    """The contents every stage before this one was validated on or asked."""
    found: set[int] = set()
    for number in range(1, settings.stage):
        folder = stage_folder(settings.out_lora_dir, number)
        found.update(json_files.read_object(folder / HELD_OUT, []).get("content_hashes", ()))
        found.update(_recorded_questions(folder))
    return found


def _recorded_questions(folder: Path) -> Iterable[int]:
    """Of gen_rows.jsonl: all there is in a stage that was trained before held_out.json was written."""
    for row in json_files.read_records(folder / QUESTIONS):
        try:
            answer = {"role": "assistant", "content": row["reference"]}
            yield content_hash([*row["prompt"], answer], row.get("extras"))
        except (Dropped, KeyError, TypeError):
            continue  # a line that is damaged or another program's

"""Where settings come from: `--set`, the process environment, `stageN.env`; and what cannot be read there.

Nothing here knows what a setting means: this module returns texts by name, with the place each came from.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from dotenv.parser import Binding, parse_stream

from sft.errors import SECRET_NAME, hide_secrets

# Public scripts of the same family spell these differently; the plain closest name would mislead.
ALIASES = {
    "SFT_BATCH_SIZE": "SFT_PER_DEVICE_TRAIN_BS",
    "SFT_PER_DEVICE_TRAIN_BATCH_SIZE": "SFT_PER_DEVICE_TRAIN_BS",
    "SFT_PER_DEVICE_EVAL_BATCH_SIZE": "SFT_PER_DEVICE_EVAL_BS",
    "SFT_GRADIENT_ACCUMULATION_STEPS": "SFT_GRAD_ACCUM",
    "SFT_LEARNING_RATE": "SFT_LR",
    "SFT_NUM_EPOCHS": "SFT_EPOCHS",
    "SFT_NUM_TRAIN_EPOCHS": "SFT_EPOCHS",
    "SFT_MODEL": "SFT_BASE_MODEL",
    "SFT_MODEL_ID": "SFT_BASE_MODEL",
    "SFT_MODEL_NAME": "SFT_BASE_MODEL",
    "SFT_OUTPUT_DIR": "SFT_OUT_LORA_DIR",
    "SFT_OUT_DIR": "SFT_OUT_LORA_DIR",
    "SFT_MAX_LENGTH": "SFT_MAX_SEQ_LEN",
    "SFT_MAX_SEQ_LENGTH": "SFT_MAX_SEQ_LEN",
    "SFT_SPLIT": "SFT_DATASET_SPLIT",
    "SFT_DATASET_IDS": "SFT_DATASET_MIX",
    "SFT_DATASETS": "SFT_DATASET_MIX",
    "SFT_INPUT_JSONL": "SFT_DATASET_ID",
    "SFT_UPSAMPLE_AGGREGATION_MAX": "SFT_UPSAMPLE_RULES",
    "SFT_AGGREGATION_MAX_MULTIPLIER": "SFT_UPSAMPLE_RULES",
    "SFT_TRAIN_ON_INPUTS": "SFT_TRAIN_ON_PROMPT",
}
# dotenv takes any text before "=" for a name; this is what a person can have meant.
_READABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# A setting within the value of another one: a quote before it was never closed.
_ASSIGNMENT = re.compile(r"[\r\n]\s*(?:export\s+)?((?:SFT|MLFLOW)_[A-Z0-9_]+)\s*=")
_JSON_VALUE = re.compile(r"=\s*['\"]?\s*[\[{]")
_LINE_END = re.compile(r"\r\n|\n|\r")


class Location(NamedTuple):
    """Where a value stands; sorts as problems are listed: file lines first, then the environment, then `--set`."""

    rank: int
    line: int
    origin: str

    def __str__(self) -> str:
        return f"{self.origin} line {self.line}" if self.line else self.origin


class Problem(NamedTuple):
    """One mistake, sortable by the place it stands at."""

    place: Location
    text: str


@dataclass
class Given:
    """Texts found for settings (name -> text, empty = unset), their places, and what else the env file defines."""

    values: dict[str, str] = field(default_factory=dict)
    places: dict[str, Location] = field(default_factory=dict)
    passthrough: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    """Names on lines that cannot be read: it would mislead to call them missing."""
    file_name: str = ""
    is_missing: bool = False
    """Whether there is no env file that can be read."""

    def origins(self, names: Iterable[str]) -> dict[str, str]:
        """Name -> the place its value came from; an empty text in an env file is as good as none."""
        set_by = {name: place.origin for name, place in self.places.items() if self.values[name] or place.rank}
        return {name: set_by.get(name, "default") for name in names}


def name_of(attribute: str) -> str:
    """SFT_LORA_R for lora_r, MLFLOW_TRACKING_URI for mlflow_tracking_uri."""
    return attribute.upper() if attribute.startswith("mlflow_") else f"SFT_{attribute.upper()}"


def attribute_of(name: str) -> str:
    """lora_r for SFT_LORA_R."""
    return name.removeprefix("SFT_").lower()


def closest(name: str, choices: Iterable[str]) -> str:
    """The choice spelt most like `name`, compared without case, or "" when none is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    if len(name) > 2:
        for choice in by_lower:
            if choice.startswith(name.lower()):
                return by_lower[choice]
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else ""


def printable(value: object) -> str:
    """The text on one line, without control characters and halves of characters."""
    return "".join(character if character.isprintable() else " " for character in str(value))


def shown(name: str, value: object, *, is_setting: bool = True) -> str:
    """`NAME=value` on one line for a message: shortened, with tokens, passwords and credentials in URLs hidden."""
    if not is_setting and SECRET_NAME.search(name):
        return f"{printable(name)}=***"
    text = " ".join(printable(hide_secrets(str(value))).split())
    return f"{printable(name)}={text if len(text) <= 80 else text[:77] + '...'}"


def gather(
    names: Sequence[str],
    path: Path,
    *,
    overrides: Sequence[str],
    tried: Sequence[str] = (),
    environ: Mapping[str, str],
) -> Given:
    """Everything said about the settings `names`, the strongest place winning; mistakes are collected, not raised."""
    given = Given(file_name=path.name)
    for place, name, value in _file_entries(path, given):
        _take(given, names, place=place, name=name, value=value)
    for name, value in sorted(environ.items()):
        if name.startswith("SFT_") or name in names:
            _take(given, names, place=Location(1, 0, "environment"), name=name, value=value)
    options = [*((Location(2, 0, "--set"), text) for text in overrides), *((Location(3, 0, "--try"), t) for t in tried)]
    for place, text in options:
        name, equals, value = text.partition("=")
        if equals:
            _take(given, names, place=place, name=name.strip(), value=value)
        else:
            given.problems.append(Problem(place, f"{place} {text}: has no value; write {place} NAME=VALUE"))
    return given


def _take(given: Given, names: Sequence[str], *, place: Location, name: str, value: str) -> None:
    if "\0" in value or not _is_text(value):
        text = f"{printable(name)}: its value contains bytes that are no text; write it again ({place})"
        given.problems.append(Problem(place, text))
        given.unreadable.add(name)
    elif name in names:
        given.values[name] = value.rstrip().lstrip(" \t")
        given.places[name] = place
    elif hint := _unknown_name(name, names, in_file=place.rank == 0):
        given.problems.append(Problem(place, f"{shown(name, value, is_setting=False)}: {hint} ({place})"))
    else:
        given.passthrough[name] = value


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it; the environment can contain other bytes, which Python keeps as half characters."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _unknown_name(name: str, names: Sequence[str], *, in_file: bool) -> str:
    """What is wrong with a name that is no setting, or "" for a name of some other program in an env file."""
    near = ALIASES.get(name.upper(), "") or _closest_setting(name, names)
    unprefixed = f"SFT_{name.upper()}" if f"SFT_{name.upper()}" in names else ""
    if in_file and not name.upper().startswith("SFT_") and not unprefixed and not _is_misspelt(name, near):
        return ""
    near = unprefixed or near
    return f"is not a setting; {f'did you mean {near}?' if near else 'remove it, docs/settings.md lists them all'}"


def _closest_setting(name: str, names: Sequence[str]) -> str:
    """The setting spelt most like `name`; a common SFT_ does not make two names alike."""
    if not name.upper().startswith("SFT_"):
        return closest(name, names)
    near = closest(name[4:], [known[4:] for known in names if known.startswith("SFT_")])
    return f"SFT_{near}" if near else ""


def _is_misspelt(name: str, near: str) -> bool:
    """Whether a name without SFT_ was meant as one (STF_LR, SFTLR), unlike DPO_LR or MLFLOW_TRACKING_TOKEN."""
    if not near:
        return False
    likeness = difflib.SequenceMatcher(None, name.upper(), near).ratio()
    head_likeness = difflib.SequenceMatcher(None, name.upper().split("_")[0], "SFT").ratio()
    return likeness >= 0.9 if near.startswith("MLFLOW_") else likeness >= 0.75 and head_likeness >= 0.6


def _file_entries(path: Path, given: Given) -> list[tuple[Location, str, str]]:
    """(place, name, text) of every readable line of an env file; the last one of a name that is written twice."""
    entries: dict[str, tuple[Location, str, str]] = {}
    unreadable: list[tuple[int, str]] = []
    last = ""
    for binding in parse_stream(StringIO(_file_text(path, given), newline="")):
        line, name = _line_of(binding), binding.key or ""
        if binding.error or (name and not _READABLE_NAME.fullmatch(name)):
            # What follows a JSON value without quotes belongs to it; the value is reported anyway.
            if not last.startswith(("[", "{")):
                unreadable.append((line, binding.original.string))
        elif name:
            place, last = Location(0, line, path.name), binding.value or ""
            given.problems += _binding_problems(name, last, place=place, entries=entries)
            entries[name] = (place, name, last)
    _report_unreadable(unreadable, given)
    return list(entries.values())


def _file_text(path: Path, given: Given) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        what = f"Stage env file not found: {path}; create it, or name its folder with --env-dir"
    except UnicodeDecodeError as error:
        what = f"{path}: is not UTF-8 (byte {error.start + 1}); save it again as UTF-8"
    except OSError as error:
        what = f"{path}: cannot be read ({error.strerror}); make it a readable file"
    given.problems.append(Problem(Location(0, 0, path.name), what))
    given.is_missing = True
    return ""


def _line_of(binding: Binding) -> int:
    """The line the name stands on: python-dotenv counts from the blank lines before it."""
    text = binding.original.string
    blank = text[: len(text) - len(text.lstrip())]
    return binding.original.line + len(_LINE_END.findall(blank))


def _binding_problems(
    name: str, value: str, *, place: Location, entries: Mapping[str, tuple[Location, str, str]]
) -> list[Problem]:
    problems = []
    if name in entries:
        lines = f"lines {entries[name][0].line} and {place.line}"
        problems.append(Problem(place, f"{name}: is written twice, on {lines} of {place.origin}; keep one of them"))
    if swallowed := _ASSIGNMENT.search(value):
        text = f"{name}: its quote swallows the line of {swallowed[1]}; close it where the value ends ({place})"
        problems.append(Problem(place, text))
    return problems


def _report_unreadable(unreadable: Sequence[tuple[int, str]], given: Given) -> None:
    """One problem per block of lines, as one forgotten quote makes several unreadable."""
    last = -1
    for line, text in unreadable:
        names = _ASSIGNMENT.findall(f"\n{text}")
        given.unreadable |= set(names)
        if line > last + 1 or names:
            place = Location(0, line, given.file_name)
            given.problems.append(Problem(place, _unreadable_text(text.strip(), names, place=place)))
        last = line + len(_LINE_END.findall(text.strip()))


def _unreadable_text(text: str, names: Sequence[str], *, place: Location) -> str:
    if names and _JSON_VALUE.search(text):
        what = f"[WARNING] Failed to parse {names[0].removeprefix('SFT_')}: its quotes do not match"
        return f"{what}; write {names[0]} as JSON, single quotes outside, double quotes inside ({place})"
    # Only what stands before "=": the rest may be a token.
    start = printable(_LINE_END.split(text)[0].partition("=")[0])[:60]
    return f"{place}: {start!r} cannot be read; write NAME=value, with a value of several lines between single quotes"

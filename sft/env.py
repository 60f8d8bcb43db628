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
_READABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_SECRET_NAME = re.compile(r"TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIAL", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"(?<=://)[^/@\s]+(?=@)|\bhf_[A-Za-z0-9]{20,}")
_SWALLOWED_LINE = re.compile(r"[\r\n]\s*(?:export\s+)?((?:SFT|MLFLOW)_[A-Z0-9_]+)\s*=")


class Place(NamedTuple):
    """Where a value stands; sorts as problems are listed: file lines first, then the environment, then `--set`."""

    rank: int
    line: int
    origin: str

    def __str__(self) -> str:
        return f"{self.origin} line {self.line}" if self.line else self.origin


class Problem(NamedTuple):
    """One mistake, sortable by the place it stands at."""

    place: Place
    text: str


@dataclass
class Given:
    """Texts found for settings (name -> text, empty = unset), their places, and what else the env file defines."""

    values: dict[str, str] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    passthrough: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def closest(name: str, choices: Iterable[str]) -> str:
    """The choice spelt most like `name`, compared without case, or "" when none is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    if len(name) > 2:
        for choice in by_lower:
            if choice.startswith(name.lower()):
                return by_lower[choice]
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else ""


def shown(name: str, value: object, *, is_setting: bool = True) -> str:
    """`NAME=value` on one line for a message: shortened, with tokens, passwords and credentials in URLs hidden."""
    if not is_setting and _SECRET_NAME.search(name):
        return f"{name}=***"
    text = " ".join(_SECRET_TEXT.sub("***", str(value)).split())
    return f"{name}={text if len(text) <= 80 else text[:77] + '...'}"


def hide_secrets(text: str) -> str:
    """The text with credentials inside URLs and hub tokens replaced by ***."""
    return _SECRET_TEXT.sub("***", text)


def gather(names: Sequence[str], path: Path, *, overrides: Sequence[str], environ: Mapping[str, str]) -> Given:
    """Everything said about the settings `names`, the strongest place winning; mistakes are collected, not raised."""
    given = Given()
    for place, name, value in _file_entries(path, given.problems):
        _take(given, names, place=place, name=name, value=value)
    for name, value in sorted(environ.items()):
        if name.startswith("SFT_") or name in names:
            _take(given, names, place=Place(1, 0, "environment"), name=name, value=value)
    for override in overrides:
        name, equals, value = override.partition("=")
        place = Place(2, 0, "--set")
        if equals:
            _take(given, names, place=place, name=name.strip(), value=value)
        else:
            given.problems.append(Problem(place, f"--set {override}: has no value; write --set NAME=VALUE"))
    return given


def _take(given: Given, names: Sequence[str], *, place: Place, name: str, value: str) -> None:
    if "\0" in value:
        given.problems.append(Problem(place, f"{name}: its value contains a NUL character; remove it ({place})"))
    elif name in names:
        given.values[name] = value.strip()
        given.places[name] = place
    elif hint := _unknown_name(name, names, in_file=place.rank == 0):
        given.problems.append(Problem(place, f"{shown(name, value, is_setting=False)}: {hint} ({place})"))
    else:
        given.passthrough[name] = value


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


def _file_entries(path: Path, problems: list[Problem]) -> list[tuple[Place, str, str]]:
    """(place, name, text) of every readable line of an env file."""
    text = _file_text(path, problems)
    entries: dict[str, tuple[Place, str, str]] = {}
    unreadable: list[tuple[int, str]] = []
    for binding in parse_stream(StringIO(text, newline="")):
        line = _line_of(binding)
        if binding.error or (binding.key is not None and not _READABLE_NAME.fullmatch(binding.key)):
            unreadable.append((line, binding.original.string))
        elif binding.key is not None:
            place = Place(0, line, path.name)
            problems += _binding_problems(binding, place, entries)
            entries[binding.key] = (place, binding.key, binding.value or "")
    problems += _unreadable_problems(unreadable, path.name)
    return list(entries.values())


def _file_text(path: Path, problems: list[Problem]) -> str:
    here = Place(0, 0, path.name)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        what = f"Stage env file not found: {path}; create it, or name its folder with --env-dir"
    except UnicodeDecodeError as error:
        what = f"{path}: is not UTF-8 (byte {error.start}); save it again as UTF-8"
    except OSError as error:
        what = f"{path}: cannot be read ({error.strerror}); make it a readable file"
    problems.append(Problem(here, what))
    return ""


def _line_of(binding: Binding) -> int:
    """The line the name stands on: python-dotenv counts from the blank lines before it."""
    text = binding.original.string
    blank = text[: len(text) - len(text.lstrip())]
    return binding.original.line + len(re.findall(r"\r\n|\n|\r", blank))


def _binding_problems(binding: Binding, place: Place, entries: Mapping[str, tuple[Place, str, str]]) -> list[Problem]:
    name, problems = binding.key or "", []
    if name in entries:
        first = entries[name][0]
        text = f"{name}: is written twice, on lines {first.line} and {place.line} of {place.origin}; keep one of them"
        problems.append(Problem(place, text))
    if swallowed := _SWALLOWED_LINE.search(binding.value or ""):
        text = (
            f"{name}: its quote swallows the line of {swallowed[1]}; close the quote at the end of the value ({place})"
        )
        problems.append(Problem(place, text))
    return problems


def _unreadable_problems(unreadable: Sequence[tuple[int, str]], file_name: str) -> list[Problem]:
    """One problem per block of unreadable lines, which one forgotten quote causes."""
    problems: list[Problem] = []
    last = -1
    for line, text in unreadable:
        if line > last + 1:
            # Only what stands before "=": the rest may be a token.
            start = text.strip().partition("=")[0].split("\n")[0][:60]
            remedy = "write NAME=value, with single quotes around a value of several lines"
            problems.append(
                Problem(Place(0, line, file_name), f"{file_name} line {line}: {start!r} cannot be read; {remedy}")
            )
        last = line + text.strip().count("\n")
    return problems

"""Which files a source is: one, those of a folder or of a pattern. Reads no rows."""

import re
from collections.abc import Sequence
from pathlib import Path

# Endings of the file types that are read, and of the ways a file of text may be packed.
KINDS = (".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv")
PACKED = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = f"{', '.join(KINDS)}, and those of text packed as .gz or .zst"
# Words by which the name of a file tells its split, as on the hub.
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_ABOUT = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "metadata.json", "state.json"})


class SourceError(Exception):
    """A source cannot be loaded; the message is the reason people are shown."""


def kind_of_file(path: Path) -> tuple[str, str | None]:
    """The ending of a file's type and how it is packed: (".jsonl", "gzip"). Raises SourceError for an unknown one."""
    packed = PACKED.get(path.suffix.lower())
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    if kind not in KINDS or (packed and kind == ".parquet"):
        raise SourceError(f"{path}: the file types known are {_KNOWN}")
    return kind, packed


def has_kind(path: Path) -> bool:
    """Whether the name of a file says that it holds rows."""
    try:
        return bool(kind_of_file(path))
    except SourceError:
        return False


def is_pattern(name: str) -> bool:
    """Whether a name stands for the files that match it."""
    return any(mark in name for mark in "*?[") and not Path(name).expanduser().exists()


def files_of_pattern(name: str) -> list[Path]:
    """The files that match, by name, without hidden ones."""
    path = Path(name).expanduser()
    try:
        matches = list(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    except ValueError:  # "**" inside a part of a path
        return []
    return sorted(path for path in matches if path.is_file() and not path.name.startswith("."))


def files_of_folder(folder: Path, split: str) -> list[Path]:
    """The files with the rows of a split, by name: those whose names tell it, or all where no name tells one.

    Raises:
        SourceError: there is none, or it can't be told which they are.
    """
    below = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path.relative_to(folder)))
    if not below:
        raise SourceError(f"{folder}: neither a folder written by save_to_disk nor one with data files ({_KNOWN})")
    kinds = sorted({kind_of_file(path)[0] for path in below})
    if len(kinds) > 1:
        raise SourceError(
            f"{folder}: it has files of several types ({', '.join(kinds)}); name those to read, as {folder}/*{kinds[0]}"
        )
    return _of_split(folder, below, split)


def _is_data(path: Path) -> bool:
    return has_kind(path) and path.name not in _ABOUT and not any(part.startswith(".") for part in path.parts)


def _of_split(folder: Path, below: Sequence[Path], split: str) -> list[Path]:
    told = {path: _split_of(path.relative_to(folder)) for path in below}
    names = sorted({name for name in told.values() if name})
    if not names and split == "train":
        return list(below)
    silent = [path.name for path, name in told.items() if name is None]
    if names and silent:
        raise SourceError(
            f"{folder}: some files tell their split ({', '.join(names)}), others ({', '.join(silent[:3])}) do not;"
            f" name those to read, as {folder}/*{below[0].suffix}"
        )
    found = [path for path, name in told.items() if name in (split, _SPLITS.get(split, split))]
    if not found:
        raise SourceError(f'{folder}: no split "{split}"; there are {", ".join(names) or "none"}')
    return found


def _split_of(path: Path) -> str | None:
    """The split a file's place tells: `data/train-00000-of-00003.parquet`, `test/a.jsonl`, `my_dev_rows.csv`."""
    shard = _SHARD.match(path.name)
    if shard:
        return shard[1]
    words = (word for part in reversed(path.parts) for word in re.split(r"[^a-z]+", part.lower()))
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)

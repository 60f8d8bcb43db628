"""One source -> rows of messages, kept as Arrow under a key that follows the content of local files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import huggingface_hub.errors
import pyarrow as pa
import pyarrow.compute as pc

from sft.data.sources.blocks import Part, blocks_of, parted, rows_of
from sft.data.sources.columns import Columns, Tally, reason_of
from sft.data.sources.files import SourceError, files_of_folder, files_of_pattern, has_kind, is_pattern, kind_of_file
from sft.data.sources.readers import ROWS_AT_ONCE, read_file, tables_to_rows
from sft.data.sources.shapes import (
    Shape,
    content_hash,
    known_columns,
    paths_of,
    read_messages,
    task_key,
    tools_of,
)
from sft.data.sources.store import Write, digest_of, key_of, stored
from sft.data.sources.turns import Dropped, packed
from sft.data.workers import cores, in_order
from sft.errors import first_line

if TYPE_CHECKING:
    from sft.settings import Source

# Part of every fingerprint, by which stages know their data again: raise it only when rows mean something else.
VERSION = 3
# Part of a cache's name besides: raise it when rows are kept in another form, and old caches are left alone.
_FORM = 6
# Below, starting processes takes about as long as they save.
_BYTES_WORTH_PROCESSES = 1 << 22
SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "task_key": pa.string(),
        "pack": pa.string(),
        "content_hash": pa.uint64(),
        "paths": pa.list_(pa.list_(pa.string())),
        "extras": pa.string(),  # `turns.packed`: JSON text, so that rows without any cost nothing
        "number": pa.uint32(),  # place in the source, from 1
    }
)


@dataclass(frozen=True)
class Rows:
    """Rows of one source: first messages, after `label.label` tokens and labels as well.

    `dropped` counts lost rows by reason, `noted` what happened to kept ones (truncated, no marker); `first` has the
    number of the first row lost for a reason. `unread` are columns, and keys of messages, whose text nothing reads.
    `labels` is the file that tokens and labels come from as they are.
    """

    source: Source
    dataset: datasets.Dataset
    dropped: Counter[str]
    fingerprint: str
    noted: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    labels: Path | None = None


def load_source(source: Source, *, processes: int | None = None) -> Rows:
    """The rows of a source as messages, in their order; `processes` read them, by default as many as pay.

    Raises:
        SourceError: with the reason to show after "Failed to load <id>:".
    """
    identity, raw_rows = open_source(source)
    fingerprint = key_of("rows", VERSION, identity, source.limit, source.columns)

    def fill(write: Write) -> dict[str, Counter[str]]:
        files = _files(source, Path(source.id).expanduser())
        blocks = blocks_of(files, source.encoding) if files and source.limit is None else None
        size = sum(file.stat().st_size for file in files) if source.limit is None else 0
        count = processes or (cores() if size >= _BYTES_WORTH_PROCESSES else 1)
        parts = parted(islice(raw_rows(), source.limit)) if blocks is None else blocks
        return _write_rows(parts, source, write, processes=count)

    found = stored(f"rows-{fingerprint}-{_FORM}", SCHEMA, fill)
    counted = found.counted
    first, unread = dict(counted["first"]), tuple(sorted(counted["unread"]))
    return Rows(source, found.dataset, counted["dropped"], fingerprint, counted["noted"], first=first, unread=unread)


def open_source(source: Source) -> tuple[Any, Callable[[], Iterator[dict[str, Any]]]]:
    """What the source's content is known by, and a function that reads its rows as they stand there.

    Raises:
        SourceError: there is no such source; the function raises it for what it finds while it reads.
    """
    wanted = known_columns().union((source.columns or {}).values())
    path = Path(source.id).expanduser()
    files = _files(source, path)
    if files:
        content: list[Any] = [source.encoding, *([kind_of_file(file), digest_of(file)] for file in files)]
        return content, lambda: chain.from_iterable(read_file(file, source.encoding, wanted) for file in files)
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file())
        content = [source.split, *([str(file.relative_to(path)), digest_of(file)] for file in below)]
        return content, lambda: _dataset_rows(_from_folder(path, source.split), wanted)
    dataset = _from_hub(source)
    return ["hub", dataset._fingerprint], lambda: _dataset_rows(dataset, wanted)


def _files(source: Source, path: Path) -> list[Path]:
    """The data files a source is; none for a folder of `save_to_disk` and a data set of the hub."""
    if is_pattern(source.id):
        found = files_of_pattern(source.id)
        if not found:
            raise SourceError(f"no file matches {path}")
    elif path.is_dir():
        return [] if _is_saved(path) else files_of_folder(path, source.split)
    elif path.is_file():
        found = [path]
    elif has_kind(path):
        raise SourceError(f"there is no file {path}")
    elif not _may_be_hub_id(source.id):
        raise SourceError(f"there is no file or folder {path}")
    else:
        return []
    for file in found:
        kind_of_file(file)
    if source.split != "train":
        raise SourceError(
            f'{source.id}: "split" asks for {source.split}, but a file has no splits; leave it out'
            ' ("limit" takes the first rows)'
        )
    return found


def _may_be_hub_id(name: str) -> bool:
    """`name` or `owner/name`; what starts like a path is one."""
    return name.count("/") <= 1 and name[0] not in "./~"


def _is_saved(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _from_folder(path: Path, split: str) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{path}: {first_line(error)}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise SourceError(f'{path}: no split "{split}"; there are {", ".join(loaded)}')
    return loaded[split]


def _from_hub(source: Source) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source.id, name=source.name, revision=source.revision, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(_hub_reason(error)) from error


def _hub_reason(error: Exception) -> str:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    text = " ".join(f"{type(cause).__name__} {cause}" for cause in causes).lower()
    if isinstance(error, huggingface_hub.errors.GatedRepoError) or "gated" in text or " 401 " in text:
        return "it is gated or private: accept its terms on its page and run official_content/configure_huggingface.sh"
    if any(sign in text for sign in ("offline", "connect", "resolve host", "timed out", "max retries")):
        return "there is no such file or folder here and the hub cannot be reached; check the name and the network"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError | FileNotFoundError):
        return "no such file or folder here, and no such data set on the hub; check the spelling"
    return first_line(error)


def _dataset_rows(dataset: datasets.Dataset, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    return tables_to_rows(dataset.with_format("arrow").iter(ROWS_AT_ONCE), wanted)


def _write_rows(parts: Iterable[Part], source: Source, write: Write, *, processes: int) -> dict[str, Counter[str]]:
    """Normalise and write part by part, so that memory does not grow with the rows. Returns what was counted.

    The first rows decide what the columns are; after them each process knows, and any part may be read by itself."""
    columns, dropped, noted = Columns(source), Tally(), Counter[str]()

    def read(rows: Iterable[dict[str, Any]]) -> _Read:
        return _read(rows, columns)

    left = iter(parts)
    number = 0
    for found in chain(
        [read(_first_rows(left))], in_order(lambda part: read(rows_of(part)), left, processes=processes)
    ):
        place = SCHEMA.get_field_index("number")
        numbers = pc.add(found.table["number"], pa.scalar(number, pa.uint32()))
        write(found.table.set_column(place, SCHEMA.field("number"), numbers))
        dropped.update(found.dropped, number)
        noted += found.noted
        columns.unread |= found.unread
        number += found.read
    unread = Counter(columns.unread)
    return {"dropped": dropped.rows, "first": Counter(dropped.first), "noted": noted, "unread": unread}


def _first_rows(parts: Iterator[Part]) -> Iterator[dict[str, Any]]:
    """The rows of as many parts as it takes to know the columns."""
    count = 0
    while count < ROWS_AT_ONCE and (part := next(parts, None)) is not None:
        for row in rows_of(part):
            count += 1
            yield row


class _Read(NamedTuple):
    """Rows read, numbered from 1, how many there were, and what was seen of them."""

    table: pa.Table
    read: int
    dropped: Tally
    noted: Counter[str]
    unread: set[str]


def _read(rows: Iterable[dict[str, Any]], columns: Columns) -> _Read:
    dropped, noted = Tally(), Counter[str]()
    kept: list[dict[str, Any]] = []
    for number, row, shape in columns.rows(rows, dropped):
        try:
            kept.append(_normalised(row, shape, noted) | {"number": number})
        except Dropped as reason:
            dropped.add(reason_of(reason, row), number)
    return _Read(pa.Table.from_pylist(kept, schema=SCHEMA), columns.number, dropped, noted, columns.unread)


def _normalised(row: dict[str, Any], shape: Shape, noted: Counter[str]) -> dict[str, Any]:
    messages = read_messages(row, shape, noted)
    extras = packed(messages, tools_of(row, shape))
    pack = row.get("pack")
    return {
        "messages": messages,
        "task_key": task_key(row, messages),
        "pack": "" if pack is None else str(pack),
        "content_hash": content_hash(messages, extras),
        "paths": paths_of(row, shape),
        "extras": extras,
    }

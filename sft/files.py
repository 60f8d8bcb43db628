"""Everything that reaches the disk passes here: a file or folder appears complete or not at all, and can be verified.

Two names mark unfinished work: `<target>.partial-<pid>` (being written) and `<target>.replaced-<pid>` (just replaced).
`clear_leftovers` removes what a killed process left of them, and puts a replaced target back where nothing followed it.
"""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft.digests import DIGESTS, sha256

MARK = "COMPLETE.json"
_LEFTOVER = re.compile(r"^\.?(?P<target>.+)\.(?P<kind>partial|replaced)-(?P<pid>\d+)(-\d+)?$")
_writes = itertools.count()


class DamagedFile(ValueError):
    """A file that exists and can't be what was written; the message names it."""


def utc_stamp() -> str:
    """Now, as it stands in file names: 20250131T235959Z."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def sync(path: Path) -> None:
    """Push a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't sync a folder; their renames are as durable as they get.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Push every file and folder below `folder` to the disk, the folder itself last."""
    for place, _, names in os.walk(folder, topdown=False):
        for path in (Path(place, name) for name in names):
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(place))


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file in one step. On any error the old file stands and nothing is left beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}-{next(_writes)}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the file by utf-8 text in one step."""
    write_bytes(path, text.encode("utf-8"))


def _plain(value: Any) -> Any:
    """The value as JSON has it: NaN and infinity become null, paths text, numpy and torch scalars numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _plain(value.item()) if hasattr(value, "item") else value


def json_text(payload: Any, *, indent: int | None = 2) -> str:
    """JSON without escapes for letters and without the NaN that other readers refuse."""
    return json.dumps(_plain(payload), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, payload: Any) -> None:
    """Replace the file by a JSON document in one step (utf-8, indented; NaN and infinity become null)."""
    write_text(path, json_text(payload) + "\n")


def read_json(path: Path) -> Any:
    """The document in the file. Raises FileNotFoundError, or DamagedFile naming the file and the reason."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{path}: not readable as JSON ({error})") from error


def append_line(path: Path, line: str) -> None:
    """Add one line, handed to the system at once; a line that does not fit on the disk leaves no part of itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        try:
            _write_all(descriptor, b"\n" * torn + line.rstrip("\n").encode("utf-8") + b"\n")
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; none when it is absent. Half a line, left by a kill, is no record."""
    records = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
    return records


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step where the system can (Linux, most local file systems); False where it can't."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _take_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
        target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    sync(target.parent)


@contextlib.contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `target` when the block ends well, and vanishes when it does not.

    What stood at `target` stays readable until the finished folder takes its name.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        _take_place(partial, target)
    finally:
        # After a swap this name holds the old folder.
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill halfway leaves nothing that looks whole."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this host has the number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def clear_leftovers(folder: Path, *, names: frozenset[str] = frozenset(), alone: bool = False) -> list[str]:
    """Remove unfinished work of ended processes directly in `folder` and return the names.

    `names` limits it to these targets. `alone`: the caller holds the lock of all of them, so a living process that
    has the number of a dead one (containers count from 1) protects nothing.
    """
    cleared = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _LEFTOVER.match(path.name)
        if not match or (names and match["target"] not in names) or not (alone or not is_alive(int(match["pid"]))):
            continue
        cleared.append(path.name)
        target = folder / match["target"]
        if match["kind"] == "replaced" and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return cleared


def set_aside(path: Path, reason: str) -> Path:
    """Rename to `<name>.<reason>-<UTC time>` (reason: old, broken) and return the new path. Nothing is overwritten."""
    stem = f"{path.name}.{reason}-{utc_stamp()}"
    names = (stem if count == 1 else f"{stem}-{count}" for count in itertools.count(1))
    place = next(place for name in names if not os.path.lexists(place := path.with_name(name)))
    path.rename(place)
    sync(place.parent)
    return place


def free_bytes(path: Path) -> int:
    """Bytes that can still be written at `path`, which need not exist yet."""
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def _listing(folder: Path) -> dict[str, Path]:
    """Files below the folder by their name in it, sorted, without hidden files and unfinished work."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if not name.startswith(".") and "/." not in name}


def content_fingerprint(path: Path) -> str:
    """`sha256:` of a file, `folder:` of a folder's names and contents.

    The cache files that `datasets` puts beside the rows it has read (`cache-*.arrow`) don't count.
    """
    if path.is_file():
        return f"sha256:{sha256(path)}"
    files = {name: each for name, each in _listing(path).items() if not re.search(r"(^|/)cache-[^/]*\.arrow$", name)}
    lines = [f"{name} {each.stat().st_size} {sha256(each)}\n" for name, each in files.items()]
    return f"folder:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def seal(folder: Path, *, digest: str = "sha256", only: str = "", among: tuple[str, ...] = ("",)) -> None:
    """Write the completeness mark, last of all: size and digest of every file, each on the disk before the mark.

    `only`: this file was changed since; the others stay as they were sealed. `among`: how the names sealed begin.
    """
    listed = read_json(folder / MARK) if only else {}
    sync_tree(folder)
    files = {n: p for n, p in _listing(folder).items() if n.startswith(among) and n != MARK and only in ("", n)}
    records = {name: {"size": p.stat().st_size, digest: DIGESTS[digest](p)} for name, p in files.items()}
    write_json(folder / MARK, listed | records)


def is_sealed(folder: Path) -> bool:
    """Whether the completeness mark is there (its files are not read: `damage` does that)."""
    return (folder / MARK).is_file()


def _fault(path: Path, record: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != record["size"]:
        return f"{path.stat().st_size} bytes instead of {record['size']}"
    digest = "xxh3" if "xxh3" in record else "sha256"
    return None if DIGESTS[digest](path) == record[digest] else "content changed"


def damage(folder: Path, *, leave: str = "") -> list[str]:
    """What is wrong with a sealed folder, one text per file; empty when every byte is as it was sealed.

    `leave`: files whose names end so are not read.
    """
    try:
        listed = read_json(folder / MARK)
        left = {name for name in listed if leave and name.endswith(leave)}
        faults = {name: _fault(folder / name, record) for name, record in listed.items() if name not in left}
    except FileNotFoundError:
        return [f"{MARK}: missing"]
    except (DamagedFile, AttributeError, KeyError, TypeError):
        return [f"{MARK}: unreadable"]
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]
    return [f"{name}: {fault}" for name, fault in faults.items() if fault]

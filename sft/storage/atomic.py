"""Everything that reaches the disk passes here: a file or folder appears complete or not at all, and can be verified.

Two names mark unfinished work: `<target>.partial-<pid>` (being written) and `<target>.replaced-<pid>` (just replaced).
`clear_leftovers` removes what a killed process left of them, and puts a replaced target back where nothing followed it.
"""

import contextlib
import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

_LEFTOVER = re.compile(r"^\.?(?P<target>.+)\.(?P<kind>partial|replaced)-(?P<pid>\d+)(-\d+)?$")
_writes = itertools.count()


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


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content; it appears at `target` whole or not at all. Missing folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}-{next(_writes)}")
    try:
        shutil.copyfile(source, aside)
        sync(aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file by utf-8 text in one step."""
    write_bytes(path, text.encode("utf-8"))


def _take_place(partial: Path, target: Path) -> None:
    replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
    sync(target.parent)


@contextlib.contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `target` when the block ends well, and vanishes when it does not.

    What stood at `target` stays readable until the finished folder takes its name; a kill between the two renames
    leaves it as `<target>.replaced-<pid>`, which the next publication (or `clear_leftovers`) puts back first.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target.parent, names=frozenset({target.name}))
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        _take_place(partial, target)
    finally:
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

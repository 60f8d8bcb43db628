"""One process tree per stage: a lock that the system drops with its holder, so kill -9 leaves none behind.

The lock is flock on a file beside the output. Forked children (data workers) share it, started programs don't.
Where a file system has no locks, a file created for the purpose names the holder instead.

Why not filelock (4.2.11 tried, docs/log.md): it closes the descriptor in forked children, so that workers of a killed
run no longer keep the stage; where NFS answers ENOLCK or ENOTSUP it raises (it knows ENOSYS alone); and it can't be
asked who holds a lock without making the file.
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sft.errors import Problems, hide_secrets
from sft.storage.atomic import is_alive, utc_stamp
from sft.storage.json_files import DamagedFile, read_json, write_json

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_PATIENCE = 0.5  # seconds: a --check looks at the lock for an instant
_PATIENCE_UNNAMED = 2.0  # on a busy machine a holder may need a moment to write who it is
_PATIENCE_WITH_ORPHANS = 10.0  # data workers notice within about 5 s that their parent was killed


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. pid 0: it did not say."""

    host: str = "this host"
    pid: int = 0
    started: str = ""
    command: str = ""

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        left = f"the children left by process {self.pid}" if self.is_gone() else f"process {self.pid}"
        return f"{left} on {self.host} since {self.started} ({self.command})"

    def is_gone(self) -> bool:
        return self.pid > 0 and self.host == socket.gethostname() and not is_alive(self.pid)


def this_process() -> Holder:
    command = hide_secrets(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    return Holder(socket.gethostname(), os.getpid(), utc_stamp(), command)


def _read(path: Path) -> Holder:
    try:
        return Holder(**read_json(path))
    except (FileNotFoundError, DamagedFile, TypeError):
        return Holder()


def _substitute(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def _substitute_holder(path: Path) -> Holder | None:
    if not _substitute(path).exists():
        return None
    holder = _read(_substitute(path))
    return None if holder.is_gone() else holder


def current_holder(path: Path) -> Holder | None:
    """Who holds the lock at this moment, or None. Writes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return _substitute_holder(path)


class Lock:
    """The lock of one stage. `warning` is set where the file system has no locks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warning = ""
        self._descriptor = -1
        self._owner = 0
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock. Raises Problems naming the holder, or the folder that can't be written."""
        while True:
            self._descriptor = self._open()
            with contextlib.ExitStack() as on_error:
                on_error.callback(os.close, self._descriptor)
                self._wait()
                if not self._is_removed():
                    on_error.pop_all()
                    break
        self._owner = os.getpid()

    def _is_removed(self) -> bool:
        """Whether the file that was waited for was taken away by its holder: the next one locks another."""
        try:
            return not os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return True

    def release(self, *, unused: bool = False) -> None:
        """Give the lock back; a forked child, which shares it, changes nothing. `unused`: nothing was written under it,
        so the file and the folders made for it go, while the lock is still held."""
        if self._owner != os.getpid():
            return
        self._owner = 0
        os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):  # a folder that another run has begun to use
            for path in self._made if unused else ():
                path.unlink(missing_ok=True) if path == self.path else path.rmdir()
        if self.warning:
            _substitute(self.path).unlink(missing_ok=True)
        else:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _open(self) -> int:
        try:
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            place = f"SFT_OUT_LORA_DIR: {self.path.parent} can't be written ({error.strerror})"
            raise Problems([f"{place}; choose a folder that this user may write"]) from error

    def _wait(self) -> None:
        started = time.monotonic()
        while not self._try():
            holder = _read(self.path)
            waited = time.monotonic() - started
            if waited > (
                _PATIENCE_WITH_ORPHANS if holder.is_gone() else _PATIENCE if holder.pid else _PATIENCE_UNNAMED
            ):
                raise Problems([self._refusal(holder)])
            time.sleep(0.05)
        if not self.warning:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(asdict(this_process())).encode(), 0)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._hold_without_locks()
        return True

    def _hold_without_locks(self) -> None:
        holder, substitute = _substitute_holder(self.path), _substitute(self.path)
        if holder:
            raise Problems([f"{self._refusal(holder)}; if it is not running any more, remove {substitute}"])
        mine = this_process()
        write_json(substitute, asdict(mine))
        # Two that start in the same instant both write; the later one stands, and after a moment both see which.
        time.sleep(0.3)
        if _read(substitute) != mine:
            raise Problems([self._refusal(_read(substitute))])
        self.warning = f"{self.path.parent} has no file locks: only {substitute.name} tells another run of this one"

    def _refusal(self, holder: Holder) -> str:
        stage = self.path.name.removesuffix(".lock")
        return f"{self.path.with_suffix('')}: {stage} is in use by {holder}; wait until it ends or stop it"

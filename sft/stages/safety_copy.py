"""The safety copy of a stage (SFT_MIRROR): made in the background while it trains, read where its folder is gone.

Machines of notebooks lose their disks. A copy that fails is said once and tried again with the next checkpoint; it
never ends a run. Of several processes the main one alone copies and restores.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from sft.distributed.signals import STOP
from sft.errors import Problems, hide_secrets, hub_errors
from sft.stages import paths
from sft.stages.lineage import holds_nothing
from sft.storage.atomic import published_folder
from sft.storage.lock import Lock
from sft.storage.mirror import HUB, Mirror, MirrorError, open_mirror
from sft.storage.seals import is_sealed, listing

if TYPE_CHECKING:
    from sft.settings import Settings
    from sft.stages.stage import Stage

# After a stop the system gives 30 s in all before it kills; at the end a slow line has this long.
SECONDS_AFTER_STOP, SECONDS_AT_END = 15.0, 1800.0
_snapshots = count()


def mirror_problems(settings: Settings) -> list[str]:
    """What is wrong with the place of the safety copy, as far as it can be known before training."""
    place = settings.mirror
    if place is None:
        return []
    if place.startswith(HUB):
        return [f"SFT_MIRROR={place}: {fault}" for fault in _token_faults()]
    root = Path(place)
    if root.absolute() == settings.out_lora_dir.absolute().parent:
        return [f"SFT_MIRROR={place}: the output itself is there; name a folder on another disk"]
    if not root.is_dir() and not root.parent.is_dir():
        remedy = "mount the drive first, or correct the path"
        return [f"SFT_MIRROR={place}: there is no {root.parent}; {remedy}"]
    there = root if root.is_dir() else root.parent
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"SFT_MIRROR={place}: {there} can't be written by this user; name another folder"]
    return []


def _token_faults() -> Iterator[str]:
    """Why this machine's token could not write to the hub; a hub out of reach is no fault of the person."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    remedy = "run official_content/configure_huggingface.sh with a token that may write"
    if get_token() is None:
        yield f"there is no hub token; {remedy}"
        return
    try:
        role = HfApi().whoami()["auth"]["accessToken"].get("role")
    except (KeyError, TypeError):
        return  # a token of another kind, such as a job's own
    except hub_errors() as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            yield f"the hub does not accept this machine's token; {remedy}"
        return
    if role == "read":
        yield f"this machine's hub token may only read; {remedy}"


def restore(settings: Settings, *, fresh: bool = False) -> list[str]:
    """Brings back the folders of this stage and earlier ones that are not there; says which, one line each.

    Raises:
        Problems: the copy can't be read, or what it holds does not fit on this disk.
    """
    return [_fetch(settings, number) for number in to_restore(settings, fresh=fresh)]


def restorable(settings: Settings, *, fresh: bool = False) -> list[str]:
    """What `restore` would say, for --check; nothing where the place itself is a problem."""
    if mirror_problems(settings):
        return []
    folders = [_folder(settings, number) for number in to_restore(settings, fresh=fresh)]
    return [f"{folder} is not here: a run restores it from the safety copy in {settings.mirror}" for folder in folders]


def to_restore(settings: Settings, *, fresh: bool = False) -> list[int]:
    """The stages whose folder is gone here and stored there. `fresh`: the stage itself is not wanted back.

    Raises:
        Problems: the place can't be looked at, so nobody knows whether the stage was begun.
    """
    wanted = range(1, settings.stage + (not fresh))
    gone = [number for number in wanted if holds_nothing(_folder(settings, number))]
    if settings.mirror is None or not gone:
        return []
    mirror = open_mirror(settings.mirror)
    try:
        return [each for each in gone if mirror.holds(_folder(settings, each).name)]
    except MirrorError as error:
        raise Problems([_unreadable(settings, error)]) from error


def _unreadable(settings: Settings, error: MirrorError) -> str:
    remedy = "try again when it can be reached; without SFT_MIRROR the stage would begin anew"
    return f"SFT_MIRROR={settings.mirror}: the safety copy can't be read ({hide_secrets(str(error))}); {remedy}"


def _folder(settings: Settings, number: int) -> Path:
    own = number == settings.stage
    return paths.own_folder(settings) if own else paths.stage_folder(settings.out_lora_dir, number)


def _fetch(settings: Settings, number: int) -> str:
    folder = _folder(settings, number)
    lock = Lock(paths.lock_path(paths.stage_folder(settings.out_lora_dir, number)))
    lock.acquire()
    try:
        if holds_nothing(folder):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)  # nothing but hidden files and the log of a start that failed
            with published_folder(folder) as partial:
                open_mirror(str(settings.mirror)).fetch(folder.name, partial)
    except MirrorError as error:
        raise Problems([_unreadable(settings, error)]) from error
    finally:
        lock.release()
    return f"Restored {folder} from the safety copy in {settings.mirror}"


@contextlib.contextmanager
def kept_safe(stage: Stage) -> Iterator[SafetyCopy | None]:
    """The safety copy while a stage is trained, None without one; what the stage has at the end is copied last."""
    if stage.settings.mirror is None or not stage.main_process:
        yield None
        return
    copy = _copy_of(stage, afresh=stage.decision == "fresh")
    seconds = SECONDS_AFTER_STOP
    try:
        yield copy
        seconds = SECONDS_AT_END
    finally:
        copy.send()
        copy.close(seconds=seconds)


def copy_finished(stage: Stage) -> None:
    """Copies a complete stage that the safety copy does not have as it is."""
    if stage.settings.mirror is None:
        return
    copy = _copy_of(stage, afresh=False)
    try:
        if not copy.mirror.holds(stage.folder.name, like=stage.folder / paths.MANIFEST):
            copy.send()
    except MirrorError as error:
        copy.warn(hide_secrets(str(error)))
    copy.close(seconds=SECONDS_AT_END)


def _copy_of(stage: Stage, *, afresh: bool) -> SafetyCopy:
    place = str(stage.settings.mirror)
    return SafetyCopy(stage.folder, open_mirror(place), place, afresh=afresh)


class SafetyCopy:
    """Sends what a stage has, after each checkpoint and at its end, from a thread of its own.

    What is sent is a picture of the moment: sealed checkpoints and weights by hard links, which rotation can't take
    away, everything else by value. While one is on its way only the newest waits.

    Args:
        folder: OUT_stageN.
        mirror: where to.
        place: what people call it.
        afresh: a tree of that name is another training's, and is taken out of the way first.
    """

    def __init__(self, folder: Path, mirror: Mirror, place: str, *, afresh: bool) -> None:
        self.folder, self.mirror, self.place, self.afresh = folder, mirror, place, afresh
        self._waiting: Path | None = None
        self._said: set[str] = set()
        self._failed = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="safety copy", daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Takes a picture of the folder and hands it to the thread."""
        try:
            picture = self._picture()
        except OSError as error:
            self.warn(f"{error.strerror}: {error.filename}")
            return
        with self._changed:
            surplus, self._waiting = self._waiting, picture
            self._changed.notify_all()
        _remove(surplus)

    def close(self, *, seconds: float) -> None:
        """Waits until everything has been copied, or so long; then lets the rest go."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        end, stopped_before = time.monotonic() + seconds, STOP.number
        while self._thread.is_alive() and time.monotonic() < end and STOP.number == stopped_before:
            self._thread.join(0.2)
        if self._thread.is_alive() or self._failed:
            self.warn("not everything was copied; the next start of the stage, complete or not, copies the rest")

    def _picture(self) -> Path:
        place = self.folder / f".mirror-{next(_snapshots)}.partial-{os.getpid()}"
        for name, source in listing(self.folder).items():
            top = name.partition("/")[0]
            if "." in top and "/" in name:
                continue  # set aside, or unfinished
            if top.startswith("checkpoint-") and not is_sealed(self.folder / top):
                continue
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source, target, by_value="/" not in name and not name.endswith(".safetensors"))
        return place

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                picture, self._waiting = self._waiting, None
            if picture is None:
                return
            try:
                if self.afresh:
                    self.mirror.retire(self.folder.name)
                self.mirror.store(self.folder.name, picture)
                self.afresh = self._failed = False
            except MirrorError as error:
                self._failed = True
                self.warn(hide_secrets(str(error)))
            finally:
                _remove(picture)

    def warn(self, what: str) -> None:
        """Says once what went wrong."""
        if what not in self._said:
            self._said.add(what)
            print(f"[WARNING] The safety copy in {self.place}: {what}. Training goes on", flush=True)


def _link_or_copy(source: Path, target: Path, *, by_value: bool) -> None:
    if not by_value:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # a disk without hard links
    shutil.copyfile(source, target)


def _remove(picture: Path | None) -> None:
    if picture:
        shutil.rmtree(picture, ignore_errors=True)

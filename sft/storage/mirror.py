"""A second place for what must not be lost: a folder, such as a mounted drive, or a repository on the hub.

Both hold one tree per name. `store` makes the tree there what it is here: a reader who comes while it works, or after
it was cut off, finds every folder of it as it was before or as it is now.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from sft.errors import hub_errors
from sft.storage.atomic import clear_leftovers, copy_file, published_folder, remove_folder, set_aside
from sft.storage.seals import MARK, damage, listing

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

HUB = "hf://"
_LAST = "stage.json"  # says what the rest is, so a tree without it was never stored whole
_CHECKPOINT = "checkpoint-"


class MirrorError(Exception):
    """The copy can't be read or written; the message says why in one line."""


class Mirror(Protocol):
    """What both kinds of places do. Every method raises MirrorError."""

    def holds(self, name: str, *, like: Path | None = None) -> bool:
        """Whether a tree of this name was stored, with this manifest where one is given."""

    def retire(self, name: str) -> None:
        """Takes a stored tree out of the way, if there is one; it can be brought back by hand."""

    def store(self, name: str, folder: Path) -> None:
        """Makes the stored tree equal to the folder and verifies what the folder's seals list."""

    def fetch(self, name: str, folder: Path) -> None:
        """Fills the folder, empty or not there yet, with the stored tree; a checkpoint without its mark is left out."""


def open_mirror(place: str) -> Mirror:
    """The place that SFT_MIRROR names."""
    return HubMirror(place.removeprefix(HUB)) if place.startswith(HUB) else FolderMirror(Path(place))


@contextmanager
def _told_plainly(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds become a MirrorError of one line: the system's own words and the file."""
    try:
        yield
    except kinds as error:
        told = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
        raise MirrorError(told.strip().partition("\n")[0] or type(error).__name__) from error


def _folders(tree: Path) -> dict[str, Path]:
    """The folders directly in a tree, hidden ones left out."""
    return {path.name: path for path in sorted(tree.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _sealed(folder: Path) -> bytes:
    """A folder's completeness mark, b"" without one."""
    return (folder / MARK).read_bytes() if (folder / MARK).is_file() else b""


class FolderMirror:
    """Trees in a folder of another disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def holds(self, name: str, *, like: Path | None = None) -> bool:
        stored = self.root / name / _LAST
        with _told_plainly(OSError):
            return stored.is_file() and (like is None or stored.read_bytes() == like.read_bytes())

    def retire(self, name: str) -> None:
        with _told_plainly(OSError):
            if (self.root / name).is_dir():
                set_aside(self.root / name, "old")

    def store(self, name: str, folder: Path) -> None:
        target = self.root / name
        with _told_plainly(OSError):
            target.mkdir(parents=True, exist_ok=True)
            clear_leftovers(target, alone=True)
            for child, path in _folders(folder).items():
                self._publish(path, target / child)
            (target / MARK).unlink(missing_ok=True)  # what it vouches for is about to change
            for child in sorted(listing(folder), key=lambda file: (file == _LAST, file == MARK)):
                if "/" not in child:
                    copy_file(folder / child, target / child)
            for child in _folders(target).keys() - _folders(folder).keys():
                if child.startswith(_CHECKPOINT):
                    remove_folder(target / child)
            if _sealed(target):
                _verify(target)

    def _publish(self, source: Path, target: Path) -> None:
        if _sealed(source) and _sealed(source) == _sealed(target):
            return
        with published_folder(target) as partial:
            shutil.copytree(source, partial, copy_function=shutil.copyfile, dirs_exist_ok=True)
            if _sealed(partial):
                _verify(partial)

    def fetch(self, name: str, folder: Path) -> None:
        source = self.root / name
        with _told_plainly(OSError):
            clear_leftovers(source, alone=True)
            for child, path in listing(source).items():
                top = child.partition("/")[0]
                if not top.startswith(_CHECKPOINT) or _sealed(source / top):
                    copy_file(path, folder / child)


def _verify(folder: Path) -> None:
    """Reads a sealed copy back. Raises MirrorError where a byte differs from what was sealed."""
    if faults := damage(folder):
        raise MirrorError(f"the copy at {folder} differs from what was sent ({faults[0]})")


class HubMirror:
    """Trees in a private model repository, each stored in one commit; its history keeps what is replaced."""

    def __init__(self, repository: str) -> None:
        self.repository = repository

    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi  # half a second that only who has such a mirror waits for

        return HfApi()

    def _stored(self, name: str) -> dict[str, "RepoFile"]:
        """The files of a stored tree by their name in it."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        with _told_plainly(*hub_errors()):
            try:
                found = list(self._api().list_repo_tree(self.repository, name, recursive=True))
            except (EntryNotFoundError, RepositoryNotFoundError):
                return {}
        return {each.path.removeprefix(f"{name}/"): each for each in found if isinstance(each, RepoFile)}

    def holds(self, name: str, *, like: Path | None = None) -> bool:
        stored = self._stored(name).get(_LAST)
        return stored is not None and (like is None or stored.size == like.stat().st_size)

    def retire(self, name: str) -> None:
        if self._stored(name):
            self._commit(f"{name} is trained afresh", [], [name])

    def store(self, name: str, folder: Path) -> None:
        files = listing(folder)
        before = {child.partition("/")[0] for child in self._stored(name) if "/" in child}
        gone = {child for child in before - _folders(folder).keys() if child.startswith(_CHECKPOINT)}
        self._commit(
            f"{name}", [(f"{name}/{file}", path) for file, path in files.items()], [f"{name}/{g}" for g in gone]
        )
        sizes = {file: stored.size for file, stored in self._stored(name).items()}
        for file, path in files.items():
            if sizes.get(file) != path.stat().st_size:
                raise MirrorError(f"the copy of {file} has {sizes.get(file, 'no')} bytes, not {path.stat().st_size}")

    def _commit(self, message: str, added: list[tuple[str, Path]], folders_gone: list[str]) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        deletions = [CommitOperationDelete(f"{folder}/", is_folder=True) for folder in sorted(folders_gone)]
        additions = [CommitOperationAdd(name, path) for name, path in added]
        with _told_plainly(*hub_errors()):
            self._api().create_repo(self.repository, private=True, exist_ok=True)
            self._api().create_commit(self.repository, [*deletions, *additions], commit_message=message)

    def fetch(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as place:
            with _told_plainly(*hub_errors()):
                self._api().snapshot_download(self.repository, allow_patterns=f"{name}/*", local_dir=place)
            for child in sorted((Path(place) / name).iterdir()):
                if not child.name.startswith(_CHECKPOINT) or _sealed(child):
                    child.rename(folder / child.name)

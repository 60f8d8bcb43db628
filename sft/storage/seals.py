"""Completeness marks and checksums: what was sealed can be verified before it is used."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from sft.storage.atomic import sync_tree
from sft.storage.json_files import DamagedFile, read_json, write_json

MARK = "COMPLETE.json"


def listing(folder: Path) -> dict[str, Path]:
    """Files below the folder by their name in it, sorted, without hidden files and unfinished work."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if not name.startswith(".") and "/." not in name}


def content_fingerprint(path: Path) -> str:
    """`sha256:` of a file, `folder:` of a folder's names and contents.

    The cache files that `datasets` puts beside the rows it has read (`cache-*.arrow`) don't count.
    """
    if path.is_file():
        return f"sha256:{sha256(path)}"
    cache = re.compile(r"(^|/)cache-[^/]*\.arrow$")
    return files_fingerprint({name: each for name, each in listing(path).items() if not cache.search(name)})


def files_fingerprint(files: Mapping[str, Path]) -> str:
    """`folder:` of files by name, size and content."""
    lines = [f"{name} {each.stat().st_size} {sha256(each)}\n" for name, each in sorted(files.items())]
    return f"folder:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def seal(folder: Path, *, digest: str = "sha256", only: str = "", among: tuple[str, ...] = ("",)) -> None:
    """Write the completeness mark, last of all: size and digest of every file, each on the disk before the mark.

    `only`: this file was changed since; the others stay as they were sealed. `among`: how the names sealed begin.
    """
    listed = read_json(folder / MARK) if only else {}
    sync_tree(folder)
    files = {n: p for n, p in listing(folder).items() if n.startswith(among) and n != MARK and only in ("", n)}
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


def sha256(path: Path) -> str:
    """The hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def xxh3(path: Path) -> str:
    """Ten times as fast, and no proof against forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


DIGESTS = {"sha256": sha256, "xxh3": xxh3}

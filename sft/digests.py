"""Digests of files: sha256 to name a content, xxh3 to find damage in hundreds of GB."""

import hashlib
from pathlib import Path

import xxhash


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

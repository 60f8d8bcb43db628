"""How glibc keeps freed memory where training runs on the CPU. Nothing is imported here that takes time.

torch asks for aligned blocks: glibc cuts each from a larger piece and frees the crumbs around it. Its caches of small
freed blocks hand those crumbs to small objects, which then part the holes that large blocks leave, so that none of them
joins another and the heap grows far beyond its tensors. Without the caches holes join (docs/log.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

NAME, WITHOUT_CACHES = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
_NVIDIA = Path("/dev/nvidiactl")
# mallopt's number in glibc's malloc.h, and from which size on blocks are mapped one by one, which costs a page fault
# per 4 KiB each time. Larger ones than these seldom fit into the holes of others either (docs/log.md).
_M_MMAP_THRESHOLD, LARGE, _SMALL = -3, 8 * 2**20, 4 * 2**20


def has_glibc() -> bool:
    """Whether this is Linux with glibc, the only one that the rest is about."""
    names = getattr(os, "confstr_names", {})
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in names and bool(os.confstr("CS_GNU_LIBC_VERSION"))


def tight_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The environment in which a process starts without the caches; None where they are switched already, by us or by
    the person, or where it is not worth it: there is a GPU, or no glibc."""
    before = environ.get(NAME, "")
    if "glibc.malloc." in before or _NVIDIA.exists() or not has_glibc():
        return None
    return dict(environ) | {NAME: f"{before}:{WITHOUT_CACHES}".lstrip(":")}


def begin_tight() -> None:
    """This process begins anew, with the same number, arguments and streams, without those caches: glibc reads the
    choice only when a program starts. To be called before anything else; it takes 15 ms, once."""
    environ = tight_environment(os.environ)
    if environ and sys.executable and sys.orig_argv[1:]:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def return_freed_memory(*, sparingly: bool = False) -> None:
    """Large blocks go back to the system as soon as they are freed: from 4 MiB on, and where holes join from 8 MiB on
    unless memory is to be spared rather than time.

    By default freed blocks of up to 32 MiB stay in the heap, in holes that seldom fit again: a training step on the CPU
    then takes 1.8 times the memory of its tensors, with gradient checkpointing 3.7 times.
    """
    if has_glibc():
        holes_join = WITHOUT_CACHES in os.environ.get(NAME, "")
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE if holes_join and not sparingly else _SMALL)


def return_holes() -> None:
    """Gives pages of the heap that hold nothing back to the system: before work whose memory is of another shape."""
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)

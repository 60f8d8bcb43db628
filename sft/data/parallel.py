"""One function over many items in several processes, results in order."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from sft.errors import RunFailed

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_work: Callable[[Any], Any] | None = None


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Any], Any], items: Sequence[Any], *, processes: int) -> Iterator[Any]:
    """`work(item)` for every item, in order. Processes are forked, so that `work` may be any function.

    Raises:
        RunFailed: a process was killed.
    """
    if processes <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, items)
        return
    # The tokenizers library reads this when it is forked: unset it warns, and its threads do not survive a fork.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(work,)) as pool:
            yield from pool.map(_call, items)
    except BrokenProcessPool as error:
        raise RunFailed(
            "A process that prepared rows was killed, most likely for memory: try SFT_NUM_PROC=1"
        ) from error
    finally:
        os.unsetenv("TOKENIZERS_PARALLELISM")


def _start(work: Callable[[Any], Any]) -> None:
    """In the new process: take the work along, and leave signals to the parent."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # else a killed run leaves its processes behind


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)

"""Work on rows in forked processes, its results in the order of the items and no more of them than are being made."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from sft.distributed.signals import die_with_parent
from sft.errors import RunFailed
from sft.heap import return_holes

# Items handed out beyond those being worked on: a process never waits for its next one.
_AHEAD = 2

_work: Callable[[Any], Any] | None = None


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Any], Any], items: Iterable[Any], *, processes: int) -> Iterator[Any]:
    """`work(item)` for every item, in order. Processes are forked, so that `work` may be any function; on macOS, whose
    libraries do not survive a fork, there is one process. Items are taken as they are needed.

    Raises:
        RunFailed: a process was killed.
    """
    if processes <= 1 or sys.platform == "darwin" or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, items)
        return
    # The tokenizers library reads this when it is forked: unset it warns, and its threads do not survive a fork.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    # What the collector looks through it writes to: each process would get a copy of all there is.
    gc.freeze()
    return_holes()
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(work,)) as pool:
            waiting: deque[Future[Any]] = deque()
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) > _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunFailed(
            "A process that prepared rows was killed, most likely for memory: try SFT_NUM_PROC=1"
        ) from error
    finally:
        gc.unfreeze()
        os.unsetenv("TOKENIZERS_PARALLELISM")


def _start(work: Callable[[Any], Any]) -> None:
    """In the new process: take the work along, and leave signals to the parent."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)  # else a killed run leaves its processes behind


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)

"""Several processes of one run: joining, waiting for each other, hearing what the main process found."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.distributed import DistError, Store
from torch.distributed.distributed_c10d import _get_default_store

from sft.distributed.launch import launched
from sft.distributed.signals import STOP, Stopped, die_with_parent
from sft.errors import Problems, RunFailed
from sft.storage.json_files import json_text

# The main process may merge, label or save this long before the others give up.
HOURS = 6.0
# A training step or a batch of answers takes less: a rank that is silent longer inside one hangs.
STEP_LIMIT = timedelta(minutes=30)
# Without a launcher the ranks save what they have within a minute or not at all.
ALONE_SECONDS = 30.0
_END = "sft/end"
_meetings = count()


def join_processes() -> PartialState:
    """This process among those that were launched together; the first call connects them.

    Raises:
        Problems: more processes than GPUs on this machine.
    """
    die_with_parent(signal.SIGTERM)  # a launcher that is killed takes nobody with it
    gpus, here = torch.cuda.device_count(), launched().local_processes
    if 0 < gpus < here:
        raise Problems([f"--num_processes: {here} processes were started on a machine with {gpus} GPUs; start {gpus}"])
    if launched().deepspeed:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # the stage before left it; it would split what one process makes alone
    if launched().deepspeed and not gpus:
        import deepspeed.ops

        # Shared memory between CPU processes that DeepSpeed would compile first: a minute, and it needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return PartialState(cpu=not torch.cuda.is_available(), timeout=STEP_LIMIT)


def say(text: str) -> None:
    """One line on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)


def largest(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers; every rank gives one, on the device its processes talk through."""
    found = torch.tensor([number], device=device)
    if PartialState().num_processes > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found.item())


def wait(what: str = "the other processes", *, hours: float = HOURS) -> None:
    """Returns when every rank has come here. Unlike a library's barrier it hears stop signals, has hours, and says
    who is missing.

    Raises:
        RunFailed: the time is over, or the process that connects all others has ended.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    try:
        _meet(state, what, hours)
    except DistError:
        _meet_without_launcher(state, what)


def _meet(state: PartialState, what: str, hours: float) -> None:
    """Counts the ranks that have come in the launcher's store, so that the time may be hours and names can be said."""
    number, end, pause = next(_meetings), time.monotonic() + hours * 3600, 0.005
    store, meeting = _get_default_store(), f"sft/{number}"
    # One key a rank, written over at each meeting: hundreds of ranks meeting thousands of times would fill the store.
    store.set(_place(state.process_index), f"{number} {socket.gethostname()}")
    store.add(meeting, 1)
    while store.add(meeting, 0) < state.num_processes:
        if store.check([_END]):
            raise _ended(json.loads(store.get(_END)))
        if time.monotonic() > end:
            raise RunFailed(_missing(store, number, state, what=what, hours=hours))
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _place(rank: int) -> str:
    """The key under which a rank says at which meeting it is, and on which host."""
    return f"sft/rank/{rank}"


def tell_end(code: int) -> None:
    """Lets the ranks that wait hear that this one has ended; a launcher on another machine would not tell them."""
    if torch.distributed.is_initialized():
        end = {"rank": torch.distributed.get_rank(), "host": socket.gethostname(), "code": code}
        with suppress(DistError):
            _get_default_store().set(_END, json.dumps(end))


def _ended(end: dict[str, Any]) -> BaseException:
    """What a rank that waits raises when another has ended: the same stop, or a failure that names it."""
    if end["code"] in (130, 143):
        STOP.agree()
        return Stopped(signal.SIGINT if end["code"] == 130 else signal.SIGTERM)
    return RunFailed(
        f"Rank {end['rank']} on {end['host']} has ended with exit code {end['code']}; its own lines say why. "
        "The same command goes on from the last checkpoint."
    )


def _meet_without_launcher(state: PartialState, what: str) -> None:
    """The launcher was killed and its store with it; for a last checkpoint the ranks still reach each other."""
    meeting, end = torch.distributed.barrier(async_op=True), time.monotonic() + ALONE_SECONDS
    while not meeting.is_completed():
        if time.monotonic() > end:
            raise RunFailed(
                f"Rank {state.process_index} waited for {what}, but the launcher on the first node has ended."
            )
        time.sleep(0.05)


def _missing(store: Store, number: int, state: PartialState, *, what: str, hours: float) -> str:
    places = {_place(rank): rank for rank in range(state.num_processes)}
    # All at once where they can be: hundreds of ranks give up together, each asking for hundreds.
    known = list(places) if store.check(list(places)) else [place for place in places if store.check([place])]
    seen = {
        places[place]: value.decode().split(" ") for place, value in zip(known, store.multi_get(known), strict=True)
    }
    absent: dict[str, list[int]] = {}
    for rank in places.values():
        last, host = seen.get(rank, ("-1", ""))  # it never came to any
        if int(last) < number:
            absent.setdefault(host, []).append(rank)
    names = "; ".join(f"rank {_spans(numbers)}" + (f" on {host}" if host else "") for host, numbers in absent.items())
    return (
        f"Rank {state.process_index} waited {hours:g} h for {what}; missing: {names}. Look at what "
        "it printed last; stop the run and start the same command again, it goes on from the last checkpoint."
    )


def _spans(numbers: list[int]) -> str:
    """1, 2, 3 and 7 as "1-3, 7"."""
    spans = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def any_rank(says_so: bool) -> bool:
    """Whether it is so on any rank; all ranks ask at the same point. Needs no launcher: its store may be gone."""
    state = PartialState()
    if state.num_processes == 1:
        return says_so
    return reduce(torch.tensor([float(says_so)], device=state.device), "sum").item() > 0


def stop_agreed() -> bool:
    """Whether any rank was told to stop; all ranks ask at the same point and learn it together."""
    agreed = any_rank(STOP.number is not None)
    if agreed and PartialState().num_processes > 1:
        STOP.agree()
    return agreed


def leave() -> None:
    """Waits a moment for the others before this process ends: a launcher kills the rest when the first one goes."""
    with suppress(RunFailed):
        wait("all processes to stop", hours=15 / 3600)


@contextmanager
def main_first(what: str) -> Iterator[None]:
    """The main process goes through the block, then the first one of each other machine, which may have a cache of its
    own to fill, then all others."""
    state = PartialState()
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    for _ in range(turn):
        wait(what)
    yield
    for _ in range(turn, 2):
        wait(what)


def sees(path: Path, text: str, *, seconds: float = 60.0) -> bool:
    """Whether the text stands in the file; a network file system may show it on other nodes some time later."""
    end = time.monotonic() + seconds
    while not (path.is_file() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def from_main(value: Any, what: str = "the main process") -> Any:
    """What the main process gave, on every rank (plain JSON values); the main process waits for all."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    key = f"sft/value/{next(_meetings)}"
    if state.is_main_process:
        _get_default_store().set(key, json_text(value, indent=None))
    wait(what)
    return json.loads(_get_default_store().get(key))

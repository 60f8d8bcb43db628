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
    meeting, end, pause = f"sft/{next(_meetings)}", time.monotonic() + hours * 3600, 0.005
    store = _get_default_store()
    store.set(f"{meeting}/{state.process_index}", "here")
    store.add(meeting, 1)
    while store.add(meeting, 0) < state.num_processes:
        if store.check([_END]):
            raise _ended(json.loads(store.get(_END)))
        if time.monotonic() > end:
            raise RunFailed(_missing(store, meeting, state, what=what, hours=hours))
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


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


def _missing(store: Store, meeting: str, state: PartialState, *, what: str, hours: float) -> str:
    absent = [str(rank) for rank in range(state.num_processes) if not store.check([f"{meeting}/{rank}"])]
    return (
        f"Rank {state.process_index} waited {hours:g} h for {what}; missing: rank {', '.join(absent)}. Look at what "
        "it printed last; stop the run and start the same command again, it goes on from the last checkpoint."
    )


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
    """The main process goes through the block, then all others."""
    main = PartialState().is_main_process
    if not main:
        wait(what)
    yield
    if main:
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

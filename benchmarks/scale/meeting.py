"""Hundreds of ranks meeting through one store on one machine: seconds, requests, and what is said when one dies.

`python -m benchmarks.scale.meeting --ranks 512`. The ranks are forked processes without a model; how they meet is the
program's own code (sft/distributed/ranks.py), to which only their number and the store are given.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

from benchmarks.common import load_average
from benchmarks.tables import grid
from sft.distributed import ranks
from sft.errors import RunFailed

ROUNDS = 5
SPEAKS, KILLED = "says so", "kill -9"
Say = Callable[..., None]
Told = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """`busy`: seconds in which the main process lets the others wait, as it does while it merges. The victim dies in
    the way of `death`, and the others wait `patience` seconds for it; in a run these are hours."""

    number: int
    death: str = SPEAKS
    busy: float = 5.0
    patience: float = 20.0

    @property
    def victim(self) -> int:
        return self.number // 2


class CountedStore:
    """A store that counts what is asked of it."""

    def __init__(self, store: TCPStore) -> None:
        self.store, self.requests = store, 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


def simulate(run: Run) -> Told:
    """What the ranks tell of a run that ends when one of them dies: a record per rank and event, keys of the store."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "told.jsonl"
        path.touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        gc.freeze()  # memory that no collection looks at stays shared by all of them
        started = [_started(rank, run, path, port) for rank in range(run.number)]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        for process in started:
            os.waitpid(process, 0)
        told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [*told, {"event": "end", "keys": store.num_keys()}]


def _started(rank: int, run: Run, path: Path, port: int) -> int:
    """The process of one rank: connected, it lives and ends without cleaning up what the others share with it."""
    process = os.fork()
    if process:
        return process
    try:
        begun = time.monotonic()
        store = CountedStore(TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))
        state = SimpleNamespace(num_processes=run.number, process_index=rank, is_main_process=rank == 0)

        def say(event: str, **facts: Any) -> None:
            line = {"event": event, "rank": rank, "at": time.monotonic(), "requests": store.requests} | facts
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

        say("connected", entered=begun)
        with patch.multiple(ranks, PartialState=lambda: state, _get_default_store=lambda: store):
            _live(rank, say, run)
    finally:
        os._exit(0)


def _live(rank: int, say: Say, run: Run) -> None:
    """What a rank does from its start to the end of the run."""
    ranks.wait("all ranks to start")
    say("started", entered=0.0)
    for number in range(ROUNDS):
        begun = time.monotonic()
        ranks.wait("a round")
        say(f"round {number}", entered=begun)
    begun = time.monotonic()
    found = ranks.from_main({"checkpoint": "checkpoint-100"} if rank == 0 else None)
    say("value", entered=begun, found=found)
    if rank == 0:
        time.sleep(run.busy)
    begun = time.monotonic()
    ranks.wait("the merge of earlier adapters")
    say("merge", entered=begun)
    if rank == run.victim:
        say("death")
        if run.death == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        with patch.multiple(torch.distributed, is_initialized=lambda: True, get_rank=lambda: rank):
            ranks.tell_end(1)
        return
    try:
        ranks.wait("all processes to write checkpoint-100", hours=run.patience / 3600)
    except RunFailed as failure:
        say("heard", words=str(failure))


def meeting(told: Told, event: str, before: str) -> tuple[float, int]:
    """Seconds from the last rank's coming to the last one's going on, and the requests of all since `before`."""
    came = [each for each in told if each["event"] == event]
    requests = sum(each["requests"] for each in came) - sum(e["requests"] for e in told if e["event"] == before)
    return max(each["at"] for each in came) - max(each["entered"] for each in came), requests


def summary(told: Told, run: Run) -> dict[str, Any]:
    """The figures of one simulated run."""
    names = ["started", *(f"round {number}" for number in range(ROUNDS))]
    rounds = [meeting(told, name, before) for before, name in pairwise(names)]
    connected = [each for each in told if each["event"] == "connected"]
    merge, waiting = meeting(told, "merge", "value")
    died = next(each["at"] for each in told if each["event"] == "death")
    heard = [each for each in told if each["event"] == "heard"]
    return {
        "ranks": run.number,
        "connected_seconds": max(e["at"] for e in connected) - min(e["entered"] for e in connected),
        "meeting_seconds": median(seconds for seconds, _ in rounds),
        "meeting_requests": median(requests for _, requests in rounds) / run.number,
        "value_seconds": meeting(told, "value", names[-1])[0],
        "late_seconds": merge,
        "waiting_requests_per_second": waiting / run.busy,
        "keys": told[-1]["keys"],
        "death": run.death,
        "heard_ranks": len(heard),
        "heard_first": min(each["at"] for each in heard) - died,
        "heard_last": max(each["at"] for each in heard) - died,
        "death_requests": sum(e["requests"] for e in heard)
        - sum(e["requests"] for e in told if e["event"] == "merge" and e["rank"] != run.victim),
        "words": dict(
            Counter(re.sub(r"^Rank \d+ waited", "Rank N waited", each["words"]) for each in heard).most_common(2)
        ),
    }


def main(numbers: list[int], busy: float, patience: float) -> None:
    found = []
    for number in numbers:
        for death in (SPEAKS, KILLED):
            run = Run(number, death, busy, patience)
            found.append(summary(simulate(run), run))
    names = [name for name in found[0] if name != "words"]
    shown = [[f"{v:.3g}" if isinstance(v := each[name], float) else f"{v:,}" if isinstance(v, int) else v
              for each in found] for name in names]  # fmt: skip
    print(
        grid(["", *(f"run {n + 1}" for n in range(len(found)))], [[n, *r] for n, r in zip(names, shown, strict=True)])
    )
    print(json.dumps({"load": load_average(), "runs": found}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.meeting", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--busy", type=float, default=10.0, help="seconds the main process lets the others wait")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds the others wait for a dead rank")
    options = parser.parse_args()
    sys.exit(main(options.ranks, options.busy, options.patience))

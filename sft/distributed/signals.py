"""SIGTERM, SIGINT and SIGUSR1 (Slurm): stop cleanly at the first, at once at the second. No torch."""

import ctypes
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Of several processes each gets a terminal's or Slurm's signal twice: directly, and from the launcher.
ECHO_SECONDS = 5.0
# What is raised inside a weakref callback or a library's bare `except` goes nowhere: it is raised again so often.
REMINDER_SECONDS = 0.5


class Stopped(BaseException):
    """A stop signal arrived. Like KeyboardInterrupt no Exception, so that no library swallows it."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, else 143."""
        return 130 if self.number == signal.SIGINT else 143


class StopSignals:
    """Remembers the first signal. Outside training it raises `Stopped` where the program stands (whatever is being
    written is written aside and vanishes); in training (`deferred`) the step is finished first."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.deferred = False
        self.echo_seconds = 0.0
        self.arrived = 0.0
        self.agreed = False

    def install(self, *, processes: int = 1) -> None:
        self.number, self.deferred, self.agreed = None, False, False
        self.echo_seconds = ECHO_SECONDS if processes > 1 else 0.0
        for number in SIGNALS:
            signal.signal(number, self.receive)
        signal.signal(signal.SIGALRM, self.remind)
        sys.unraisablehook = unraisable

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        if self.number is not None:
            if time.monotonic() - self.arrived >= self.echo_seconds:
                os._exit(Stopped(number).exit_code)
            return
        self.number, self.arrived = number, time.monotonic()
        if not self.deferred:
            signal.setitimer(signal.ITIMER_REAL, REMINDER_SECONDS, REMINDER_SECONDS)
            raise Stopped(number)

    def remind(self, number: int, frame: FrameType | None = None) -> None:
        """Raises again, unless the program is on its way out or goes on to the end of a step."""
        if self.number is not None and not self.deferred and not is_unwinding():
            raise Stopped(self.number)

    def close(self) -> None:
        """Nothing is left to interrupt."""
        self.deferred = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def agree(self) -> None:
        """All ranks stop because one was told to; the launcher's own signal, which follows, changes nothing."""
        self.agreed = True
        if self.number is None:
            self.number, self.arrived = signal.SIGTERM, time.monotonic()


def is_unwinding() -> bool:
    """Whether the code that runs now cleans up after `Stopped` (a `finally`, an `except`, the end of a `with`)."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def unraisable(report: Any) -> None:
    """Python's report of an exception that could not be raised; a stop among them is only late."""
    if not isinstance(report.exc_value, Stopped):
        sys.__unraisablehook__(report)


STOP = StopSignals()


def follow_parent(worker: int = 0) -> None:
    """For a forked data worker: it ends when its parent does, even by kill -9, and leaves the first signal to it.

    Slurm and terminals signal every process; a worker that ended by itself would fail the run instead of stopping it.
    """
    STOP.install()
    STOP.deferred = True
    die_with_parent(signal.SIGKILL)


def die_with_parent(end: signal.Signals) -> None:
    """Asks the system (Linux) to send this process the signal when its parent goes, even by kill -9."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        prctl(set_parent_death_signal, end)

"""SIGTERM, SIGINT and SIGUSR1 (Slurm): stop cleanly at the first, at once at the second. No torch."""

import ctypes
import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Of several processes each gets a terminal's or Slurm's signal twice: directly, and from the launcher.
ECHO_SECONDS = 5.0


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

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        if self.number is not None:
            if time.monotonic() - self.arrived >= self.echo_seconds:
                os._exit(Stopped(number).exit_code)
            return
        self.number, self.arrived = number, time.monotonic()
        if not self.deferred:
            raise Stopped(number)

    def agree(self) -> None:
        """All ranks stop because one was told to; the launcher's own signal, which follows, changes nothing."""
        self.agreed = True
        if self.number is None:
            self.number, self.arrived = signal.SIGTERM, time.monotonic()

    def check(self) -> None:
        """Between two phases: raises `Stopped` when a signal came that some library swallowed (a bare `except`)."""
        if self.number is not None and not self.deferred:
            raise Stopped(self.number)


STOP = StopSignals()


def follow_parent(worker: int = 0) -> None:
    """For a forked data worker: it ends when its parent does, even by kill -9, and leaves the first signal to it.

    Slurm and terminals signal every process; a worker that ended by itself would fail the run instead of stopping it.
    """
    STOP.install()
    STOP.deferred = True
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGKILL)

"""SIGTERM, SIGINT and SIGUSR1 (Slurm): stop cleanly at the first, at once at the second. No torch."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        if self.number is not None:
            os._exit(Stopped(number).exit_code)
        self.number = number
        if not self.deferred:
            raise Stopped(number)


STOP = StopSignals()

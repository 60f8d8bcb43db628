"""Faults at a chosen place of a run in this process: a stop signal, or an error, as a function is called."""

import os
import signal
from collections.abc import Callable
from importlib import import_module

import pytest


def tell(number: int = signal.SIGTERM) -> None:
    """The signal to this process."""
    os.kill(os.getpid(), number)


def before(
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    what: Callable[[], object],
    when: Callable[..., bool] = lambda *arguments, **keywords: True,
) -> None:
    """Calls `what` as the function at `place` (module.function or module.Class.method) is called, once, where `when`
    holds for its arguments."""
    owner = _owner(place)
    name = place.rpartition(".")[2]
    original = getattr(owner, name)
    happened: list[bool] = []

    def wrapper(*arguments: object, **keywords: object) -> object:
        if not happened and when(*arguments, **keywords):
            happened.append(True)
            what()
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, wrapper)


def _owner(place: str) -> object:
    path = place.rpartition(".")[0]
    module, _, last = path.rpartition(".")
    return getattr(import_module(module), last) if last[:1].isupper() else import_module(path)

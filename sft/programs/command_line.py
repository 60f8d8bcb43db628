"""What the programs beside train.py share: how they end (0 well, 2 to change something, 1 failed), what they accept."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sft.errors import Problems, RunFailed


def run_program(main: Callable[[], None]) -> int:
    """Call `main` and turn its end into an exit code; problems go to stderr, one line each."""
    try:
        main()
    except Problems as error:
        for problem in error.problems:
            print(f"[ERROR] {problem}", file=sys.stderr)
        return 2
    except (RunFailed, OSError) as error:
        return _failed(error)
    except KeyboardInterrupt:
        return 130
    return 0


def whole_number(text: str) -> int:
    """The value of an option that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def encoding_name(text: str) -> str:
    """The value of an option that names how a file's text is stored."""
    from sft.settings.values import check_encoding

    try:
        return check_encoding(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from error


@contextmanager
def reworded(setting: str, words: str) -> Iterator[None]:
    """Problems from inside speak of what this program was told instead of a setting it does not have.

    `spoken_of("SFT_BASE_MODEL=", "--model ")` turns "SFT_BASE_MODEL=gpt3: ..." into "--model gpt3: ...".
    """
    try:
        yield
    except Problems as found:
        raise Problems(text.replace(setting, words) for text in found.problems) from found


def progress(text: str, *, last: bool = False) -> None:
    """Rewrite one line on a terminal's stderr; silent where stderr is a file or a pipe."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)


def _failed(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe has gone (`| head`): nothing to say, and nothing more may reach stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(f"[ERROR] {error}", file=sys.stderr)
    return 1

"""How a program beside train.py ends: 0 well, 2 for what the person must change, 1 for what failed."""

import os
import sys
from collections.abc import Callable

from sft.errors import Problems, RunFailed


def run(main: Callable[[], None]) -> int:
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

"""How the programs beside train.py end, and what their options accept."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.errors import Problems, RunFailed
from sft.programs.command_line import encoding_name, progress, reworded, run_program, whole_number

ROOT = Path(__file__).resolve().parents[1]


def ending(error: BaseException | None):
    def main() -> None:
        if error:
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (Problems(["--a: wrong", "--b: missing"]), 2, "[ERROR] --a: wrong\n[ERROR] --b: missing\n"),
        (RunFailed("no network; try again"), 1, "[ERROR] no network; try again\n"),
        (OSError(28, "No space left on device"), 1, "[ERROR] [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_end_becomes_an_exit_code(error, code, said, capsys):
    """Every problem on a line of its own, no traceback."""
    assert run_program(ending(error)) == code
    assert capsys.readouterr().err == said


def test_what_nobody_foresaw_is_raised():
    """An error of the program itself is shown as one."""
    with pytest.raises(ZeroDivisionError):
        run_program(ending(ZeroDivisionError()))


def test_a_reader_that_has_gone_is_no_message():
    """`| head -1`: exit 1, nothing on stderr, not even at the interpreter's end."""
    program = (
        "import sys\nfrom sft.programs.command_line import run_program\n"
        "def main():\n    for _ in range(100_000): print('x' * 100)\n"
        "sys.exit(run_program(main))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ
    ) as process:
        assert process.stdout.readline() == b"x" * 100 + b"\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_whole_numbers_begin_at_one():
    """What is counted in rows or copies; the text is named."""
    assert whole_number("12") == 12
    for text in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 on"):
            whole_number(text)


def test_encodings_are_those_python_knows():
    """rot13 is one to Python, but none of a text."""
    assert encoding_name("cp932") == "cp932"
    for text in ("shift", "rot13"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no text encoding"):
            encoding_name(text)


def test_a_setting_is_spoken_of_as_the_option_it_is_here():
    """Every problem from inside, in the words of this program."""
    with pytest.raises(Problems) as found, reworded("SFT_BASE_MODEL=", "--model "):
        raise Problems(["SFT_BASE_MODEL=gpt3: no such model", "other"])
    assert found.value.problems == ["--model gpt3: no such model", "other"]


def test_progress_is_for_a_terminal(capsys):
    """A log has no lines that rewrite themselves."""
    progress("10 rows", last=True)
    assert capsys.readouterr().err == ""

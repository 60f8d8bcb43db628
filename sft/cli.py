"""The command line of train.py: options, the ladder's order, and how a run ends (contract section 2). No torch."""

from __future__ import annotations

import argparse
import errno
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.distributed.launch import launched
from sft.distributed.signals import STOP, Stopped
from sft.errors import STARTED_AS, Problems, RunFailed, hide_secrets, plainly

if TYPE_CHECKING:
    from sft.settings import Settings

EPILOG = """exit codes: 0 done, or already complete; 2 something to change (settings, data, lineage, lock);
3 complete, but a gate failed (--gate); 1 the run failed;
143/130 stopped by SIGTERM/SIGINT after saving a checkpoint that resumes"""
_NO_ENV_FILE = "write stage1.env, name --env-dir, or let staged-sft-demo write the embedded ladder here"
MAIN_SPEAKS_SECONDS = 10.0  # more than the main process needs to print, less than anybody waits at an error
# What gloo, NCCL and torch's store say when the process at the other end is gone.
LOST_PEER = ("closed by peer", "reset by peer", "ncclremoteerror", "distnetworkerror", "remote process exited")
# What libraries say of a file they could not write to its end; the last two are torch's.
DISK_FULL = ("No space left on device", "Disk quota exceeded", "unexpected pos", "iostream error")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=STARTED_AS.removeprefix("python "),
        description="Staged LoRA fine-tuning driven by env files.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--stage", metavar="N", help="stage to train: a number, a range such as 1-3, or all")
    add("--env-dir", metavar="DIR", type=Path, default=Path(), help="where stageN.env are (default: current directory)")
    add(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one setting; repeatable",
    )
    add("--check", action="store_true", help="everything short of training; writes nothing")
    add("--json", action="store_true", help="with --check: one JSON document on stdout; with --gate: a last line of it")
    add("--gate", action="store_true", help="exit code 3 where a complete stage is no better or forgot something")
    add("--on", metavar="NxMEMORY", help="with --check: plan for a machine with N devices of so many GB each: 4x80")
    add("--strict", action="store_true", help="a missing adapter or data set is an error")
    add("--fresh", action="store_true", help="train again; the old output is moved aside, never deleted")
    add(
        "--try",
        metavar="NAME=V1,V2",
        action="append",
        default=[],
        dest="tries",
        help="train the stage once per value, side by side, and rank them; repeatable: all pairs",
    )
    add("--adopt", metavar="NAME", help="make one of these variants the stage")
    add("--drop-tries", metavar="NAMES", help="delete variants, named with commas between them")
    # The launcher `deepspeed` adds it; the rank is read from the environment, where every launcher says it.
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def stage_numbers(text: str, env_dir: Path) -> list[int]:
    """The stages that `--stage` names, in order.

    Raises:
        Problems: not a number, a range or all; or there is no env file for `all`.
    """
    if text == "all":
        found = sorted(int(m[1]) for p in env_dir.glob("stage*.env") if (m := re.fullmatch(r"stage(\d+)\.env", p.name)))
        if not found:
            raise Problems([f"--stage all: no stageN.env in {env_dir.resolve()}; {_NO_ENV_FILE}"])
        return found
    match = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise Problems([f"--stage {text}: not a stage; give a number such as 2, a range such as 1-3, or all"])
    return list(range(int(match[1]), int(match[2] or match[1]) + 1))


def load_ladder(options: argparse.Namespace) -> list[Settings]:
    """The settings of every stage asked for; the mistakes of all of them in one listing, and as JSON if asked for."""
    from sft.settings import load_settings  # with pydantic, which --help does without

    ladder: list[Settings] = []
    found: dict[int | None, list[str]] = {}
    for number in _numbers(options, found):
        for tried in variants_of(number, options, found):
            try:
                ladder.append(load_settings(number, tried=tried, **settings_options(options)))
            except Problems as problems:
                found.setdefault(number, []).extend(problems.problems)
    counts = Counter(settings.variant for settings in ladder if settings.variant)
    if twice := [name for name, count in counts.items() if count > 1]:
        found[ladder[0].stage] = [f"--try: {name} is named twice; leave one out" for name in twice]
    elif options.tries and ladder:
        from sft.settings.variants import incomparable

        if problem := incomparable(ladder[0]):
            found[ladder[0].stage] = [problem]
    if found and options.json:
        from sft.planning.document import Document, print_documents

        print_documents([Document(number, problems=problems) for number, problems in found.items()])
    if found:
        raise Problems(dict.fromkeys(text for problems in found.values() for text in problems))
    return ladder


def settings_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says to `load_settings`."""
    return {name: getattr(options, name) for name in ("env_dir", "overrides", "strict", "gate")}


def variants_of(number: int, options: argparse.Namespace, found: dict[int | None, list[str]]) -> list[tuple[str, ...]]:
    """What each variant of a stage tries, one that tries nothing where none are asked for; problems go to `found`."""
    if not options.tries:
        return [()]
    from sft.settings.schema import NAMES
    from sft.settings.variants import pairings

    combined, problems = pairings(options.tries, NAMES, options.overrides)
    if options.gate:
        problems.append("--try: --gate judges a stage; adopt one of the variants, then run --stage N --gate")
    if not re.fullmatch(r"\d+", options.stage):
        problems = [f"--try: varies one stage; name it with --stage N (not {options.stage})"]
    if problems:
        found[number] = problems
        return []
    return combined


def _numbers(options: argparse.Namespace, found: dict[int | None, list[str]]) -> list[int]:
    """The stages asked for; what is wrong with the question is put into `found`."""
    if options.json and not (options.check or options.gate):
        found[None] = ["--json: describes what --check or --gate finds; write --check --json, or --gate --json"]
    elif options.on is not None and not options.check:
        found[None] = [f"--on {options.on}: plans for another machine; write --check --on {options.on}"]
    elif not options.stage:
        found[None] = ["--stage: is missing; give a number such as 1, a range such as 1-3, or all"]
    else:
        try:
            return stage_numbers(options.stage, options.env_dir)
        except Problems as problems:
            found[None] = problems.problems
    return []


def command_line(main: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs `main` with the options and turns its end into an exit code; people never see a traceback."""
    show_any_text()
    options = parser().parse_args(argv)
    STOP.install(processes=launched().processes)
    code = _exit_code(main, options)
    together = sys.modules.get("sft.distributed.ranks")  # imported where several processes have met
    if code and together:
        together.tell_end(code)
    return code


def show_any_text() -> None:
    """What a terminal's encoding lacks is shown as an escape: a file name or a row must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit_code(main: Callable[[argparse.Namespace], int | None], options: argparse.Namespace) -> int:
    try:
        return main(options) or 0
    except Problems as found:
        say_problems(found.problems, every_rank=found.every_rank)
        if not found.every_rank:
            let_main_speak()
        return 2
    except Stopped as stop:
        return stopped(stop, options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the end of the line: whatever a library raised becomes one plain message
        say("\n".join([f"[ERROR] {explain(error)}", *getattr(error, "__notes__", [])]), every_rank=True)
        # A signal that also reached a library's own processes shows as their failure.
        return 1 if STOP.number is None else stopped(Stopped(STOP.number), options)
    finally:
        STOP.close()


def let_main_speak() -> None:
    """A launcher ends all ranks when one has ended: the main process, which lists the problems, goes first."""
    STOP.deferred = True
    end = time.monotonic() + MAIN_SPEAKS_SECONDS
    while launched().rank > 0 and STOP.number is None and time.monotonic() < end:
        time.sleep(0.05)


def stopped(stop: Stopped, options: argparse.Namespace) -> int:
    say(f"Stopped by {stop}.{'' if options.check else ' The same command goes on from the last checkpoint.'}")
    return stop.exit_code


def say(text: str, *, every_rank: bool = False) -> None:
    """To stderr, on the main process alone or on every rank with its number."""
    rank, processes = launched()[:2]
    if rank == 0 or every_rank:
        print(f"rank {rank}: {text}" if every_rank and processes > 1 else text, file=sys.stderr, flush=True)


def say_untested() -> None:
    """One line where libraries are installed that nobody has tried with this program."""
    from sft.environment import required, untested_versions  # after the settings: a mistake is told without

    if warning := untested_versions(required()):
        say(warning)


def say_problems(problems: Sequence[str], *, every_rank: bool = False) -> None:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} to solve; nothing was written"
    marked = (text if text.startswith("[") else f"[ERROR] {text}" for text in problems)
    say("\n".join([*map(hide_secrets, marked), count]), every_rank=every_rank)


def explain(error: BaseException) -> str:
    """One plain message with advice for a run that failed."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RunFailed):
        return str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or any(sign in text for sign in DISK_FULL):
        return "The disk is full. What was complete before is intact; free some space and start the same command again."
    if launched().processes > 1 and any(sign in text.lower() for sign in LOST_PEER):
        return (
            "Another process of this run has ended, so this one can't go on; the launcher's lines name its rank and "
            "what it ended with. The same command goes on from the last checkpoint."
        )
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        from sft.settings.values import QUANTISING

        return (
            "Out of memory. In this order: SFT_PER_DEVICE_TRAIN_BS lower with SFT_GRAD_ACCUM higher, SFT_LORA_R=8, "
            f"{' or '.join(f'{name}=1' for name in QUANTISING)}, SFT_GRADIENT_CHECKPOINTING=1, a shorter "
            "SFT_MAX_SEQ_LEN. "
            "--check estimates the need beforehand."
        )
    return f"The run failed: {plainly(text).strip().splitlines()[0]}"

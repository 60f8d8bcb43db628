"""Fault campaigns beside the kills: damaged files, a full disk, two starts at once; tests/torture.py runs them."""

import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sft.storage import atomic
from tests import faults

RUN_LIMIT = 1800.0
GIVE_UP = 10  # lost: something is thoroughly wrong


@dataclass
class Campaign:
    """What was tried, and what went wrong where."""

    name: str
    tried: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)

    def fail(self, what: str) -> None:
        self.lost.append(what)
        print(f"LOST {self.name}: {what}", flush=True)

    def table(self) -> str:
        rows = [f"  {kind:<28} {count:>5}" for kind, count in sorted(self.tried.items())]
        notes = [f"  {name}: {value}" for name, value in self.notes.items()]
        return "\n".join([f"{self.name}: {self.tried.total()} tried, {len(self.lost)} lost", *rows, *notes])


@dataclass
class Ladder:
    """The inputs all runs share, and how the uninterrupted run ended."""

    root: Path
    inputs: Path
    end: dict[str, object]
    cpu_seconds: float

    @classmethod
    def prepare(cls, root: Path, *, report_to: str = "none") -> "Ladder":
        inputs, out = root / "inputs", root / "uninterrupted"
        inputs.mkdir()
        faults.write_ladder(inputs, report_to=report_to)
        run = faults.start(faults.ladder_arguments(inputs, out), out / "log", prepare=faults.own_cache(out))
        used = 0.0
        while not run.is_over():
            used = run.cpu_seconds()
            time.sleep(0.02)
        if (code := run.wait(1.0)) != 0:
            raise SystemExit(f"The uninterrupted ladder ended with {code}:\n{run.text()[-3000:]}")
        return cls(root, inputs, faults.end_state(out), used)

    def start(self, out: Path, *more: object, prepare: Callable[[], object] = lambda: None) -> faults.Run:
        def ready() -> None:
            faults.own_cache(out)()
            prepare()

        return faults.start(faults.ladder_arguments(self.inputs, out, *more), out / "log", prepare=ready)


# Damage


def damage_campaign(ladder: Ladder, most: int, dice: random.Random) -> Campaign:
    """Cuts and flips every file that a killed ladder left, one at a time; the next run must notice or not need it."""
    campaign = Campaign("damaged files")
    killed, out = ladder.root / "killed", ladder.root / "damaged"
    kill_in_stage_two(ladder, out)
    out.rename(killed)  # its copies lie where it was made: adapters name their base by its path
    outcomes: Counter[str] = Counter()
    refused: set[str] = set()
    names = sorted(path.relative_to(killed).as_posix() for path in killed.rglob("*") if damageable(path))
    cases = [(name, kind) for name in names for kind in ("cut in half", "one bit flipped")]
    for name, kind in cases if len(cases) <= most else dice.sample(cases, most):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(killed, out)
        (cut if kind == "cut in half" else flip)(out / name, dice)
        campaign.tried[kind] += 1
        outcome = after_damage(ladder, out, name)
        outcomes[outcome.partition(":")[0]] += 1
        if outcome.startswith("lost"):
            campaign.fail(f"{name} {kind}: {outcome}")
        if outcome == "refused":
            refused.add(name)
        if len(campaign.lost) >= GIVE_UP:
            break
    campaign.notes = {"files": len(names), **outcomes, "refused with a remedy": ", ".join(sorted(refused))}
    return campaign


def kill_in_stage_two(ladder: Ladder, out: Path) -> None:
    run = ladder.start(out)
    while not (out / "out_stage2" / "checkpoint-6").exists() and not run.is_over():
        time.sleep(0.01)
    run.signal(signal.SIGKILL)
    run.wait(10.0)


def damageable(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0 and path.name != "log" and path.suffix != ".lock"


def cut(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def after_damage(ladder: Ladder, out: Path, name: str) -> str:
    """ "same end", "refused" (a message, nothing wrong written) or "lost: why"."""
    log = out / "log"
    log.unlink(missing_ok=True)
    run = ladder.start(out, "--stage", "2")
    code = run.wait(RUN_LIMIT)
    text = run.text()
    if "Traceback" in text:
        return f"lost: a traceback: {text[-1500:]}"
    if code in (1, 2):
        return "refused" if "[ERROR]" in text and len(text) > 20 else f"lost: exit code {code} without a message"
    if code != 0:
        return f"lost: exit code {code}"
    # What was completed before is not made again: only what this run made of it is compared.
    end = faults.end_state(out, (2,) if name.startswith("out_stage1/") else (1, 2))
    own = name.removeprefix("out_stage").replace("/", " ", 1)
    different = [key for key in faults.differences(ladder.end, end) if key in end and key != own]
    if different and f"{out / name}" in text.replace("_stage1: damaged since it was completed: ", "_stage1/"):
        return "warned"
    return f"lost: {different}" if different else "same end"


# A full disk


def disk_campaign(ladder: Ladder, sizes: int) -> Campaign:
    """A disk that is full at each of many sizes: a plain message, and with more room the same command ends as ever."""
    campaign = Campaign("full disk")
    place = ladder.root / "disk"
    place.mkdir()
    total = sum(path.stat().st_blocks * 512 for path in (ladder.root / "uninterrupted").rglob("*"))
    for number in range(sizes):
        room = 16 * 1024 + total * number // sizes
        with small_disk(place, room):
            out = place / "ladder"
            run = ladder.start(out, prepare=no_space_check)
            code = run.wait(RUN_LIMIT)
            text = run.text()
            campaign.tried["sizes"] += 1
            message = "disk is full" in text or not text  # no room for the log itself
            if code != 0 and (code != 1 or not message or "Traceback" in text):
                campaign.fail(f"{room} bytes: exit code {code}: {text[-1500:]}")
            subprocess.run(["mount", "-o", f"remount,size={4 * total + 2**27}", place], check=True)
            if ladder.start(out).wait(RUN_LIMIT) != 0:
                campaign.fail(f"{room} bytes: the run afterwards failed: {(out / 'log').read_text()[-1500:]}")
            elif different := faults.differences(ladder.end, faults.end_state(out)):
                campaign.fail(f"{room} bytes: {different}")
        if len(campaign.lost) >= GIVE_UP:
            break
    campaign.notes = {"bytes of a ladder": total}
    return campaign


def no_space_check() -> None:
    """As if the disk had filled up after the check."""
    atomic.free_bytes = lambda path: 2**60  # type: ignore[assignment]


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


# Two starts


def starts_campaign(ladder: Ladder, pairs: int, dice: random.Random) -> Campaign:
    """The same command twice at once: one trains, the other is told who does, or that all is done."""
    campaign = Campaign("two starts at once")
    for pair in range(pairs):
        out = ladder.root / f"pair{pair}"
        logs = [out / "log1", out / "log2"]
        quick = ("--stage", "1", "--set", "SFT_MAX_STEPS=1", "--set", "SFT_GEN_EVAL=none")
        runs = []
        for log in logs:
            arguments = faults.ladder_arguments(ladder.inputs, out, *quick)
            runs.append(faults.start(arguments, log, prepare=faults.own_cache(out)))
            time.sleep(dice.choice((0.0, dice.uniform(0, 1.0))))
        codes = [run.wait(RUN_LIMIT) for run in runs]
        texts = [log.read_text() for log in logs]
        campaign.tried["pairs"] += 1
        told = sum("is in use by process" in text for text in texts)
        done = sum("IMPORTANT NOTICE" in text for text in texts)
        if sorted(codes, key=str) not in ([0, 0], [0, 2]) or told + done != 1 or codes.count(2) != told:
            campaign.fail(f"pair {pair}: exit codes {codes}\n{texts[0][-800:]}\n{texts[1][-800:]}")
            continue
        shutil.rmtree(out)
    return campaign

"""`make torture`: the fault campaigns of the README's reliability section, with a long budget.

    python -m tests.torture [--kills 200] [--damages 1000] [--disks 60] [--starts 50] [--data 200]
                            [--endings 50] [--seed 1] [--only kills,disks]

Prints a table for each campaign and, last, one line of JSON. Exit code 1 if anything was lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from sft.environment import silence_libraries

silence_libraries()
# Settings in the environment win over a stage's file: a person's own, or a tracker's address, would reach every run.
for name in [name for name in os.environ if name.startswith(("SFT_", "MLFLOW_"))]:
    del os.environ[name]

from tests import faults, pairs  # noqa: E402
from tests.campaigns import (  # noqa: E402
    GIVE_UP,
    RUN_LIMIT,
    Campaign,
    Ladder,
    damage_campaign,
    disk_campaign,
    starts_campaign,
)
from tests.data_campaign import data_campaign, ending_campaign  # noqa: E402

CAMPAIGNS = ("kills", "damages", "disks", "starts", "data", "endings", "pairs")
STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
KILLS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOST_KILLS = 8
STOP_LIMIT = 60.0


def wait_for_moment(run: faults.Run, out: Path, dice: random.Random, cpu_seconds: float) -> bool:
    """Until a random moment: of all the time, or, as often, of a phase, so that short ones have their share.

    False when the run is over before.
    """
    moment, wanted = dice.uniform(0, 0.7 * cpu_seconds), dice.choice(faults.PHASES)
    within, by_phase = dice.choice((0.0, 0.02, 0.2)) * dice.random(), dice.random() < 0.6
    first = dice.random() * 0.5 * cpu_seconds
    while not run.is_over():
        used = run.cpu_seconds()
        if not by_phase and used >= moment:
            return True
        if by_phase and used >= first and faults.phase(run.text(), out) == wanted:
            time.sleep(within)
            return not run.is_over()
        time.sleep(0.001)
    return False


# Kills


def kill_campaign(ladder: Ladder, kills: int, dice: random.Random) -> Campaign:
    """Chains of kills, each ending with an undisturbed run whose results must be those of the uninterrupted ladder."""
    campaign = Campaign("kills")
    chain, slowest = 0, 0.0
    while campaign.tried.total() < kills and len(campaign.lost) < GIVE_UP:
        chain += 1
        out = ladder.root / f"chain{chain}"
        told: list[str] = []
        while len(told) < MOST_KILLS:
            number = dice.choice(KILLS)
            run = ladder.start(out)
            if not wait_for_moment(run, out, dice, ladder.cpu_seconds):
                run.wait(1.0)
                break
            phase = faults.phase(run.text(), out)
            seconds = strike(run, number, campaign, dice=dice, where=f"chain {chain} in {phase}")
            slowest = max(slowest, seconds if number != signal.SIGKILL else 0.0)
            campaign.tried[f"{signal.Signals(number).name} in {phase}"] += 1
            told.append(f"{signal.Signals(number).name} in {phase}")
        finish_chain(ladder, out, campaign, told)
        print(f"chain {chain}: {', '.join(told)}", flush=True)
    if repeated := repeated_metrics(ladder.inputs / "mlruns" / "mlflow.db"):
        campaign.fail(f"MLflow has {repeated} metrics twice for the same step")
    campaign.notes |= {"chains compared": chain, "slowest stop (s)": round(slowest, 1)}
    return campaign


def strike(run: faults.Run, number: int, campaign: Campaign, *, dice: random.Random, where: str) -> float:
    """Sends the signal, one time in five a second one soon after; seconds until the end."""
    began = time.monotonic()
    run.signal(number)
    twice = number in STOPS and dice.random() < 0.2
    if twice:
        time.sleep(dice.uniform(0, 0.3))
        if not run.is_over():
            run.signal(number)
            campaign.notes["second signals"] = int(campaign.notes.get("second signals", 0)) + 1  # type: ignore[call-overload]
    code = run.wait(STOP_LIMIT)
    seconds = time.monotonic() - began
    if code is None:
        campaign.fail(f"{where}: goes on {STOP_LIMIT:.0f} s after {signal.Signals(number).name}")
        run.signal(signal.SIGKILL)
        run.wait(10.0)
    elif code not in {-number, STOPS.get(number), 0}:
        campaign.fail(f"{where}: exit code {code} after {signal.Signals(number).name}:\n{run.text()[-1500:]}")
    end = time.monotonic() + 6.0
    while (left := run.orphans()) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        campaign.fail(f"{where}: {len(left)} processes left behind")
    return seconds


def finish_chain(ladder: Ladder, out: Path, campaign: Campaign, told: list[str]) -> None:
    run = ladder.start(out)
    code = run.wait(RUN_LIMIT)
    text = run.text()
    if code != 0:
        campaign.fail(f"{out.name}: the last run ended with {code} after {told}:\n{text[-2000:]}")
        return
    different = faults.differences(ladder.end, faults.end_state(out))
    if different or "Traceback" in text:
        campaign.fail(f"{out.name}: {different or 'a traceback in the log'} after {told}")
        return
    shutil.rmtree(out)


def repeated_metrics(database: Path) -> int:
    """How many values MLflow has twice for the same run, metric and step."""
    if not database.exists():
        return 0
    with sqlite3.connect(database) as connection:
        ours = "from metrics where key not like 'system/%'"
        query = f"select count(*) {ours} group by run_uuid, key, step having count(*) > 1"
        return len(connection.execute(query).fetchall())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=1000, help="at most so many cut or flipped files")
    parser.add_argument("--disks", type=int, default=60, help="sizes of a disk that fills up (needs root)")
    parser.add_argument("--starts", type=int, default=50, help="times two starts at once")
    parser.add_argument("--data", type=int, default=200, help="times data changes between a kill and the restart")
    parser.add_argument("--endings", type=int, default=50, help="kills between the last step and the report")
    parser.add_argument("--share", type=int, default=1, help="of the draws in which every two features meet, each n-th")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(CAMPAIGNS), help="comma list of campaigns")
    parser.add_argument("--report-to", default="none", help="SFT_REPORT_TO of the ladder")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    options = parser.parse_args()
    shared_memory = Path("/dev/shm")
    root = options.keep or Path(mkdtemp(prefix="torture", dir=shared_memory if shared_memory.is_dir() else None))
    root.mkdir(parents=True, exist_ok=True)
    dice = random.Random(options.seed)

    @cache
    def ladder() -> Ladder:
        made = Ladder.prepare(root, report_to=options.report_to)
        print(f"One ladder takes {made.cpu_seconds:.1f} s of processor time", flush=True)
        return made

    campaigns: dict[str, Callable[[], Campaign]] = {
        "kills": lambda: kill_campaign(ladder(), options.kills, dice),
        "damages": lambda: damage_campaign(ladder(), options.damages, dice),
        "disks": lambda: disk_campaign(ladder(), options.disks),
        "starts": lambda: starts_campaign(ladder(), options.starts, dice),
        "data": lambda: data_campaign(root / "data", options.data, dice),
        "endings": lambda: ending_campaign(root / "endings", options.endings, dice),
        "pairs": lambda: pairs.campaign(pairs.chosen(options.seed, options.share), root / "pairs", options.seed),
    }
    done = [campaigns[name]() for name in options.only.split(",")]
    for campaign in done:
        print(f"\n{campaign.table()}")
    lost = sum(len(campaign.lost) for campaign in done)
    print(json.dumps({c.name: {"tried": c.tried.total(), "lost": len(c.lost)} | c.notes for c in done}))
    if not options.keep and not lost:
        shutil.rmtree(root)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

"""Data that vanishes, appears, changes or moves between a kill and the restart, and kills between the last step and
the report; tests/torture.py runs both."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import faults
from tests.campaigns import RUN_LIMIT, Campaign
from tests.tiny import write_model, write_rows, write_stage

SAME, REFUSED = 0, 2


@dataclass(frozen=True)
class Change:
    """Something done to a killed stage's inputs, and how the next start must end: with the same adapter, or with 2."""

    name: str
    apply: Callable[[Path, random.Random], object]
    ends: int


def write_inputs(folder: Path) -> None:
    """A stage of 8 steps over a mix of two files, validated on a third."""
    folder.mkdir(parents=True)
    write_model(folder / "base")
    for name, count, target in (("a", 24, "json"), ("b", 16, "yaml"), ("val", 6, "toml"), ("spare", 12, "xml")):
        write_rows(folder / f"{name}.jsonl", count, target=target)
    write_env(folder)


def write_env(folder: Path) -> None:
    mix = [{"id": str(folder / "a.jsonl")}, {"id": str(folder / "b.jsonl")}]
    write_stage(folder, 1, {
        "SFT_BASE_MODEL": folder / "base", "SFT_OUT_LORA_DIR": folder / "out", "SFT_DATASET_MIX": json.dumps(mix),
        "SFT_EVAL_DATASET": folder / "val.jsonl", "SFT_MAX_STEPS": 8, "SFT_NUM_PROC": 1, "SFT_LORA_DROPOUT": 0.1,
        "SFT_PER_DEVICE_TRAIN_BS": 2, "SFT_GRAD_ACCUM": 2,
    })  # fmt: skip


def run(folder: Path, *more: object) -> tuple[int, str]:
    started = faults.start(
        ["--stage", 1, "--env-dir", folder, *more], folder / "log", prepare=faults.own_cache(folder / "cache")
    )
    code = started.wait(RUN_LIMIT)
    return code if code is not None else -9, started.text()


def kill_when(folder: Path, condition: Callable[[faults.Run], bool]) -> None:
    started = faults.start(
        ["--stage", 1, "--env-dir", folder], folder / "log", prepare=faults.own_cache(folder / "cache")
    )
    end = time.monotonic() + RUN_LIMIT
    while not started.is_over() and not condition(started) and time.monotonic() < end:
        time.sleep(0.001)
    started.signal(signal.SIGKILL)
    started.wait(10.0)


def has_checkpoint(folder: Path) -> bool:
    return any("partial" not in mark.parent.name for mark in folder.glob("out_stage1/checkpoint-*/COMPLETE.json"))


# What is done meanwhile


def vanish(name: str) -> Callable[[Path, random.Random], object]:
    return lambda folder, dice: (folder / name).unlink()


def edit(name: str) -> Callable[[Path, random.Random], object]:
    """One character of one row, at another place each time, the size kept."""

    def apply(folder: Path, dice: random.Random) -> None:
        path = folder / name
        text = path.read_text()
        places = [place for place, sign in enumerate(text) if sign.isdigit()]
        place = dice.choice(places)
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])

    return apply


def append(name: str) -> Callable[[Path, random.Random], object]:
    def apply(folder: Path, dice: random.Random) -> None:
        lines = (folder / "spare.jsonl").read_text().splitlines()
        with (folder / name).open("a") as stream:
            stream.write(dice.choice(lines) + "\n")

    return apply


def touch(name: str) -> Callable[[Path, random.Random], object]:
    return lambda folder, dice: (folder / name).touch()


def rename_data(folder: Path, dice: random.Random) -> None:
    """The same content under another name, named in the env file."""
    new = f"moved{dice.randrange(100)}.jsonl"
    (folder / "b.jsonl").rename(folder / new)
    env = folder / "stage1.env"
    env.write_text(env.read_text().replace("b.jsonl", new))


def damage_base(folder: Path, dice: random.Random) -> None:
    path = folder / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1 - dice.randrange(1000)] ^= 1
    path.write_bytes(content)


def note_in_base(folder: Path, dice: random.Random) -> None:
    """A file that nobody loads."""
    (folder / "base" / "notes.txt").write_text(f"checked {dice.random()}")


def unchanged(folder: Path, dice: random.Random) -> None:
    """Nothing: the folder itself has moved, as each copy has."""


CHANGES = (
    *(Change(f"{name} gone", vanish(f"{name}.jsonl"), REFUSED) for name in ("a", "b", "val")),
    *(Change(f"{name} edited", edit(f"{name}.jsonl"), REFUSED) for name in ("a", "b", "val")),
    *(Change(f"{name} grown", append(f"{name}.jsonl"), REFUSED) for name in ("a", "b", "val")),
    *(Change(f"{name} touched", touch(f"{name}.jsonl"), SAME) for name in ("a", "val")),
    Change("base model's weights changed", damage_base, REFUSED),
    Change("a note beside the base model", note_in_base, SAME),
    Change("data renamed", rename_data, SAME),
    Change("all moved", unchanged, SAME),
)


def data_campaign(root: Path, cases: int, dice: random.Random) -> Campaign:
    """Copies of one killed stage, each to a place of its own, its inputs changed there, started again."""
    campaign = Campaign("data changed between kill and restart")
    killed, whole = root / "killed", root / "undisturbed"
    for folder in (killed, whole):
        write_inputs(folder)
    if run(whole)[0] != 0:
        campaign.fail("the undisturbed stage failed")
        return campaign
    kill_when(killed, lambda started: has_checkpoint(killed))
    shutil.rmtree(killed / "cache", ignore_errors=True)
    expected = load_file(whole / "out_stage1" / "adapter_model.safetensors")
    for case in range(cases):
        change = CHANGES[case % len(CHANGES)] if case < len(CHANGES) else dice.choice(CHANGES)
        campaign.tried[change.name] += 1
        folder = root / f"case{case}"
        shutil.copytree(killed, folder)
        write_env(folder)
        change.apply(folder, dice)
        before = traces(folder)
        code, text = run(folder)
        if fault := _fault(folder, change, code, expected, before):
            campaign.fail(f"{change.name}: {fault}\n{text[-800:]}")
        else:
            shutil.rmtree(folder)
    return campaign


def traces(folder: Path) -> dict[str, bytes]:
    """What a refusal must leave as it was."""
    out = folder / "out_stage1"
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def _fault(folder: Path, change: Change, code: int, expected: dict[str, torch.Tensor], before: dict[str, bytes]) -> str:
    if code != change.ends:
        return f"exit code {code} instead of {change.ends}"
    if code == REFUSED:
        return "" if traces(folder) == before else "the refusal changed the output folder"
    adapter = load_file(folder / "out_stage1" / "adapter_model.safetensors")
    same = all(torch.equal(adapter[name], tensor) for name, tensor in expected.items())
    return "" if same else "the adapter is not that of the undisturbed run"


# Kills between the last step and the report


def ending_campaign(root: Path, kills: int, dice: random.Random) -> Campaign:
    """Kills while a stage writes result, status and report; the next start must leave all of them."""
    campaign = Campaign("kills between the last step and the report")
    whole = root / "undisturbed"
    write_inputs(whole)
    if run(whole)[0] != 0:
        campaign.fail("the undisturbed stage failed")
        return campaign
    expected = load_file(whole / "out_stage1" / "adapter_model.safetensors")
    for case in range(kills):
        folder = root / f"ending{case}"
        write_inputs(folder)
        wanted = dice.choice(tuple(MOMENTS))
        kill_when(folder, lambda started, wanted=wanted, folder=folder: MOMENTS[wanted](folder))  # type: ignore[misc]
        campaign.tried[wanted] += 1
        code, text = run(folder)
        fault = _fault(folder, Change(wanted, unchanged, SAME), code, expected, {})
        out = folder / "out_stage1"
        missing = [name for name in ("report.html", "report.json", "stage.json") if not (out / name).is_file()]
        if fault or missing or json.loads((out / "stage.json").read_text())["status"] != "complete":
            campaign.fail(f"killed at {wanted}: {fault or f'{missing} missing'}\n{text[-800:]}")
        else:
            shutil.rmtree(folder)
    return campaign


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the result written": lambda folder: (folder / "out_stage1" / "adapter_model.safetensors").exists(),
    "the configuration written": lambda folder: (folder / "out_stage1" / "training_config.json").exists(),
    "the status complete": lambda folder: _status(folder) == "complete",
    "the page there": lambda folder: (folder / "out_stage1" / "report.html").exists(),
    "the seal there": lambda folder: (folder / "out_stage1" / "COMPLETE.json").exists(),
}


def _status(folder: Path) -> str:
    try:
        return str(json.loads((folder / "out_stage1" / "stage.json").read_text())["status"])
    except (OSError, ValueError, KeyError):
        return ""

"""`--check` without a stage: each finding is good or has a remedy; only what is essential ends with exit code 2."""

import json
import sqlite3
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import train
from sft import cli
from sft.planning import machine
from sft.planning.machine import Finding


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No network: the hub is switched off."""
    monkeypatch.setattr("sft.planning.machine.hub_is_off", lambda: True)


def test_the_installed_versions_are_the_pinned_ones():
    """The environment of the tests is made from constraints.txt."""
    found = {finding.name: finding.state for finding in machine.libraries()}
    assert found.pop("deepspeed") == ("ok" if find_spec("deepspeed") else "warning")
    assert found == dict.fromkeys(machine.NEEDED, "ok")


def test_pins_are_read_from_a_constraints_file():
    assert machine.pins("# note\ntorch==2.13.0  # CPU wheel\n\npeft==0.21.2\n") == {"torch": "2.13.0", "peft": "0.21.2"}


def test_a_build_of_the_pinned_version_is_good_and_another_version_is_named():
    assert machine.library("torch", "2.13.0+cu130", "2.13.0") == Finding("torch", "ok", "2.13.0+cu130")
    other = machine.library("torch", "2.12.1", "2.13.0")
    assert other.text == "torch: 2.12.1, tested with 2.13.0; run make install"
    assert other.state == "warning"


def test_a_missing_library_is_broken(monkeypatch):
    def version(name):
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    states = {finding.name: finding.state for finding in machine.libraries()}
    assert (states["torch"], states["deepspeed"]) == ("broken", "warning")


def test_old_python_is_broken():
    assert machine.python((3, 10, 2)).state == "broken"
    assert machine.python((3, 11, 0)) == Finding("Python", "ok", "3.11.0")


@pytest.mark.parametrize(("free", "state"), [(0.5, "broken"), (5, "warning"), (500, "ok")])
def test_disk_space(monkeypatch, tmp_path, free, state):
    """Under 1 GiB nothing can be trained, under 10 a merged model may not fit."""
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 2**30))
    assert machine.disk(tmp_path / "not" / "there").state == state


def test_stores(tmp_path):
    database = tmp_path / "mlflow.db"
    sqlite3.connect(database).close()
    assert machine.store(f"sqlite:///{database}").state == "ok"
    assert machine.store(f"file://{tmp_path}").remedy.startswith("MLflow refuses file stores")
    gone = machine.store("http://user:secret@127.0.0.1:9/")
    assert gone.state == "warning"
    assert "secret" not in gone.text


def test_an_address_that_keeps_silent_costs_no_more_than_the_limit(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.05)
    monkeypatch.setattr(machine, "_fault", lambda address: (machine.sys.stdin and __import__("time").sleep(1)) or "")
    assert machine.unreachable("http://silent.invalid") == "no answer in 0 s"


def test_the_command_prints_a_table(capsys):
    assert cli.command_line(train.main, ["--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["Python", "ok"]
    assert any(line.startswith("attention") and "sdpa" in line for line in lines)
    assert any(line.startswith("hub") and "HF_HUB_OFFLINE" in line for line in lines)


def test_what_is_broken_ends_with_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(machine, "examine", lambda settings: [Finding("peft", "broken", "is not installed", "run it")])
    assert cli.command_line(train.main, ["--check", "--json"]) == 2
    captured = capsys.readouterr()
    listed = [{"name": "peft", "state": "broken", "found": "is not installed", "remedy": "run it"}]
    assert json.loads(captured.out) == {"machine": listed, "problems": ["peft: is not installed; run it"]}
    assert "[ERROR] peft: is not installed; run it" in captured.err


def test_a_stage_is_missing(capsys):
    """Without --check the stage must be named."""
    assert cli.command_line(train.main, []) == 2
    assert (
        "[ERROR] --stage: is missing; give a number such as 1, a range such as 1-3, or all" in capsys.readouterr().err
    )

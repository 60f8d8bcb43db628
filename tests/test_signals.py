"""Stopping: the first signal ends a run cleanly wherever it arrives, the second at once, and nobody stays behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from argparse import Namespace
from pathlib import Path

import pytest

from sft import cli
from sft.distributed.signals import STOP, Stopped, follow_parent
from sft.stages import checkpoints
from sft.storage import atomic
from tests.stops import before, tell
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stop_signals():
    STOP.install()
    yield STOP
    STOP.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_each_signal_raises_where_the_program_stands(stop_signals, number, code):
    """Exit codes as scripts expect them: 130 for Ctrl-C, 143 else."""
    with pytest.raises(Stopped) as stopped:
        tell(number)
    assert stopped.value.exit_code == code


def test_in_training_the_signal_is_only_remembered(stop_signals):
    """The step goes on; who asks learns which signal came."""
    stop_signals.deferred = True
    tell()
    assert stop_signals.number == signal.SIGTERM


def test_a_stop_swallowed_by_a_callback_or_a_bare_except_is_raised_again(stop_signals, capfd):
    """Python prints and forgets what is raised inside a weakref callback; libraries have bare excepts."""

    class Thing:
        pass

    thing = Thing()
    watch = weakref.ref(thing, lambda _: (tell(), [None for _ in range(100)]))
    with pytest.raises(Stopped):
        del thing
        with contextlib.suppress(BaseException):  # the first reminder is swallowed as well
            time.sleep(5)
        time.sleep(5)
    assert watch() is None
    assert "Exception ignored" not in capfd.readouterr().err


def test_no_reminder_interrupts_the_clean_up(stop_signals):
    """A `finally` of 1.2 s, longer than two reminders, runs to its end."""
    done = []
    with pytest.raises(Stopped):
        try:
            tell()
        finally:
            time.sleep(1.2)
            done.append(True)
    assert done == [True]


SECOND = """
import os, signal, sys, time
from sft.distributed.signals import STOP, Stopped
STOP.install(processes=int(sys.argv[1]))
STOP.deferred = True
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
print("goes on")
"""


def test_a_second_signal_exits_at_once():
    """SIGTERM, then SIGINT: 130, and the last line is never reached."""
    done = subprocess.run([sys.executable, "-c", SECOND, "1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")


def test_of_several_processes_the_launchers_echo_is_no_second_signal():
    """A terminal signals every process, and the launcher passes it on: twice within moments."""
    done = subprocess.run([sys.executable, "-c", SECOND, "2"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def test_a_data_worker_leaves_the_first_signal_to_its_parent_and_dies_with_it():
    """Slurm signals every process of a job; kill -9 of the parent leaves no worker."""
    ready, mark = os.pipe()
    parent = os.fork()
    if parent == 0:
        if (worker := os.fork()) == 0:
            follow_parent()
            os.write(mark, b"x")
            time.sleep(60)
            os._exit(0)
        os.write(mark, worker.to_bytes(4, "little"))
        time.sleep(60)
    first = os.read(ready, 1) + os.read(ready, 4)
    while len(first) < 5:
        first += os.read(ready, 5 - len(first))
    worker = int.from_bytes(first.replace(b"x", b"", 1)[:4], "little")
    os.kill(worker, signal.SIGTERM)
    time.sleep(0.2)
    assert atomic.is_alive(worker)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    end = time.monotonic() + 5.0
    while is_running(worker) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    """Alive and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# A run, told to stop in each of its phases


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of four steps, the first complete; `whole` holds both."""
    folder = tmp_path_factory.mktemp("ladder")
    common = {
        "SFT_BASE_MODEL": write_model(folder / "base"), "SFT_DATASET_ID": write_rows(folder / "json.jsonl", 40),
        "SFT_OUT_LORA_DIR": folder / "whole" / "out", "SFT_GEN_EVAL": "structured", "SFT_GEN_EVAL_SAMPLES": 3,
        "SFT_GEN_MAX_NEW_TOKENS": 8, "SFT_MAX_STEPS": 4, "SFT_LORA_DROPOUT": 0.1, "SFT_NUM_GENERATE_SAMPLES": 0,
    }  # fmt: skip
    write_stage(folder, 1, common)
    write_stage(folder, 2, common)
    assert run_train("--stage", "all", "--env-dir", folder) == 0
    return folder


PHASES = {
    "data preparation": ("sft.run.prepare_mix", lambda *a, **k: True),
    "merge": ("sft.merging.merge._write_side_files", lambda *a, **k: True),
    "loading": ("sft.merging.parents.load_model", lambda *a, **k: True),
    "evaluation before training": ("sft.evaluation.answers.answer_prompts", lambda *a, **k: True),
    "a step": ("sft.training.trainer.StagedTrainer.compute_loss", lambda self, *a, **k: self.state.global_step == 2),
    "evaluation": (
        "sft.training.trainer.StagedTrainer.validation_loss",
        lambda self, *a, **k: self.state.global_step == 3,
    ),
    "saving": ("sft.storage.seals.seal", lambda folder, **k: "checkpoint-2" in folder.name),
    "last evaluation": (
        "sft.training.trainer.StagedTrainer.validation_loss",
        lambda self, *a, **k: self.state.global_step == 4,
    ),
    "writing the result": (
        "sft.storage.json_files.write_json",
        lambda path, *a, **k: path.name == "training_config.json",
    ),
    "final scoring": ("sft.evaluation.ladder_scores._previous", lambda *a, **k: True),
    "report": ("sft.reporting.report.write_report", lambda *a, **k: True),
}
CHECKPOINT = {
    "a step": 3, "evaluation": 3, "saving": 2, "last evaluation": 4, "writing the result": 4, "final scoring": 4,
    "report": 4,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_loses_nothing(ladder, tmp_path, monkeypatch, capsys, phase):
    """Exit code 143 and, after the same command again, the adapter and the metrics of a run that was never stopped."""
    (tmp_path / "out_stage1").symlink_to(ladder / "whole" / "out_stage1")
    command = ["--stage", 2, "--env-dir", ladder, "--set", f"SFT_OUT_LORA_DIR={tmp_path / 'out'}"]
    folder, whole = tmp_path / "out_stage2", ladder / "whole" / "out_stage2"
    with monkeypatch.context() as patched:
        before(patched, PHASES[phase][0], tell, PHASES[phase][1])
        began = time.monotonic()
        assert run_train(*command) == 143
        assert time.monotonic() - began < 60.0
    assert "Stopped by SIGTERM. The same command goes on from the last checkpoint." in capsys.readouterr().err
    found = checkpoints.scan(folder)
    assert not found.broken
    assert found.newest == (folder / f"checkpoint-{CHECKPOINT[phase]}" if phase in CHECKPOINT else None)
    assert run_train(*command) == 0
    result = "adapter_model.safetensors"
    assert (folder / result).read_bytes() == (whole / result).read_bytes()
    assert (folder / "best_model" / result).read_bytes() == (whole / "best_model" / result).read_bytes()
    for name in ("loss", "eval_loss", "gen_score"):
        assert metric_lines(folder, name) == metric_lines(whole, name)
    manifests = [json.loads((each / "stage.json").read_text()) for each in (folder, whole)]
    assert manifests[0]["forgetting"] == manifests[1]["forgetting"]
    assert [path.name for path in folder.parent.rglob("*") if ".partial-" in path.name or path.name == ".saving"] == []


@pytest.mark.parametrize(("check", "goes_on"), [(True, False), (False, True)])
def test_a_stopped_check_speaks_of_no_checkpoint(capsys, check, goes_on):
    """Only a training run goes on from one."""
    assert cli.stopped(Stopped(signal.SIGTERM), Namespace(check=check)) == 143
    assert ("goes on from the last checkpoint" in capsys.readouterr().err) is goes_on

"""Nothing lost: a run that was killed, cut off, damaged or out of room ends as if nothing had happened."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft.cli import explain
from sft.settings import load_settings
from sft.stages import checkpoints
from sft.stages.stage import Stage
from sft.storage import atomic
from tests.stops import before, tell
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ADAPTER = "adapter_model.safetensors"
EARLY = [f"--set=SFT_{each}" for each in ("EARLY_STOPPING_PATIENCE=1", "METRIC_FOR_BEST=gen_score", "EVAL_STEPS=2")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of 8 rows with dropout; an evaluation every 3, a checkpoint every 2; `whole` ran undisturbed."""
    folder = tmp_path_factory.mktemp("resume")
    write_stage(folder, 1, {
        "SFT_BASE_MODEL": write_model(folder / "base"), "SFT_DATASET_ID": write_rows(folder / "json.jsonl", 40),
        "SFT_OUT_LORA_DIR": folder / "whole" / "out", "SFT_GEN_EVAL": "structured", "SFT_GEN_EVAL_SAMPLES": 3,
        "SFT_GEN_MAX_NEW_TOKENS": 6, "SFT_MAX_STEPS": 8, "SFT_LORA_DROPOUT": 0.1, "SFT_NUM_GENERATE_SAMPLES": 0,
    })  # fmt: skip
    assert run_train("--stage", 1, "--env-dir", folder) == 0
    return folder


def train(inputs: Path, out: Path, *more: str) -> int:
    return run_train("--stage", 1, "--env-dir", inputs, "--set", f"SFT_OUT_LORA_DIR={out / 'out'}", *more)


def history(folder: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("time", "tokens_per_second")} for record in records]


def assert_same_end(out: Path, whole: Path) -> None:
    """Adapter, best adapter, optimizer and scheduler of the last checkpoint, and every metric line."""
    one, other = out / "out_stage1", whole / "out_stage1"
    last = checkpoints.find(other)[0].folder.name
    for name in (ADAPTER, f"best_model/{ADAPTER}", f"{last}/optimizer.pt", f"{last}/scheduler.pt"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert history(one) == history(other)


def at_step(step: int):
    """For a method of the trainer: as it is called after this many steps."""
    return lambda trainer, *arguments, **keywords: trainer.state.global_step == step


class Killed(BaseException):
    """Ends a run where it stands, without a checkpoint, as kill -9 would."""


def kill() -> None:
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    "budget",
    [
        ["--kills", "5", "--damages", "6", "--starts", "2", "--only", "kills,damages,starts"],
        ["--data", "15", "--endings", "3", "--only", "data,endings"],
        ["--share", "10", "--only", "pairs"],
    ],
    ids=["kills, damaged files, double starts", "data that changes, kills at the end", "a tenth of the pairs"],
)
def test_the_campaigns_of_make_torture_in_short(budget: list[str]):
    """Nothing lost in any of them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", *budget], cwd=ROOT, capture_output=True, text=True, timeout=540,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {campaign["lost"] for campaign in figures.values()} == {0}
    assert min(campaign["tried"] for campaign in figures.values()) >= 2


def test_an_evaluation_cut_off_twice_is_made_up_once(inputs, tmp_path, monkeypatch):
    """Stopped in the evaluation of step 3, stopped again in the one that makes up for it, killed after that."""
    for what, place, when in (
        (tell, "sft.training.trainer.StagedTrainer.validation_loss", at_step(3)),
        (tell, "sft.evaluation.answers.answer_prompts", lambda *a, **k: True),
        (kill, "sft.training.trainer.StagedTrainer.compute_loss", at_step(3)),
    ):
        with monkeypatch.context() as patched:
            before(patched, place, what, when)
            if what is kill:
                with pytest.raises(Killed):
                    train(inputs, tmp_path)
            else:
                assert train(inputs, tmp_path) == 143
        assert checkpoints.scan(tmp_path / "out_stage1").newest == tmp_path / "out_stage1" / "checkpoint-3"
    assert train(inputs, tmp_path) == 0
    assert_same_end(tmp_path, inputs / "whole")


@pytest.mark.parametrize("where", ["before the result", "in the evaluation that ends it"])
def test_early_stopping_stays_stopped(inputs, tmp_path, monkeypatch, where):
    """gen_score is 0 throughout, so the evaluation at step 2 is no better than that at step 0, which counts, and is the
    last. A resumed run trains no step more."""
    assert train(inputs, tmp_path / "whole", *EARLY) == 0
    with monkeypatch.context() as patched:
        if where == "before the result":
            before(patched, "sft.run.write_result", tell)
        else:
            before(patched, "sft.training.trainer.StagedTrainer.validation_loss", tell, at_step(2))
        assert train(inputs, tmp_path, *EARLY) == 143
    assert train(inputs, tmp_path, *EARLY) == 0
    assert json.loads((tmp_path / "out_stage1" / "stage.json").read_text())["steps"] == 2
    assert_same_end(tmp_path, tmp_path / "whole")


def test_a_run_killed_after_its_last_checkpoint_trains_no_step_more(inputs, tmp_path, monkeypatch):
    """Killed before the result is written: the rerun writes it and computes no loss."""
    with monkeypatch.context() as patched:
        before(patched, "sft.run.write_result", kill)
        with pytest.raises(Killed):
            train(inputs, tmp_path)
    with monkeypatch.context() as patched:
        before(patched, "sft.training.trainer.StagedTrainer.compute_loss", lambda: pytest.fail("a step was trained"))
        assert train(inputs, tmp_path) == 0
    assert_same_end(tmp_path, inputs / "whole")


def test_a_long_step_is_given_up_without_a_trace(inputs, tmp_path, monkeypatch):
    """A signal in the first micro-batch of step 4, with no patience left: checkpoint-3, made before step 4 began."""
    with monkeypatch.context() as patched:
        patched.setattr("sft.training.callbacks.PATIENCE_SECONDS", 0.0)
        before(patched, "sft.training.trainer.StagedTrainer.compute_loss", tell, at_step(3))
        assert train(inputs, tmp_path) == 143
    assert checkpoints.find(tmp_path / "out_stage1")[0].step == 3
    assert train(inputs, tmp_path) == 0
    assert_same_end(tmp_path, inputs / "whole")


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_end_is_the_same(inputs, tmp_path, monkeypatch, capsys):
    """One flipped bit in the optimizer's state: step 4 is resumed and the adapter is that of the undisturbed run."""
    with monkeypatch.context() as patched:
        before(patched, "sft.training.trainer.StagedTrainer.compute_loss", kill, at_step(7))
        with pytest.raises(Killed):
            train(inputs, tmp_path)
    optimizer = tmp_path / "out_stage1" / "checkpoint-6" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    assert train(inputs, tmp_path) == 0
    said = capsys.readouterr().err
    assert "Invalid checkpoint state found. Please check manually." in said
    assert "optimizer.pt: content changed" in said
    assert "Found latest checkpoint: checkpoint-4" in said
    assert len(list((tmp_path / "out_stage1").glob("checkpoint-6.broken-*"))) == 1
    assert_same_end(tmp_path, inputs / "whole")


def test_another_split_of_the_global_batch_goes_on_with_equal_losses(inputs, tmp_path, monkeypatch):
    """Begun with 4 x 2 rows a step, resumed with 2 x 4: losses equal to 1e-5 (dropout off: it differs by batch)."""
    quiet = ("--set", "SFT_LORA_DROPOUT=0")
    assert train(inputs, tmp_path / "whole", *quiet) == 0
    with monkeypatch.context() as patched:
        before(patched, "sft.training.trainer.StagedTrainer.compute_loss", tell, at_step(4))
        assert train(inputs, tmp_path, *quiet) == 143
    split = ("--set", "SFT_PER_DEVICE_TRAIN_BS=2", "--set", "SFT_GRAD_ACCUM=4")
    assert train(inputs, tmp_path, *quiet, *split) == 0
    for name in ("loss", "eval_loss"):
        expected = metric_lines(tmp_path / "whole" / "out_stage1", name)
        assert metric_lines(tmp_path / "out_stage1", name) == pytest.approx(expected, abs=1e-5)


# Not finite


def finite(folder: Path) -> bool:
    tensors = [tensor for path in folder.rglob(ADAPTER) for tensor in load_file(path).values()]
    return bool(tensors) and all(torch.isfinite(tensor).all() for tensor in tensors)


def test_a_loss_that_is_no_number_stops_before_the_optimizer_step(inputs, tmp_path, monkeypatch, capsys):
    """Exit 1, the rows of the step by source and content, and only whole checkpoints of the steps before."""
    from sft.training.trainer import StagedTrainer

    original = StagedTrainer.compute_loss

    def poisoned(trainer, *arguments, **keywords):
        loss = original(trainer, *arguments, **keywords)
        return loss * math.nan if trainer.state.global_step == 5 else loss

    with monkeypatch.context() as patched:
        patched.setattr(StagedTrainer, "compute_loss", poisoned)
        assert train(inputs, tmp_path) == 1
    said = capsys.readouterr().err
    assert "Loss or gradient is not finite at step 6 (gradient norm nan). Nothing was updated" in said
    assert said.count(" from json.jsonl ('{") == 8
    folder = tmp_path / "out_stage1"
    assert checkpoints.find(folder)[0].step == 4
    assert finite(folder)
    assert train(inputs, tmp_path) == 0
    assert_same_end(tmp_path, inputs / "whole")


def test_a_rate_far_too_high_never_reaches_a_checkpoint(inputs, tmp_path, capsys):
    """The optimizer itself makes the weights infinite: found before they are saved."""
    assert train(inputs, tmp_path, "--set", "SFT_LR=1e38", "--set", "SFT_SAVE_STEPS=1") == 1
    said = capsys.readouterr().err
    assert "not finite" in said
    assert "Traceback" not in said
    folder = tmp_path / "out_stage1"
    assert not list(folder.rglob(ADAPTER)) or finite(folder)


# Disk


def test_a_disk_that_fills_during_a_save_leaves_the_checkpoint_before(inputs, tmp_path, monkeypatch, capsys):
    """Exit 1 with the reason; no half-written folder stays; the rerun ends as if nothing had happened."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        before(patched, "sft.storage.seals.seal", full, lambda folder, **k: folder.name.startswith("checkpoint-4"))
        assert train(inputs, tmp_path) == 1
    assert "The disk is full. What was complete before is intact" in capsys.readouterr().err
    folder = tmp_path / "out_stage1"
    assert checkpoints.scan(folder) == checkpoints.Scan(folder / "checkpoint-2", [])
    assert [path.name for path in folder.iterdir() if ".partial-" in path.name or path.name == ".saving"] == []
    assert train(inputs, tmp_path) == 0
    assert_same_end(tmp_path, inputs / "whole")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("write", [torch.save, lambda tensor, file: file.write(bytes(tensor))])
def test_a_full_disk_is_called_that_by_whatever_meets_it(write):
    """torch's writer of archives only says that it got less far than it meant to."""
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises((OSError, RuntimeError)) as caught:
        write(torch.zeros(10_000, dtype=torch.uint8), file)
    assert explain(caught.value).startswith("The disk is full.")


def test_disk_space_is_asked_for_before_anything_is_written(inputs, tmp_path, monkeypatch, capsys):
    """Exit 2 with what is needed, what is free and the settings that help."""
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 100_000)
    assert train(inputs, tmp_path) == 2
    said = capsys.readouterr().err
    assert f"SFT_OUT_LORA_DIR={tmp_path / 'out'}: stage 1 will write up to " in said
    assert "and 0.1 MB are free; free some space, keep fewer checkpoints (SFT_SAVE_TOTAL_LIMIT=2)" in said
    assert not (tmp_path / "out_stage1" / "stage.json").exists()


def test_the_space_asked_for_is_what_a_stage_takes(inputs, tmp_path):
    """Weights and optimizer states by count, the rest by an allowance: at least what was written, and without the
    allowance less than twice that."""
    from sft.models.model import load_config
    from sft.planning.disk import SMALL_FILES, bytes_of, needed_bytes

    settings = load_settings(1, env_dir=inputs, environ={}, overrides=[f"SFT_OUT_LORA_DIR={tmp_path / 'out'}"])
    needed = needed_bytes(Stage.inspect(settings), load_config(settings))
    written = bytes_of((inputs / "whole" / "out_stage1").rglob("*"))
    # One checkpoint more than stays, the best model twice, the result.
    folders = settings.save_total_limit + 1 + 2 + 1
    assert written < sum(needed.values()) < folders * SMALL_FILES + 2 * written
    assert set(needed) == {"checkpoints", "best model", "result"}


# Security


def test_credentials_stand_in_no_file(inputs, tmp_path, monkeypatch):
    """A token in the environment and a password in the tracking address."""
    token = "hf_" + "".join(map(chr, range(97, 123)))
    monkeypatch.setenv("HF_TOKEN", token)
    uri = "http://user:geheim123@127.0.0.1:9"
    assert train(inputs, tmp_path, "--set", f"MLFLOW_TRACKING_URI={uri}", "--set", "SFT_MAX_STEPS=2") == 0
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert b"geheim123" not in content, path
        assert token.encode() not in content, path


def test_results_hold_no_pickle(inputs):
    """Nor do checkpoints, but for optimizer, scheduler and random state, which are read with weights_only."""
    folder = inputs / "whole" / "out_stage1"
    pickles = {path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.parent.name.partition("-")[0] for path in folder.rglob("*.pt")} == {"checkpoint"}

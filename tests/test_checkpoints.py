"""Which checkpoint is used, what is said about it, which ones go."""

import os

import pytest

from sft.errors import Problems
from sft.stages import checkpoints, status_lines
from sft.stages.stage import Stage
from tests.ladders import add_checkpoint, make_settings, train

BANNER = "=" * 50


def said(stage: Stage) -> list[str]:
    lines: list[str] = []
    status_lines.announce(stage, lines.append)
    return lines


def start(settings) -> Stage:
    """A stage that was begun and then killed."""
    with Stage.open(settings) as stage:
        stage.begin()
    return stage


def test_checkpoints_are_ordered_by_number_and_other_names_are_none(tmp_path):
    """100 comes before 9; names that only begin like one, files and a missing folder give nothing."""
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-best", "checkpoint-", "checkpoint-5.broken-2025", "x-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert [c.step for c in checkpoints.find(tmp_path)] == [100, 9]
    assert checkpoints.find(tmp_path / "absent") == []


def test_the_newest_whole_checkpoint_is_found_past_damaged_ones(tmp_path):
    """Of 10, 20, a truncated 30 and an unsealed 40 it is 20; both damaged ones are named with what is wrong."""
    add_checkpoint(tmp_path, 10)
    add_checkpoint(tmp_path, 20)
    os.truncate(add_checkpoint(tmp_path, 30) / "adapter_model.safetensors", 3)
    add_checkpoint(tmp_path, 40, sealed=False)
    found = checkpoints.scan(tmp_path)
    assert found.newest == tmp_path / "checkpoint-20"
    assert found.broken == [
        (tmp_path / "checkpoint-40", ["COMPLETE.json: missing"]),
        (tmp_path / "checkpoint-30", ["adapter_model.safetensors: 3 bytes instead of 18"]),
    ]


def test_a_whole_checkpoint_under_another_steps_name_is_not_used(tmp_path):
    """A folder renamed from step 10 to step 20 is broken, however whole its files are."""
    add_checkpoint(tmp_path, 10).rename(tmp_path / "checkpoint-20")
    assert checkpoints.scan(tmp_path).broken == [(tmp_path / "checkpoint-20", ["trainer_state.json: is of step 10"])]


def test_rotation_keeps_the_newest_the_protected_the_unsealed_and_what_was_set_aside(tmp_path):
    """Of five whole ones and a limit of two, 15 and 5 go, newest first; nothing unsealed or set aside is touched."""
    for step in (5, 10, 15, 20, 25):
        add_checkpoint(tmp_path, step)
    add_checkpoint(tmp_path, 30, sealed=False)
    (tmp_path / "checkpoint-1.broken-20250131T235959Z").mkdir()
    gone = checkpoints.rotate(tmp_path, 2, protect=[tmp_path / "checkpoint-10"])
    assert [path.name for path in gone] == ["checkpoint-15", "checkpoint-5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1.broken-20250131T235959Z",
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-25",
        "checkpoint-30",
    ]


@pytest.mark.parametrize("keep", [0, 1])
def test_rotation_never_removes_the_last_whole_checkpoint(tmp_path, keep):
    """Whatever the limit says, something to resume from stays."""
    add_checkpoint(tmp_path, 5)
    assert checkpoints.rotate(tmp_path, keep) == []
    assert checkpoints.newest_sealed(tmp_path) == tmp_path / "checkpoint-5"


def test_a_first_start_only_says_that_it_looks(tmp_path):
    """The one line of the contract, and nothing about checkpoints."""
    with Stage.open(make_settings(tmp_path)) as stage:
        assert said(stage) == ["Checking checkpoint status..."]


def test_warnings_come_first(tmp_path):
    """The missing parent is said before the status of the checkpoints."""
    with Stage.open(make_settings(tmp_path, 2)) as stage:
        assert said(stage) == [
            f"[WARNING] Previous stage adapter not found at {tmp_path}/out_stage1, starting from base model",
            "Checking checkpoint status...",
        ]


def test_a_folder_without_checkpoints(tmp_path):
    """A start that was killed before its first checkpoint resumes from nothing, in the contract's two lines."""
    settings = make_settings(tmp_path)
    start(settings)
    with Stage.open(settings) as stage:
        assert stage.decision == "resume"
        assert stage.checkpoint is None
        assert said(stage) == [
            "Checking checkpoint status...",
            "Checkpoint directory exists but no checkpoints found.",
            "Continuing with training...",
        ]


def test_a_stage_to_resume(tmp_path):
    """The newest checkpoint, its epoch with two digits and the target, word for word."""
    settings = make_settings(tmp_path, epochs=3)
    folder = start(settings).folder
    add_checkpoint(folder, 90, epoch=0.9)
    add_checkpoint(folder, 100, epoch=1.23456)
    with Stage.open(settings) as stage:
        assert stage.checkpoint == folder / "checkpoint-100"
        assert said(stage) == [
            "Checking checkpoint status...",
            "Found latest checkpoint: checkpoint-100",
            "Current training status:",
            "Current epoch: 1.23",
            "Target epochs: 3.0",
        ]


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path):
    """The reason is said and step 10 is resumed; it is renamed to .broken-... once nothing was refused any more."""
    settings = make_settings(tmp_path)
    folder = start(settings).folder
    add_checkpoint(folder, 10)
    add_checkpoint(folder, 20, sealed=False)
    with pytest.raises(Problems), Stage.open(settings):
        raise Problems(["the data can't be read"])
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]
    with Stage.open(settings) as stage:
        lines = said(stage)
        stage.begin()
    assert stage.checkpoint == folder / "checkpoint-10"
    (aside,) = folder.glob("checkpoint-20*")
    assert aside.name.startswith("checkpoint-20.broken-")
    assert stage.moved == {folder / "checkpoint-20": aside}
    assert lines == [
        "Checking checkpoint status...",
        "Invalid checkpoint state found. Please check manually.",
        f"Checkpoint directory: {folder}",
        "checkpoint-20 is damaged: COMPLETE.json: missing",
        "Found latest checkpoint: checkpoint-10",
        "Current training status:",
        "Current epoch: 0.5",
        "Target epochs: 1.0",
    ]


def test_without_any_whole_checkpoint_training_starts_over(tmp_path):
    """The broken one is named, then the lines of a folder without checkpoints."""
    settings = make_settings(tmp_path)
    folder = start(settings).folder
    add_checkpoint(folder, 10, sealed=False)
    with Stage.open(settings) as stage:
        lines = said(stage)
    assert (stage.decision, stage.checkpoint) == ("resume", None)
    assert lines[1] == "Invalid checkpoint state found. Please check manually."
    assert lines[-2:] == ["Checkpoint directory exists but no checkpoints found.", "Continuing with training..."]


def test_a_complete_stage_says_so_in_the_banner(tmp_path):
    """The contract's notice between two lines of 50 equals signs, word for word."""
    settings = make_settings(tmp_path, epochs=2)
    with Stage.open(settings) as stage:
        stage.begin()
        add_checkpoint(stage.folder, 7, epoch=2.0)
    train(settings)
    stage = Stage.open(settings)
    assert stage.decision == "complete"
    assert said(stage) == [
        "Checking checkpoint status...",
        "Found latest checkpoint: checkpoint-7",
        "Current training status:",
        "Current epoch: 1.0",
        "Target epochs: 2.0",
        BANNER,
        "IMPORTANT NOTICE:",
        "Training has already been completed at epoch 1.0!",
        "Target epochs was 2.0",
        f"Trained model is available at: {stage.folder}",
        BANNER,
    ]


def test_where_steps_decide_the_banner_says_so_beside_the_epochs(tmp_path):
    """0.26 of 30 epochs is no unfinished training: one line more under each line of target epochs."""
    settings = make_settings(tmp_path, epochs=30, max_steps=8)
    with Stage.open(settings) as stage:
        stage.begin()
        add_checkpoint(stage.folder, 7, epoch=0.26)
    train(settings)
    lines = said(Stage.open(settings))
    more = "SFT_MAX_STEPS=8 decides when it ends, not the epochs"
    assert [lines[place - 1] for place, line in enumerate(lines) if line == more] == [
        "Target epochs: 30.0", "Target epochs was 30.0"
    ]  # fmt: skip

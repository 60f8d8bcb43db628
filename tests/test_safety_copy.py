"""The safety copy: a lost disk costs what came after the last checkpoint and nothing else, and no copy ends a run."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from sft.errors import Problems
from sft.planning.plan import plan_stage
from sft.settings import load_settings
from sft.stages import safety_copy
from sft.stages.opening import open_stage
from sft.storage.mirror import FolderMirror, MirrorError, open_mirror
from sft.storage.seals import damage
from tests import faults
from tests.hub_stand_in import Hub, hub_here
from tests.ladders import add_adapter, add_checkpoint, make_settings, train
from tests.tiny import run_train

LIMIT = 180.0


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which this process takes for the hub."""
    with hub_here(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The ladder's inputs, and what two stages of it come to when nothing happens."""
    inputs = faults.write_ladder(tmp_path_factory.mktemp("inputs"))
    out = tmp_path_factory.mktemp("whole")
    run = start(arguments(inputs, out), out / "log")
    assert run.wait(LIMIT) == 0, run.text()
    return inputs, faults.end_state(out, (1, 2))


def start(arguments: list[object], log: Path, prepare: Callable[[], object] = lambda: None) -> faults.Run:
    """train.py in a child that may ask the hub: what transformers writes of a tokenizer depends on that."""

    def online() -> None:
        constants.HF_HUB_OFFLINE = False
        prepare()

    return faults.start(arguments, log, prepare=online)


def arguments(inputs: Path, out: Path, *more: object) -> list[object]:
    return ["--stage", "1-2", "--env-dir", inputs, "--set", f"SFT_OUT_LORA_DIR={out / 'out'}", *more]


def wait_until(there: Path | None, run: faults.Run, server: Hub | None = None, name: str = "") -> None:
    """Until the copy has what is waited for, while the run goes on."""
    end = time.monotonic() + LIMIT
    while not (there.exists() if there else server and name in server.files):
        assert time.monotonic() < end and not run.is_over(), run.text()
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_everything_lost_in_the_second_stage_and_nothing_missing_at_the_end(
    whole: tuple[Path, dict[str, object]], tmp_path: Path, request: pytest.FixtureRequest, kind: str
):
    """Killed in stage 2 when its first checkpoint is safe, then the whole output is gone: the same command restores
    both stages and ends with the same bits: adapters, best models, optimizer, metrics, scores."""
    inputs, undisturbed = whole
    server = request.getfixturevalue("hub") if kind == "hub" else None
    place = "hf://me/safe" if kind == "hub" else str(tmp_path / "drive")
    command = arguments(inputs, tmp_path / "disk", "--set", f"SFT_MIRROR={place}")
    run = start(command, tmp_path / "first.log")
    mark = "out_stage2/stage.json"  # copied last
    wait_until(None if server else tmp_path / "drive" / mark, run, server, mark)
    run.signal(signal.SIGKILL)
    run.wait(10.0)
    shutil.rmtree(tmp_path / "disk")
    again = start(command, tmp_path / "second.log")
    assert again.wait(LIMIT) == 0, again.text()
    assert f"Restored {tmp_path / 'disk' / 'out_stage1'} from the safety copy in {place}" in again.text()
    assert f"Restored {tmp_path / 'disk' / 'out_stage2'} from the safety copy in {place}" in again.text()
    assert "Training has already been completed" in again.text()
    assert "Found latest checkpoint: checkpoint-" in again.text()
    assert faults.differences(faults.end_state(tmp_path / "disk", (1, 2)), undisturbed) == []
    mirror, back = open_mirror(place), tmp_path / "back"
    mirror.fetch("out_stage2", back)
    assert json.loads((back / "stage.json").read_text())["status"] == "complete"
    assert damage(back) == []
    here = {path.name for path in (tmp_path / "disk" / "out_stage2").glob("checkpoint-*")}
    assert {path.name for path in back.glob("checkpoint-*")} == here


@pytest.mark.slow
def test_a_full_mirror_is_said_once_and_ends_nothing(whole: tuple[Path, dict[str, object]], tmp_path: Path):
    """Every copy fails; the stages end as ever, and the next start copies what is missing."""
    inputs, undisturbed = whole
    command = arguments(inputs, tmp_path / "disk", "--set", f"SFT_MIRROR={tmp_path / 'drive'}")

    def full() -> None:
        def store(mirror: FolderMirror, name: str, folder: Path) -> None:
            raise MirrorError("No space left on device: drive")

        FolderMirror.store = store  # type: ignore[method-assign]  # in the child alone

    run = start(command, tmp_path / "log", prepare=full)
    assert run.wait(LIMIT) == 0, run.text()
    assert run.text().count("No space left on device") == 2, "once for each stage"
    assert f"[WARNING] The safety copy in {tmp_path / 'drive'}: " in run.text()
    assert faults.differences(faults.end_state(tmp_path / "disk", (1, 2)), undisturbed) == []
    again = start(command, tmp_path / "again.log")
    assert again.wait(LIMIT) == 0, again.text()
    for name in ("out_stage1", "out_stage2"):
        assert damage(tmp_path / "drive" / name) == []


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A complete stage 1 by hand, in its folder and in the safety copy."""
    stage = train(make_settings(tmp_path, mirror=tmp_path / "drive"))
    FolderMirror(tmp_path / "drive").store(stage.folder.name, stage.folder)
    yield tmp_path, stage.folder


def test_a_lost_parent_comes_back_for_the_stage_that_needs_it(stored: tuple[Path, Path]):
    """Stage 2 finds stage 1 missing here and there: no "starting from base model"."""
    root, folder = stored
    shutil.rmtree(folder)
    with open_stage(make_settings(root, 2, mirror=root / "drive"), fresh=False) as stage:
        assert [parent.stage for parent in stage.parents] == [1]
        assert stage.warnings == []


def test_a_lost_variant_comes_back_under_its_own_name(stored: tuple[Path, Path]):
    """`--try` goes on where it was; the stage beside it is another folder."""
    root, folder = stored
    make_settings(root, mirror=root / "drive")
    settings = load_settings(1, env_dir=root, environ={}, tried=["SFT_LR=1e-3"])
    variant = folder.with_name(f"{folder.name}.try-{settings.variant}")
    (root / "drive" / folder.name).rename(root / "drive" / variant.name)
    shutil.rmtree(folder)
    assert safety_copy.restore(settings) == [f"Restored {variant} from the safety copy in {root / 'drive'}"]
    assert (variant / "adapter_model.safetensors").is_file()
    assert not folder.exists()


def test_fresh_wants_the_stage_itself_not_back_but_its_parents(stored: tuple[Path, Path], capsys):
    """And what was stored of it is taken aside by the first copy, not destroyed."""
    root, folder = stored
    shutil.rmtree(folder)
    with open_stage(make_settings(root, mirror=root / "drive"), fresh=True) as stage:
        assert (stage.decision, capsys.readouterr().out) == ("fresh", "")
        stage.begin()
        with safety_copy.kept_safe(stage) as copy:
            add_adapter(stage.folder, b"other weights")
            add_checkpoint(stage.folder, 2)
            assert copy is not None
            copy.send()
    (old,) = (root / "drive").glob("out_stage1.old-*")
    assert (old / "adapter_model.safetensors").read_bytes() == b"adapter 1"
    assert (root / "drive/out_stage1/adapter_model.safetensors").read_bytes() == b"other weights"
    with pytest.raises(Problems), open_stage(make_settings(root, 2, mirror=root / "drive"), fresh=True):
        """Stage 1 was stopped before its end."""


def test_a_picture_is_not_changed_by_what_happens_later(tmp_path: Path):
    """Rotation takes a checkpoint away and metrics go on while it is on its way."""
    folder = tmp_path / "out_stage1"
    add_checkpoint(folder, 2)
    (folder / "metrics.jsonl").write_text("one\n")
    (folder / "stage.json").write_text("{}")
    copy = safety_copy.SafetyCopy(folder, FolderMirror(tmp_path / "drive"), "drive", afresh=False)
    with copy._changed:  # the thread waits
        copy.send()
        shutil.rmtree(folder / "checkpoint-2")
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write("two\n")
    copy.close(seconds=10.0)
    assert damage(tmp_path / "drive" / "out_stage1" / "checkpoint-2") == []
    assert (tmp_path / "drive" / "out_stage1" / "metrics.jsonl").read_text() == "one\n"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "stage.json"], "nothing is left over"


def test_unfinished_and_broken_checkpoints_are_not_copied(tmp_path: Path):
    """Those without a mark, set aside as damaged, or half removed."""
    folder = tmp_path / "out_stage1"
    add_checkpoint(folder, 2)
    add_checkpoint(folder, 4, sealed=False)
    add_checkpoint(folder, 6).rename(folder / "checkpoint-6.broken-20260101T000000Z")
    (folder / "stage.json").write_text("{}")
    copy = safety_copy.SafetyCopy(folder, FolderMirror(tmp_path / "drive"), "drive", afresh=False)
    copy.send()
    copy.close(seconds=10.0)
    assert [path.name for path in (tmp_path / "drive" / "out_stage1").iterdir() if path.is_dir()] == ["checkpoint-2"]


def problems(root: Path, mirror: object) -> list[str]:
    """What a run refuses, which is also what --check lists."""
    settings = make_settings(root, mirror=mirror)
    with pytest.raises(Problems) as refused, open_stage(settings, fresh=False):
        pass
    document = plan_stage(settings).document
    assert [text for text in document.problems if "SFT_MIRROR" in text] == refused.value.problems
    assert not list(root.glob("out_stage1*"))
    return refused.value.problems


def test_a_drive_that_is_not_mounted_is_one_line(tmp_path: Path):
    """Its parent is not there: nothing is copied into a folder made up beside it."""
    drive = tmp_path / "drive" / "MyDrive" / "safe"
    text = f"SFT_MIRROR={drive}: there is no {drive.parent}; mount the drive first, or correct the path"
    assert problems(tmp_path, drive) == [text]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_t_be_written_is_one_line(tmp_path: Path):
    """Said before training, with the way out."""
    (tmp_path / "drive").mkdir(mode=0o500)
    assert "can't be written by this user; name another folder" in problems(tmp_path, tmp_path / "drive")[0]


def test_the_output_s_own_place_is_no_second_place(tmp_path: Path):
    """The copy would be the stage's folder itself."""
    (text,) = problems(tmp_path, tmp_path)
    assert text == f"SFT_MIRROR={tmp_path}: the output itself is there; name a folder on another disk"


@pytest.mark.parametrize("token", ["none", "wrong", "read"])
def test_a_token_that_can_t_write_is_one_line(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str):
    """Missing, unknown to the hub, or for reading only."""
    if token == "none":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    elif token == "wrong":
        monkeypatch.setenv("HF_TOKEN", "hf_" + "c" * 34)
    else:
        hub.role = "read"
    (text,) = problems(tmp_path, "hf://me/safe")
    said = {"none": "there is no hub token", "wrong": "does not accept this machine's token", "read": "may only read"}
    assert said[token] in text and text.endswith("configure_huggingface.sh with a token that may write")


def test_a_hub_out_of_reach_is_no_reason_to_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stage is gone here and nobody knows whether it is there: refused, with both ways on."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    settings = make_settings(tmp_path, mirror="hf://me/safe")
    with pytest.raises(Problems, match="the safety copy can't be read") as refused, open_stage(settings, fresh=False):
        pass
    assert "without SFT_MIRROR the stage would begin anew" in refused.value.problems[0]
    train(make_settings(tmp_path))
    with open_stage(settings, fresh=False) as stage:
        assert stage.decision == "complete"


@pytest.mark.parametrize(
    ("value", "said"), [("hf://safe", "write hf://USER/REPO"), ("s3://bucket/x", "write a folder, or hf://USER/REPO")]
)
def test_another_kind_of_place_is_refused(tmp_path: Path, value: str, said: str):
    """By name and with the two that there are."""
    with pytest.raises(Problems, match=said):
        make_settings(tmp_path, mirror=value)


def test_check_says_what_a_run_would_bring_back(stored: tuple[Path, Path], capsys):
    """It writes nothing, so the stage is still gone afterwards."""
    root, folder = stored
    shutil.rmtree(folder)
    plan = plan_stage(load_settings(1, env_dir=root, environ={}))
    assert f"{folder} is not here: a run restores it from the safety copy in {root / 'drive'}" in plan.notes
    assert not folder.exists()


def test_a_restored_stage_is_told_on_the_screen(stored: tuple[Path, Path], capsys):
    """With the notice of a complete stage after it."""
    root, folder = stored
    shutil.rmtree(folder)
    assert run_train("--stage", 1, "--env-dir", root) == 0
    printed = capsys.readouterr()
    assert f"Restored {folder} from the safety copy in {root / 'drive'}" in printed.out + printed.err
    assert "Training has already been completed" in printed.out + printed.err

"""A second place for what must not be lost: whole or not there, verified, and the same through a folder or the hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sft.storage.mirror import FolderMirror, HubMirror, Mirror, MirrorError, open_mirror
from sft.storage.seals import MARK, damage, seal
from tests.hub_stand_in import Hub, hub_here, point_at


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which this process takes for the hub."""
    with hub_here(monkeypatch) as server:
        yield server


@pytest.fixture(params=["folder", "hub"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> Mirror:
    """Both kinds of places."""
    if request.param == "folder":
        return FolderMirror(tmp_path / "drive" / "safe")
    request.getfixturevalue("hub")
    return HubMirror("me/safe")


def make_tree(folder: Path, *steps: int, status: str = "running") -> Path:
    """A stage's folder: manifest, metrics, a best model and sealed checkpoints."""
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        (checkpoint / "deep").mkdir(parents=True)
        (checkpoint / "adapter_model.safetensors").write_bytes(b"weights of %d" % step)
        (checkpoint / "deep" / "state").write_text("")
        seal(checkpoint)
    (folder / "best_model").mkdir(parents=True)
    (folder / "best_model" / "adapter_model.safetensors").write_bytes(b"best of %d" % max(steps))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n' * max(steps))
    (folder / "stage.json").write_text(f'{{"status": "{status}"}}')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Everything below the folder that is not empty or hidden, by name."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".")}


def test_what_was_stored_comes_back_byte_by_byte(mirror: Mirror, tmp_path: Path):
    """Checkpoints, best model, metrics and manifest; nothing is there before, nothing of another name."""
    assert not mirror.holds("out_stage1")
    tree = make_tree(tmp_path / "one", 2, 4)
    mirror.store("out_stage1", tree)
    assert mirror.holds("out_stage1") and not mirror.holds("out_stage")
    mirror.fetch("out_stage1", back := tmp_path / "back")
    assert content(back) == content(tree)
    assert damage(back / "checkpoint-4") == []


def test_checkpoints_that_are_gone_here_go_there_too(mirror: Mirror, tmp_path: Path):
    """SFT_SAVE_TOTAL_LIMIT holds for the copy as well; the newest manifest is the one that counts."""
    mirror.store("out_stage1", make_tree(tmp_path / "one", 2, 4))
    later = make_tree(tmp_path / "later", 4, 6, status="complete")
    assert not mirror.holds("out_stage1", like=later / "stage.json")
    mirror.store("out_stage1", later)
    assert mirror.holds("out_stage1", like=later / "stage.json")
    mirror.fetch("out_stage1", back := tmp_path / "back")
    assert content(back) == content(later)


def test_another_training_of_the_name_is_taken_aside_first(mirror: Mirror, tmp_path: Path):
    """And what nobody stored is nothing to take aside."""
    mirror.retire("out_stage1")
    mirror.store("out_stage1", make_tree(tmp_path / "one", 8))
    mirror.retire("out_stage1")
    assert not mirror.holds("out_stage1")
    mirror.store("out_stage1", new := make_tree(tmp_path / "new", 2))
    mirror.fetch("out_stage1", back := tmp_path / "back")
    assert content(back) == content(new)
    if isinstance(mirror, FolderMirror):
        (old,) = mirror.root.glob("out_stage1.old-*")
        assert (old / "checkpoint-8" / MARK).is_file()


def test_a_half_copied_checkpoint_is_left_out(tmp_path: Path):
    """One without its mark, and one whose copying was cut off before it had its name."""
    mirror = FolderMirror(tmp_path / "safe")
    mirror.store("out", make_tree(tmp_path / "one", 2, 4))
    stored = tmp_path / "safe" / "out"
    (stored / "checkpoint-4" / MARK).unlink()
    (stored / "checkpoint-6.partial-1").mkdir()
    (stored / "checkpoint-6.partial-1" / "adapter_model.safetensors").write_bytes(b"half")
    mirror.fetch("out", back := tmp_path / "back")
    assert {path.name for path in back.iterdir() if path.is_dir()} == {"best_model", "checkpoint-2"}


def test_a_copy_that_differs_from_its_seal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that writes something else than it was given."""
    monkeypatch.setattr("sft.storage.mirror.shutil.copyfile", lambda source, target: Path(target).write_bytes(b"else"))
    with pytest.raises(MirrorError, match="differs from what was sent"):
        FolderMirror(tmp_path / "safe").store("out", make_tree(tmp_path / "one", 2))
    assert not (tmp_path / "safe" / "out" / "checkpoint-2").exists()


def test_the_hub_gets_a_private_repository_and_one_commit_each_time(hub: Hub, tmp_path: Path):
    """A reader finds the tree as it was before or as it is now."""
    HubMirror("me/safe").store("out", make_tree(tmp_path / "one", 2))
    HubMirror("me/safe").store("out", make_tree(tmp_path / "two", 4))
    assert hub.private is True
    assert len(hub.commits) == 2
    assert "out/checkpoint-2/deep/state" not in hub.files


@pytest.mark.parametrize("how", ["refused", "unreachable"])
def test_a_hub_that_does_not_take_it_is_one_line(hub: Hub, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch):
    """Its own words, or those of the connection; never a library's traceback."""
    if how == "refused":
        hub.refuse = 403
    else:
        point_at("http://127.0.0.1:9", monkeypatch)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(MirrorError) as error:
        HubMirror("me/safe").store("out", make_tree(tmp_path / "one", 2))
    assert "\n" not in str(error.value) and len(str(error.value)) > 10


def test_a_setting_names_a_folder_or_a_repository():
    """hf://USER/REPO is the hub's, everything else a folder."""
    assert isinstance(open_mirror("hf://me/safe"), HubMirror)
    assert isinstance(open_mirror("drive/safe"), FolderMirror)

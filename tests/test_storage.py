"""Files and folders appear complete or not at all, and damage is found."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.storage import atomic, json_files, seals


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    """Folders on the way are made; the text is UTF-8 with plain line ends."""
    atomic.write_text(tmp_path / "deep" / "a.txt", "old")
    atomic.write_text(tmp_path / "deep" / "a.txt", "neu: ü\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"neu: \xc3\xbc\n"
    assert names(tmp_path / "deep") == ["a.txt"]


def test_json_is_indented_utf8_without_nan(tmp_path):
    """NaN and infinity, which other readers refuse, become null; paths and tuples become text and lists."""
    json_files.write_json(tmp_path / "a.json", {"é": float("nan"), "b": (1, float("inf")), "c": Path("x/y"), 3: True})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "é": null,\n  "b": [\n    1,\n    null\n  ],\n  "c": "x/y",\n  "3": true\n}\n'


def test_numpy_numbers_are_numbers_and_their_nan_is_null(tmp_path):
    """JSON has no NaN."""
    numpy = pytest.importorskip("numpy")
    json_files.write_json(tmp_path / "a.json", [numpy.float32(0.5), numpy.int64(3), numpy.float32("nan")])
    assert json.loads((tmp_path / "a.json").read_text()) == [0.5, 3, None]


def test_what_json_has_no_word_for_becomes_its_text():
    """Where a text is asked for: enumerations and types as well, and each string passes through it; sets are sorted."""
    value = {"kind": signal.SIGTERM.__class__, "set": {"b", "a"}, "path": Path("x"), "n": (1, None, True, float("nan"))}
    assert json_files.plain(value, str.upper) == {
        "kind": "<ENUM 'SIGNALS'>", "set": ["A", "B"], "path": "X", "n": [1, None, True, None],
    }  # fmt: skip
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_files.json_text(value)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_next(tmp_path, monkeypatch, call):
    """Wherever it fills up: in writing, in syncing, in naming."""
    atomic.write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(tmp_path / "a.txt", "x" * 100_000)
    monkeypatch.undo()
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_write_that_takes_only_part_goes_on(tmp_path, monkeypatch):
    """os.write may take fewer bytes than it is given; none are lost."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, bytes(content)[:7]))
    atomic.write_text(tmp_path / "a.txt", "abcdefghij" * 10)
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "abcdefghij" * 10


def test_read_json_names_the_damaged_file(tmp_path):
    """Half a document or bytes that are no text; a file that is not there is another error."""
    path = tmp_path / "stage.json"
    path.write_bytes(b'{"a": 1')
    with pytest.raises(json_files.DamagedFile, match=r"stage\.json: not readable as JSON"):
        json_files.read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(json_files.DamagedFile, match=r"stage\.json"):
        json_files.read_json(path)
    with pytest.raises(FileNotFoundError):
        json_files.read_json(tmp_path / "absent.json")


def test_appended_lines_survive_a_torn_last_one(tmp_path):
    """After a crash in the middle of a line the next record starts on its own line and the rest is still read."""
    path = tmp_path / "metrics.jsonl"
    json_files.append_line(path, '{"step": 1}')
    with path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    json_files.append_line(path, '{"step": 3}')
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n'
    assert json_files.read_records(path) == [{"step": 1}, {"step": 3}]
    assert json_files.read_records(tmp_path / "absent.jsonl") == []


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part_of_itself(tmp_path, monkeypatch):
    """Four bytes were written before the disk was full: they go again."""
    path = tmp_path / "metrics.jsonl"
    json_files.append_line(path, '{"step": 1}')
    real, calls = os.write, []

    def short_then_full(descriptor: int, content: bytes) -> int:
        calls.append(1)
        return real(descriptor, bytes(content)[:4]) if len(calls) == 1 else full_disk()

    monkeypatch.setattr(os, "write", short_then_full)
    with pytest.raises(OSError, match="No space"):
        json_files.append_line(path, '{"step": 2}')
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'


def test_a_published_folder_replaces_the_old_one_whole(tmp_path):
    """Nothing of the old content and no other name is left."""
    for content in ("first", "second"):
        with atomic.published_folder(tmp_path / "model") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / content).write_text(content)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model" / "sub") == ["second"]


def test_a_folder_replaced_by_a_killed_process_is_back_before_the_next_is_published(tmp_path):
    """A publication that fails after it leaves the old folder under its own name."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"model.replaced-{dead.pid}").mkdir()
    (tmp_path / f"model.replaced-{dead.pid}" / "a").write_text("good")
    with pytest.raises(RuntimeError, match="broke"), atomic.published_folder(tmp_path / "model"):
        raise RuntimeError("broke")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "good"


def test_a_folder_whose_making_fails_is_not_published(tmp_path):
    """The old one stays, the half one goes."""
    with atomic.published_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("good")
    with pytest.raises(RuntimeError, match="broke"), atomic.published_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("bad")
        raise RuntimeError("broke")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "good"


def test_a_full_disk_at_the_final_sync_leaves_the_old_folder(tmp_path, monkeypatch):
    """Nothing is renamed before it is safely written."""
    with atomic.published_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("good")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"), atomic.published_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("next")
    monkeypatch.undo()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "good"


PUBLISHER = """
import sys, time
from pathlib import Path
from sft.storage import atomic
if sys.argv[2] == "window":  # die between moving the old folder away and naming the finished one
    atomic.shutil.rmtree = lambda *_, **__: None
    atomic.sync = lambda path: None
    real = Path.rename
    def rename(path, target):
        if ".partial-" in path.name:
            print("ready", flush=True)
            time.sleep(60)
        return real(path, target)
    Path.rename = rename
with atomic.published_folder(Path(sys.argv[1])) as partial:
    (partial / "a").write_text("half")
    if sys.argv[2] == "filling":
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("moment", ["filling", "window"])
def test_a_process_killed_while_publishing_loses_nothing(tmp_path, moment):
    """Killed while it fills the folder, or between the two renames: the old one is (back) there."""
    with atomic.published_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("good")
    arguments = [sys.executable, "-c", PUBLISHER, str(tmp_path / "model"), moment]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout.readline() == "ready\n"
        assert atomic.clear_leftovers(tmp_path) == []  # its maker is alive
        process.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 2
    expected = {"filling": [f"model.partial-{process.pid}"]}
    expected["window"] = [f"model.partial-{process.pid}", f"model.replaced-{process.pid}"]
    assert atomic.clear_leftovers(tmp_path) == expected[moment]
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "good"


def test_leftovers_are_cleared_by_target_name_and_only_of_dead_processes_unless_alone(tmp_path):
    """out_stage1 is not out_stage10; what a person called .partial-final stays."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"out_stage1.partial-{dead.pid}").mkdir()
    (tmp_path / f"out_stage10.partial-{dead.pid}").mkdir()
    (tmp_path / f".stage.json.partial-{dead.pid}-4").write_text("half")
    (tmp_path / f"out_stage1.partial-{os.getpid()}").mkdir()
    (tmp_path / "notes.partial-final").mkdir()
    assert atomic.clear_leftovers(tmp_path, names=frozenset({"out_stage1"})) == [f"out_stage1.partial-{dead.pid}"]
    assert atomic.clear_leftovers(tmp_path) == [f".stage.json.partial-{dead.pid}-4", f"out_stage10.partial-{dead.pid}"]
    assert atomic.clear_leftovers(tmp_path, alone=True) == [f"out_stage1.partial-{os.getpid()}"]
    assert names(tmp_path) == ["notes.partial-final"]


def sealed_folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"0123456789")
    (path / "sub" / "state.json").write_bytes(b"{}")
    seals.seal(path)
    return path


def test_the_mark_lists_size_and_sha256_of_every_file(tmp_path):
    """Subfolders included; sealed means undamaged."""
    folder = sealed_folder(tmp_path / "checkpoint-5")
    assert json.loads((folder / "COMPLETE.json").read_text()) == {
        "model.safetensors": {"size": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()},
        "sub/state.json": {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
    }
    assert seals.is_sealed(folder)
    assert seals.damage(folder) == []


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"012345678"), ["model.safetensors: 9 bytes instead of 10"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"0123456788"), ["model.safetensors: content changed"]),
        (lambda f: (f / "sub" / "state.json").unlink(), ["sub/state.json: missing"]),
        (lambda f: (f / "COMPLETE.json").unlink(), ["COMPLETE.json: missing"]),
        (lambda f: os.truncate(f / "COMPLETE.json", 30), ["COMPLETE.json: unreadable"]),
        (lambda f: (f / "COMPLETE.json").write_text("[]"), ["COMPLETE.json: unreadable"]),
        (lambda f: (f / "COMPLETE.json").write_text('{"sub/state.json": {"size": 2}}'), ["COMPLETE.json: unreadable"]),
    ],
)
def test_damage_names_what_is_wrong(tmp_path, harm, found):
    """Each kind of harm with its file."""
    folder = sealed_folder(tmp_path / "checkpoint-5")
    harm(folder)
    assert seals.damage(folder) == found


def test_every_flipped_bit_and_every_truncation_of_a_sealed_folder_is_found(tmp_path):
    """All bits of all files, the mark included: 100 % found or the mark still proves every byte."""
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "m").write_bytes(b"0123456789")
    seals.seal(folder)
    unseen = []
    for path in (p for p in sorted(folder.rglob("*")) if p.is_file()):
        whole = path.read_bytes()
        for bit in range(len(whole) * 8):
            broken = bytearray(whole)
            broken[bit // 8] ^= 1 << bit % 8
            path.write_bytes(broken)
            if not seals.damage(folder):
                unseen.append((path.name, bit, chr(whole[bit // 8]), chr(broken[bit // 8])))
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            if not seals.damage(folder):
                unseen.append((path.name, "length", length))
        path.write_bytes(whole)
    # White space of the mark itself may change into other white space, and its last newline may go: no byte it
    # stands for is affected.
    assert {entry[0] for entry in unseen} <= {"COMPLETE.json"}
    assert all(entry[1] == "length" or (entry[2].isspace() and entry[3].isspace()) for entry in unseen)
    assert [entry[2] for entry in unseen if entry[1] == "length"] == [len((folder / "COMPLETE.json").read_bytes()) - 1]


def test_setting_aside_never_overwrites(tmp_path, monkeypatch):
    """Twice within a second gives a second name."""
    monkeypatch.setattr(atomic, "utc_stamp", lambda: "20250131T235959Z")
    for content in ("one", "two"):
        (tmp_path / "out_stage1").mkdir()
        (tmp_path / "out_stage1" / content).touch()
        atomic.set_aside(tmp_path / "out_stage1", "old")
    assert names(tmp_path) == ["out_stage1.old-20250131T235959Z", "out_stage1.old-20250131T235959Z-2"]
    assert names(tmp_path / "out_stage1.old-20250131T235959Z") == ["one"]


def test_a_removed_folder_is_gone_under_its_name_before_its_files_are(tmp_path, monkeypatch):
    """A kill halfway leaves a `.partial-` folder, which no reader takes for a checkpoint."""
    sealed_folder(tmp_path / "checkpoint-5")
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
    atomic.remove_folder(tmp_path / "checkpoint-5")
    assert names(tmp_path) == [f"checkpoint-5.partial-{os.getpid()}"]


def test_content_fingerprints_follow_content_and_names_only(tmp_path):
    """Times and the caches of `datasets` do not count, one byte of a file does."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"abc")
    assert seals.content_fingerprint(path) == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "part.arrow").write_bytes(b"abc")
    before = seals.content_fingerprint(folder)
    (folder / "cache-12ab.arrow").write_bytes(b"what datasets.map leaves")
    os.utime(folder / "part.arrow", (1, 1))
    assert seals.content_fingerprint(folder) == before
    line = f"part.arrow 3 {hashlib.sha256(b'abc').hexdigest()}\n"
    assert before == f"folder:{hashlib.sha256(line.encode()).hexdigest()}"
    (folder / "part.arrow").write_bytes(b"abd")
    assert seals.content_fingerprint(folder) != before


def test_free_bytes_of_a_place_that_does_not_exist_yet(tmp_path):
    """Those of the nearest folder that does."""
    assert abs(atomic.free_bytes(tmp_path / "a" / "b") - atomic.free_bytes(tmp_path)) < 1 << 30
    assert atomic.free_bytes(tmp_path) > 0


WRITER = """
import sys
from pathlib import Path
from sft.storage import atomic, json_files, seals
count = 0
while True:
    count += 1
    json_files.write_json(Path(sys.argv[1]) / "stage.json", {"count": count, "fill": "x" * 20000})
    with atomic.published_folder(Path(sys.argv[1]) / "model") as partial:
        for name in "abc":
            (partial / name).write_text(str(count))
        seals.seal(partial)
    if count == 2:
        print("ready", flush=True)
"""


def test_a_writer_killed_at_random_moments_leaves_whole_files_and_folders(tmp_path):
    """Ten kills: stage.json always parses, the folder always passes its seal and is of one generation."""
    for kill in range(10):
        arguments = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.003 * kill)
            process.kill()
        assert len(json_files.read_json(tmp_path / "stage.json")["fill"]) == 20000
        atomic.clear_leftovers(tmp_path)
        assert names(tmp_path) == ["model", "stage.json"]
        assert seals.damage(tmp_path / "model") == []
        assert len({(tmp_path / "model" / name).read_text() for name in "abc"}) == 1

"""One process tree per stage; no kill leaves a lock behind."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.errors import Problems
from sft.storage.lock import Holder, Lock, current_holder

ROOT = Path(__file__).parents[1]
HOLD = """
import os, sys, time
from pathlib import Path
from sft.storage.lock import Lock
Lock(Path(sys.argv[1])).acquire()
if sys.argv[2:] and os.fork() == 0:  # a data worker that lives on for so many seconds
    time.sleep(float(sys.argv[2]))
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def holder_process(path: Path, *arguments: str, code: str = HOLD) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_stage_and_a_killed_one_holds_nothing(tmp_path):
    """Process and host are named; after kill -9 the lock is free at once."""
    path = tmp_path / "out_stage1.lock"
    process = holder_process(path)
    holder = current_holder(path)
    assert (holder.pid, holder.host) == (process.pid, socket.gethostname())
    with pytest.raises(Problems) as refused:
        Lock(path).acquire()
    (problem,) = refused.value.problems
    assert problem.startswith(f"{tmp_path}/out_stage1: out_stage1 is in use by process {process.pid} on ")
    assert problem.endswith("; wait until it ends or stop it")
    process.kill()
    process.wait()
    assert current_holder(path) is None
    lock = Lock(path)
    lock.acquire()
    assert current_holder(path).pid == os.getpid()
    lock.release()
    assert current_holder(path) is None


def test_a_lock_can_be_taken_again_after_its_release_and_looking_at_it_writes_nothing(tmp_path):
    """Three times over; a second release is harmless."""
    path = tmp_path / "out_stage1.lock"
    assert current_holder(path) is None
    assert list(tmp_path.iterdir()) == []
    for _ in range(3):
        lock = Lock(path)
        lock.acquire()
        lock.release()
        lock.release()


def test_the_recorded_command_hides_credentials(tmp_path, monkeypatch):
    """What others read in the lock file has no password of an address."""
    monkeypatch.setattr(sys, "argv", ["/x/train.py", "--set", "MLFLOW_TRACKING_URI=https://me:secret@host/"])
    lock = Lock(tmp_path / "out_stage1.lock")
    lock.acquire()
    text = (tmp_path / "out_stage1.lock").read_text()
    lock.release()
    assert json.loads(text)["command"] == "train.py --set MLFLOW_TRACKING_URI=https://***@host/"


def test_children_of_a_killed_process_keep_its_stage_until_they_end(tmp_path):
    """A start right after a kill waits for the workers it left, and takes over when they are gone."""
    path = tmp_path / "out_stage1.lock"
    process = holder_process(path, "1.5")
    process.kill()
    process.wait()
    assert str(current_holder(path)).startswith(f"the children left by process {process.pid} on ")
    began = time.monotonic()
    lock = Lock(path)
    lock.acquire()
    lock.release()
    assert time.monotonic() - began > 0.6  # longer than the patience with a living holder


def test_a_forked_child_that_ends_does_not_give_the_lock_back(tmp_path):
    """A data worker shares the descriptor; its end is not the run's."""
    path = tmp_path / "out_stage1.lock"
    lock = Lock(path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert current_holder(path).pid == os.getpid()
    lock.release()


def race(path: Path, moment: float) -> int:
    """Fork a process that starts at the moment and ends with 0 when it got the lock, 1 when it was told who has it."""
    child = os.fork()
    if child:
        return child
    time.sleep(max(0.0, moment - time.time()))
    try:
        Lock(path).acquire()
    except Problems as refused:
        os._exit(1 if "is in use by process" in refused.problems[0] else 2)
    time.sleep(2)
    os._exit(0)


def test_of_two_starts_at_once_one_wins_and_the_other_is_told(tmp_path):
    """Fifty pairs, each on its own lock."""
    moment = time.time() + 1
    pairs = [[race(tmp_path / f"out{pair}_stage1.lock", moment) for _ in range(2)] for pair in range(50)]
    ends = [sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in pair) for pair in pairs]
    assert ends == [[0, 1]] * 50


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    """Exit 2 with the setting and the way out, not an OSError."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Problems, match=r"SFT_OUT_LORA_DIR: .*file can't be written .*; choose a folder"):
        Lock(tmp_path / "file" / "out_stage1.lock").acquire()


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def leave(path: Path, host: str, pid: int) -> Path:
    substitute = path.with_name(f"{path.name}.holder")
    substitute.write_text(json.dumps({"host": host, "pid": pid, "started": "20250131T235959Z", "command": "train.py"}))
    return substitute


def test_without_file_locks_a_file_names_the_holder(tmp_path, monkeypatch):
    """A file system without flock: the substitute refuses a second run and goes with the release."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "out_stage1.lock"
    lock = Lock(path)
    lock.acquire()
    assert lock.warning == f"{tmp_path} has no file locks: only out_stage1.lock.holder tells another run of this one"
    assert current_holder(path).pid == os.getpid()
    with pytest.raises(Problems, match=rf"in use by process {os.getpid()} on "):
        Lock(path).acquire()
    lock.release()
    assert current_holder(path) is None
    assert [each.name for each in tmp_path.iterdir()] == ["out_stage1.lock"]


def test_without_file_locks_a_dead_process_of_this_host_is_replaced_and_another_host_is_not(tmp_path, monkeypatch):
    """Whether a process of another host lives cannot be known: the file to remove is named."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "out_stage1.lock"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leave(path, socket.gethostname(), dead.pid)
    lock = Lock(path)
    lock.acquire()
    lock.release()
    substitute = leave(path, "elsewhere", dead.pid)
    with pytest.raises(Problems, match=rf"process {dead.pid} on elsewhere since .*remove {substitute}"):
        Lock(path).acquire()
    assert substitute.exists()


def test_a_holder_that_did_not_say_who_it_is(tmp_path):
    """Half a record is no reason to take the lock."""
    path = tmp_path / "out_stage1.lock"
    path.write_text("{half")
    with path.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert current_holder(path) == Holder()
        with pytest.raises(Problems, match="in use by another process; wait"):
            Lock(path).acquire()

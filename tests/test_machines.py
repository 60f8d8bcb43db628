"""Machines beside this one: the container file, the Slurm script with stand-ins for its commands, macOS, Windows."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sft.data.workers import in_order
from sft.planning.machine import no_gpu

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
BATCH = ROOT / "configs" / "slurm" / "stage.sbatch"


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions as words, continued lines joined."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    return [line.split() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def test_the_dockerfile_copies_what_is_there_and_what_the_package_needs():
    """Every source of COPY exists and reaches the build; what pyproject.toml and the wheel read is among them."""
    copied = {name for words in instructions() if words[0] == "COPY" for name in words[1:-1]}
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert copied & set(ignored) == set()
    assert {"README.md", "LICENSE", "pyproject.toml", "train.py", "sft", "official_content", "configs"} <= copied
    assert {f"stage{number}.env" for number in (1, 2, 3)} <= copied


def test_the_dockerfile_has_a_gpu_and_a_cpu_and_does_not_run_as_root():
    """One base for each, the compiler and Python.h that Triton needs, torch of the matching index, exec form."""
    words = instructions()
    assert words[0] == ["ARG", "DEVICE=gpu"]
    bases = [line[1:] for line in words if line[0] == "FROM"]
    assert [base[-1] for base in bases[:2]] == ["cpu-system", "gpu-system"]
    assert bases[1][0].startswith("nvidia/cuda:13.")
    assert bases[2] == ["${DEVICE}-system"]
    assert {"gcc", "python3-dev"} <= {
        word for line in words if line[:3] == ["RUN", "apt-get", "update"] for word in line
    }
    assert [line[1] for line in words if line[0] == "ENV"][:2] == ["TORCH_BUILD=cpu", "TORCH_BUILD=cu130"]
    assert [line for line in words if line[0] == "USER"] == [["USER", "sft"]]
    assert words[-2:] == [["ENTRYPOINT", '["staged-sft"]'], ["CMD", '["--check"]']]
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {line[0] for line in words} <= known


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Slurm's commands and accelerate as programs that write down what they were asked; the environment to use them."""
    programs = tmp_path / "programs"
    programs.mkdir()
    stand_in(
        programs, "scontrol", f'[ "$1" = show ] && printf "first\\nsecond\\n"; echo "scontrol $*" >> {tmp_path}/asked'
    )
    stand_in(programs, "scancel", f'echo "scancel $*" >> {tmp_path}/asked; kill -USR1 $(cat {tmp_path}/launcher)')
    stand_in(programs, "srun", 'shift; exec "$@"')
    launcher = f'echo $$ > {tmp_path}/launcher; echo "accelerate $*" >> {tmp_path}/asked; trap "exit 1" USR1; '
    stand_in(programs, "accelerate", launcher + "for try in $(seq $WAIT); do sleep 0.1; done; exit $ENDS_WITH")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "first,second", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "4"}
    return os.environ | slurm | {"PATH": f"{programs}:{os.environ['PATH']}", "WAIT": "0", "ENDS_WITH": "0"}


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("code", [0, 1])
def test_the_slurm_script_ends_as_the_run_ended(cluster: dict[str, str], tmp_path: Path, code: int):
    """One machine: DDP over its four GPUs; a run that is complete or failed is not queued again."""
    command = ["bash", BATCH, "--stage", "1", "--set", "SFT_LR=1e-4"]
    done = subprocess.run(command, cwd=ROOT, env=cluster | {"ENDS_WITH": str(code)}, timeout=30)
    assert done.returncode == code
    launch = "launch --config_file configs/accelerate/ddp.yaml --num_processes 4 train.py --stage 1 --set SFT_LR=1e-4"
    assert asked(tmp_path) == ["scontrol show hostnames first,second", f"accelerate {launch}"]


def test_the_slurm_script_starts_several_machines_together(cluster: dict[str, str], tmp_path: Path):
    """Two machines of four GPUs: ZeRO-3 over eight processes, each with its rank and the first one's name."""
    several = {"SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    subprocess.run(["bash", BATCH, "--stage", "all"], cwd=ROOT, env=cluster | several, timeout=30, check=True)
    assert asked(tmp_path)[1] == (
        "accelerate launch --machine_rank 1 --config_file configs/accelerate/multinode_zero3.yaml --num_processes 8 "
        "--num_machines 2 --main_process_ip first --main_process_port 29500 train.py --stage all"
    )


def test_the_slurm_script_is_queued_again_when_its_time_is_nearly_over(cluster: dict[str, str], tmp_path: Path):
    """SIGUSR1 reaches the launcher, whose end is waited for; then the job is queued again and ends well."""
    script = subprocess.Popen(
        ["bash", BATCH, "--stage", "1"], cwd=ROOT, env=cluster | {"WAIT": "200", "ENDS_WITH": "5"}
    )
    end = time.monotonic() + 20
    while not (tmp_path / "launcher").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)  # the trap of the stand-in stands
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=20) == 0
    assert asked(tmp_path)[2:] == ["scancel --signal=USR1 7", "scontrol requeue 7"]


def test_a_launch_file_that_is_not_there_is_named(cluster: dict[str, str], tmp_path: Path):
    """Submitted from another folder: exit 2 before anything is started."""
    done = subprocess.run(["bash", BATCH], cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "LAUNCH=configs/accelerate/ddp.yaml: no such file" in done.stderr


def test_windows_is_refused_in_one_line_that_names_wsl():
    """At the first import of ours, before one that Windows lacks (fcntl) fails."""
    script = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; import sft.cli"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n"), "WSL" in done.stderr) == (2, 1, True)


def test_macos_trains_on_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch):
    """Apple's GPU is named and left alone; rows are prepared without a fork, in this very process."""
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert "Apple's GPU (MPS) is left alone" in no_gpu(torch).text
    monkeypatch.setattr("sys.platform", "darwin")
    assert set(in_order(lambda _: os.getpid(), [1, 2, 3], processes=2)) == {os.getpid()}

"""The Makefile: what each target installs, and that the suite leaves GPUs alone."""

import importlib
import os
import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest

ROOT = Path(__file__).resolve().parents[1]


def dry(*targets: str) -> str:
    """What make would do for the targets on a fresh machine."""
    command = ["make", "--dry-run", "--always-make", *targets]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_install_needs_no_compiler_and_no_cuda_toolkit():
    """Neither DeepSpeed, whose setup.py wants nvcc where there is a GPU, nor llama.cpp is part of it."""
    for target in ("install", "demo", "check"):
        assert "-e '.[dev,gpu]'" in dry(target)
        assert not re.search(r"\.\[(deepspeed|bench)\]", dry(target)), target


def test_deepspeed_is_built_as_on_a_machine_without_a_gpu():
    """DS_ACCELERATOR=cpu keeps its setup.py from looking for CUDA_HOME; the suite has it, llama.cpp it has not."""
    (line,) = [line for line in dry("test").splitlines() if "[deepspeed]" in line]
    assert line.startswith("DS_ACCELERATOR=cpu ")
    assert "[bench]" not in dry("test")
    assert "[bench]" in dry("install-bench")


def test_gpu_metrics_need_no_gpu_at_install_time():
    """MLflow's GPU monitor imports pynvml, which DeepSpeed's setup.py would add beside a visible GPU alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "nvidia-ml-py" in project["dependencies"]
    importlib.import_module("pynvml")


@pytest.mark.parametrize(("asked", "runs"), [(False, [True, False]), (True, [False, True])])
def test_tests_for_a_gpu_run_when_they_are_asked_for_and_then_alone(asked, runs, monkeypatch):
    """The others are equalities on a CPU, and mocks of machines. There are tests for a GPU."""
    monkeypatch.setattr(conftest, "GPU_TESTS", asked)
    skipped: list[list[Any]] = [[], []]
    items: Any = [
        SimpleNamespace(get_closest_marker=lambda name, gpu=gpu: gpu, add_marker=skipped[gpu].append) for gpu in (0, 1)
    ]
    conftest.pytest_collection_modifyitems(items)
    assert [not marks for marks in skipped] == runs
    assert "pytestmark = pytest.mark.gpu" in (ROOT / "tests" / "test_on_gpu.py").read_text(encoding="utf-8")


def test_the_suite_sees_no_gpu():
    """Equalities are those of float32 on the CPU, and two processes start on a machine with one GPU."""
    import torch

    assert os.environ.get("STAGED_TEST_GPU") == "1" or torch.cuda.device_count() == 0
    assert os.environ.get("STAGED_TEST_GPU") == "1" or os.environ["CUDA_VISIBLE_DEVICES"] == ""

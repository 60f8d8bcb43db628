"""What only a GPU can tell, in tiny shapes (STAGED_TEST_GPU=1 make test); `python -m benchmarks.gpu` has real ones."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.job import Job
from sft.planning.machine import devices
from tests.tiny import metric_lines, write_model, write_rows, write_stage

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda")


class Small(Job):
    """Tiny shapes on the GPU, in the number format and within the bounds of the real ones."""

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def size(self, real: Any, tiny: Any) -> Any:
        return real if isinstance(real, str) else tiny


def test_there_is_a_gpu_and_nothing_broken():
    """What --check says of it: driver, kernels for the card, compiler and Python.h."""
    assert torch.cuda.is_available()
    assert [finding.text for finding in devices() if finding.state == "broken"] == []


@pytest.mark.parametrize("name", ["attention", "head", "experts"])
def test_the_kernels_give_what_float32_gives(name: str, tmp_path: Path):
    """Attention over joined rows, the output head, products in groups: every way this card has."""
    job = Small(name, tmp_path, time.monotonic() + 1000)
    getattr(importlib.import_module(f"benchmarks.gpu.{program.ITEMS[name].module}"), name)(job)
    judged = [line for line in job.lines if line["what"].endswith("difference") and "target" in line]
    assert len(judged) >= 2
    assert [line for line in judged if not line["met"]] == []


def trained(folder: Path, base: Path, rows: Path, name: str, *, visible: bool, **settings: object) -> Path:
    """Four steps in a process of its own, on the GPU or with all of them hidden."""
    common = {"SFT_BASE_MODEL": base, "SFT_OUT_LORA_DIR": folder / name, "SFT_DATASET_ID": rows, "SFT_MAX_STEPS": 4}
    write_stage(folder, 1, common | {"SFT_GEN_EVAL": "structured", "SFT_GEN_MAX_NEW_TOKENS": 8} | settings)
    command = [sys.executable, ROOT / "train.py", "--stage", "1", "--env-dir", folder]
    hidden = {} if visible else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / f"{name}_stage1"


@pytest.mark.parametrize(
    ("settings", "near"),
    [
        ({"SFT_DTYPE": "float32"}, 1e-3), ({}, 0.02), ({"SFT_DTYPE": "float16"}, 0.02), ({"SFT_LOAD_IN_4BIT": 1}, 0.1),
        ({"SFT_USE_LORA": 0}, 0.02), ({"SFT_GRADIENT_CHECKPOINTING": 1}, 0.02), ({"SFT_MICRO_BATCH_TOKENS": 0}, 0.02),
    ],
    ids=["float32", "auto", "float16", "4bit", "full", "checkpointing", "as-configured"],
)  # fmt: skip
def test_a_stage_trains_as_on_a_cpu(tmp_path: Path, settings: dict[str, object], near: float):
    """The losses of float32 on a CPU, as near as the number format goes; answers are made and scored."""
    base, rows = write_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 24)
    full = {name: value for name, value in settings.items() if name == "SFT_USE_LORA"}
    exact = trained(tmp_path, base, rows, "cpu", visible=False, **full)
    found = trained(tmp_path, base, rows, "gpu", visible=True, **settings)
    assert metric_lines(found, "loss") == pytest.approx(metric_lines(exact, "loss"), rel=near)
    assert metric_lines(found, "gen_score")

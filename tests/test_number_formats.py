"""Number formats: what the hardware has, adapters and trained weights in float32."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from benchmarks.gpu.job import Job
from benchmarks.gpu.steps import in_float16, settings_of, trainer_of
from sft.errors import RunFailed
from sft.models.model import compute_dtype, load_model, weight_dtype
from sft.programs.benchmark import random_model
from sft.programs.benchmark_shapes import model_config
from tests.tiny import run_train, write_model, write_rows, write_stage


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU that computes bfloat16 itself, or, like a T4, only in emulation."""

    def see(*, bfloat16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
        )

    return see


@pytest.mark.parametrize(
    ("bfloat16", "adapter", "computed", "kept"),
    [
        (True, True, torch.bfloat16, torch.bfloat16),
        (True, False, torch.bfloat16, torch.float32),
        (False, True, torch.float16, torch.float16),
        (False, False, torch.float32, torch.float32),
    ],
)
def test_a_gpu_computes_in_what_it_has(
    bfloat16: bool, adapter: bool, computed: Any, kept: Any, gpu: Any, make_settings: Any
):
    """No bfloat16 in emulation; weights that are trained are float32, and never float16 in auto."""
    gpu(bfloat16=bfloat16)
    settings = make_settings(use_lora=adapter)
    assert (compute_dtype(settings), weight_dtype(settings)) == (computed, kept)


def test_a_cpu_computes_in_float32(make_settings: Any):
    """Unless the person says otherwise."""
    assert compute_dtype(make_settings()) == torch.float32
    assert compute_dtype(make_settings(dtype="bfloat16")) == torch.bfloat16


def test_deepspeed_is_left_to_keep_its_own_copy(make_settings: Any, monkeypatch: pytest.MonkeyPatch):
    """Weights in the compute type, as its configuration says."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert weight_dtype(make_settings(dtype="bfloat16", use_lora=False)) == torch.bfloat16


def test_weights_that_are_trained_are_loaded_in_float32(tmp_path: Path, make_settings: Any):
    """Those below an adapter in the compute type."""
    base = write_model(tmp_path / "base")
    for adapter, kept in ((True, torch.bfloat16), (False, torch.float32)):
        assert load_model(base, make_settings(dtype="bfloat16", use_lora=adapter)).dtype == kept


def half_trained(folder: Path, scale: float) -> Any:
    """A tiny model in float16 on the CPU, where the Trainer refuses it and torch does not; from this loss scale."""
    job = Job("formats", folder, time.monotonic() + 1000, rehearse=True)
    settings = settings_of(job, "tiny", dtype="bfloat16", max_steps=25, grad_accum=1)
    trainer = trainer_of(job, random_model(model_config("tiny"), torch.float16), settings, length=16)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return job, trainer


def test_float16_whose_first_steps_overflow_trains_on(tmp_path: Path):
    """The Trainer's own steps: those that overflow are skipped and logged without a norm, the scale is found."""
    job, trainer = half_trained(tmp_path, 2.0**24)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    with in_float16(job, trainer):
        trainer.train()
    after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    assert trainer.accelerator.scaler.get_scale() < 2.0**23
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.isfinite().all() for p in after)


def test_float16_that_overflows_at_every_scale_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After twenty steps in a row, before anything is saved."""
    job, trainer = half_trained(tmp_path, 2.0**24)
    monkeypatch.setattr(trainer.train_dataset, "named", lambda row, tokenizer: f"row {row}")
    broken = trainer.token_losses
    monkeypatch.setattr(trainer, "token_losses", lambda *step: broken(*step) * float("inf"))
    with in_float16(job, trainer), pytest.raises(RunFailed, match=r"not finite at step 20 "):
        trainer.train()


def test_deepspeeds_own_scaler_may_overflow_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It says that the norm is infinite and has skipped the step; accelerate has no scaler beside it. In bfloat16, and
    after twenty steps in a row, such a norm ends the run."""
    job, trainer = half_trained(tmp_path, 1.0)
    trainer.accelerator.scaler = None
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scale=65536.0))
    monkeypatch.setattr(SFTTrainer, "_get_grad_norm", lambda self, model, grad_norm=None: grad_norm)
    with pytest.raises(RunFailed):
        trainer._get_grad_norm(engine, grad_norm=float("inf"))
    with in_float16(job, trainer):
        assert [trainer._get_grad_norm(engine, grad_norm=float("inf")) for _ in range(19)] == [None] * 19
        with pytest.raises(RunFailed):
            trainer._get_grad_norm(engine, grad_norm=float("inf"))
        assert trainer._get_grad_norm(engine, grad_norm=2.0) == 2.0


def test_losses_are_summed_in_float32_whatever_the_model_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """1,001 tokens with a loss of 1 each: bfloat16 knows 1,000 and 1,008."""
    _, trainer = half_trained(tmp_path, 1.0)
    monkeypatch.setattr(trainer, "token_losses", lambda *step: torch.ones(1001, dtype=torch.bfloat16))
    batch = {"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1, 2), "row_lengths": [2]}
    assert trainer.compute_loss(None, batch, num_items_in_batch=1).item() == 1001


@pytest.mark.slow
def test_nearly_every_weight_moves_in_full_fine_tuning_under_bfloat16(tmp_path: Path):
    """At 2e-5, where 91.5 % of bfloat16 weights stayed where they were."""
    base, rows = write_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 24)
    common = {"SFT_BASE_MODEL": base, "SFT_OUT_LORA_DIR": tmp_path / "out", "SFT_DATASET_ID": rows, "SFT_USE_LORA": 0}
    write_stage(
        tmp_path, 1, common | {"SFT_DTYPE": "bfloat16", "SFT_LR": "2e-5", "SFT_MAX_STEPS": 4, "SFT_WARMUP_RATIO": 0}
    )
    assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out_stage1").state_dict()
    names = [name for name in before if "layers" in name and before[name].ndim == 2]
    moved = sum(int((after[name] != before[name]).sum()) for name in names)
    assert moved > 0.99 * sum(before[name].numel() for name in names)


@pytest.mark.slow
def test_the_adapter_of_a_quantised_stage_is_float32(tmp_path: Path):
    """Every saved tensor, also under bfloat16; TRL has them in bfloat16."""
    base, rows = write_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 24)
    common = {"SFT_BASE_MODEL": base, "SFT_OUT_LORA_DIR": tmp_path / "out", "SFT_DATASET_ID": rows}
    write_stage(tmp_path, 1, common | {"SFT_LOAD_IN_4BIT": 1, "SFT_DTYPE": "bfloat16", "SFT_MAX_STEPS": 2})
    assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
    tensors = load_file(tmp_path / "out_stage1" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

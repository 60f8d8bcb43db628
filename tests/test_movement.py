"""A part of an adapter that is 0.0 at save although it was trained ends the stage; others may stay 0.0."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer

from sft.errors import RunFailed
from sft.training.movement import GradientRows, require_moved
from tests import launching, lossy_save, tiny

NAME = "base_model.model.layers.{}.{}.lora_B.weight"


def written(folder: Path, changes: dict[str, slice]) -> Path:
    """Three matrices of 8 rows, those rows of them 0.0."""
    tensors = {NAME.format(layer, "q_proj"): torch.ones(8, 2) for layer in range(3)}
    for name, rows in changes.items():
        tensors[name][rows] = 0.0
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def gradients(value: float, rate: float = 1e-3, rows: int = 8, left_out: bool = False) -> dict[str, torch.Tensor]:
    """What is seen in a step in which every lora_B has this gradient, under names as DDP and PEFT have them, or which
    float16's loss scaler leaves out then."""
    watch = GradientRows()
    model = torch.nn.ParameterDict()
    named = [(f"module.{NAME.format(n, 'q_proj')}".replace(".weight", ".default.weight"), n) for n in range(3)]
    parameters = [(name, torch.nn.Parameter(torch.zeros(rows, 2))) for name, _ in named]
    for _, parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)
    model.named_parameters = lambda: iter(parameters)  # type: ignore[method-assign]
    optimizer = SimpleNamespace(param_groups=[{"lr": rate}])
    watch.on_step_begin(None, None, None, optimizer=optimizer)
    watch.on_pre_optimizer_step(None, None, None, model=model, optimizer=optimizer)
    if left_out:
        watch.left_out()
    return watch.rows


FIRST = NAME.format(0, "q_proj")


def test_a_whole_matrix_that_had_a_gradient_and_is_zero_is_refused(tmp_path: Path):
    """One of three; the message names it."""
    folder = written(tmp_path, {FIRST: slice(None)})
    with pytest.raises(RunFailed, match=rf"^{FIRST}: all rows are exactly 0.0 after step 5, although"):
        require_moved(folder, gradients(1.0), step=5, ranks=1)


def test_a_ranks_share_that_had_a_gradient_and_is_zero_is_refused(tmp_path: Path):
    """Rows 4 to 7 of two ranks; one process has no shares, and other rows of 0.0 are no share."""
    folder = written(tmp_path, {FIRST: slice(4, None)})
    with pytest.raises(RunFailed, match=r"rows 4 to 7 of 8 are exactly 0.0"):
        require_moved(folder, gradients(1.0), step=5, ranks=2)
    require_moved(folder, gradients(1.0), step=5, ranks=1)
    require_moved(written(tmp_path, {FIRST: slice(3, 7)}), gradients(1.0), step=5, ranks=2)


@pytest.mark.parametrize(
    "seen",
    [{}, gradients(0.0), gradients(float("nan")), gradients(1.0, rate=0.0), gradients(1.0, left_out=True)],
    ids=["none", "zero", "nan", "rate", "left-out"],
)
def test_a_matrix_without_a_gradient_may_stay_zero(tmp_path: Path, seen: dict[str, torch.Tensor]):
    """Unrouted experts, layers nothing passes through, a scaler's skipped step, the first step of a warm-up."""
    require_moved(written(tmp_path, {FIRST: slice(None)}), seen, step=5, ranks=1)
    require_moved(written(tmp_path, {FIRST: slice(4, None)}), seen, step=5, ranks=2)


def test_one_shares_pattern_in_most_matrices_is_refused_without_gradients(tmp_path: Path):
    """As FSDP2 wrote it: 1 / 4 of the rows of every lora_B is not 0.0, and no rank saw the others' gradients."""
    folder = written(tmp_path, {NAME.format(layer, "q_proj"): slice(2, None) for layer in range(3)})
    for seen in ({}, gradients(1.0, rows=2)):
        with pytest.raises(RunFailed, match=r"rows 2 to 3 of 8 .* as is a rank's share in 3 of 3 matrices"):
            require_moved(folder, seen, step=5, ranks=4)


def test_few_steps_and_whole_models_are_not_judged(tmp_path: Path):
    """Three steps say little; where there is no adapter file there is nothing to look at."""
    require_moved(tmp_path, gradients(1.0), step=5, ranks=1)
    require_moved(written(tmp_path, {FIRST: slice(None)}), gradients(1.0), step=3, ranks=1)


def stage(folder: Path, **settings: object) -> list[object]:
    common = {
        "SFT_BASE_MODEL": tiny.write_model(folder / "base"),
        "SFT_OUT_LORA_DIR": folder / "out",
        "SFT_DATASET_ID": tiny.write_rows(folder / "rows.jsonl", 20),
        "SFT_MAX_STEPS": 5,
    }
    tiny.write_stage(folder, 1, common | settings)
    return ["--stage", "1", "--env-dir", folder]


@pytest.mark.slow
def test_deepspeed_s_gradients_are_seen_as_they_arise(tmp_path: Path):
    """One whole lora_B is written as zeros by two processes under ZeRO-2: no pattern over ranks, but it was trained."""
    launching.need_deepspeed()
    script = Path(__file__).with_name("lossy_save.py")
    code, shown = launching.run("zero2", tmp_path / "two", *stage(tmp_path), script=script)
    assert code == 1
    assert (
        "up_proj.lora_B.weight: rows 0 to 31 of 64 are exactly 0.0 after step 4, although they had a gradient" in shown
    ), shown


def test_a_stage_whose_save_lost_a_matrix_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The library writes zeros in place of one lora_B: exit 1 at the fourth step, no result; without it 0."""
    arguments = stage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", lossy_save.lossy(Trainer._save))
        assert tiny.run_train(*arguments) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "up_proj.lora_B.weight: all rows are exactly 0.0 after step 4" in shown, shown
    out = tmp_path / "out_stage1"
    assert json.loads((out / "stage.json").read_text())["status"] == "failed"
    assert not (out / "adapter_model.safetensors").exists()
    assert tiny.run_train(*arguments, "--fresh") == 0

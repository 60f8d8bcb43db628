"""What must not change a result: evaluating, decoding answers, the number of data workers, the rhythm of saving."""

import json
from pathlib import Path

import pytest

from sft.storage.seals import sha256
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "base")
    write_rows(folder / "rows.jsonl", 40)
    return folder


def adapter_of(inputs: Path, folder: Path, **settings: object) -> str:
    """The sha256 of the adapter that these settings give."""
    folder.mkdir()
    common = {
        "SFT_BASE_MODEL": inputs / "base", "SFT_OUT_LORA_DIR": folder / "out",
        "SFT_DATASET_ID": inputs / "rows.jsonl", "SFT_LORA_DROPOUT": 0.1, "SFT_MAX_STEPS": 7,
    }  # fmt: skip
    write_stage(folder, 1, common | settings)
    assert run_train("--stage", 1, "--env-dir", folder) == 0
    return sha256(folder / "out_stage1" / "adapter_model.safetensors")


def test_evaluation_saving_and_workers_leave_the_adapter_bit_identical(inputs: Path, tmp_path: Path):
    """With dropout on, so that every random number that is drawn elsewhere would show."""
    reference = adapter_of(inputs, tmp_path / "plain", SFT_EVAL_STEPS=100, SFT_SAVE_STEPS=100)
    variants = {
        "generating": {"SFT_GEN_EVAL": "structured", "SFT_GEN_EVAL_SAMPLES": 3, "SFT_GEN_MAX_NEW_TOKENS": 6,
                       "SFT_EVAL_STEPS": 2, "SFT_SAVE_STEPS": 3},
        "workers": {"SFT_DATALOADER_WORKERS": 2, "SFT_EVAL_STEPS": 3},
    }  # fmt: skip
    for name, settings in variants.items():
        assert adapter_of(inputs, tmp_path / name, **settings) == reference, name
    assert adapter_of(inputs, tmp_path / "seed", SFT_SEED=1, SFT_EVAL_STEPS=100) != reference


def test_the_best_model_is_kept_whenever_an_evaluation_improves(inputs: Path, tmp_path: Path):
    """Evaluating every 2 steps and saving every 5: best_model is of the step with the lowest evaluation loss."""
    adapter_of(inputs, tmp_path / "best", SFT_EVAL_STEPS=2, SFT_SAVE_STEPS=5)
    folder = tmp_path / "best" / "out_stage1"
    record = json.loads((folder / "best_model" / "best_model_info.json").read_text())
    losses = metric_lines(folder, "eval_loss")[1:]  # steps 2, 4, 6, 7; step 0 is no candidate
    assert record["best_metric_name"] == "eval_loss"
    assert record["best_metric"] == min(losses)
    assert record["step"] == (2, 4, 6, 7)[losses.index(min(losses))]


def test_the_published_masked_loss_draws_once_and_ours_anew(inputs: Path, tmp_path: Path):
    """json_edge on structured answers: three ways to mask give three adapters; the manifest counts the edges."""
    settings = {"SFT_MASKED_LOSS": "inverse_frequency", "SFT_MASKED_LOSS_UNIT": "json_edge", "SFT_EVAL_STEPS": 100}
    found = {
        name: adapter_of(inputs, tmp_path / name, **settings, **{key: name})
        for key, name in (
            ("SFT_MASKED_LOSS_REDRAW", "epoch"),
            ("SFT_MASKED_LOSS_REDRAW", "once"),
            ("SFT_MASKED_LOSS_MODE", "weight"),
        )
    }
    assert len(set(found.values())) == 3
    manifest = json.loads((tmp_path / "epoch" / "out_stage1" / "stage.json").read_text())
    # 36 rows of {"name": ..., "size": ...}: two keys and two values each, every size another.
    assert manifest["masked_loss"]["units"] == 36 * 4
    assert manifest["masked_loss"]["distinct_units"] == 2 + 5 + 36

"""Every shipped env file is read by the settings without a problem and says what its document says."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from sft.settings import load_settings

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"
FILES = sorted(RECIPES.glob("*/stage*.env"))


def stage_number(path: Path) -> int:
    return int(path.stem.removeprefix("stage"))


def read(path: Path):
    return load_settings(stage_number(path), env_dir=path.parent, environ={})


def test_the_recipes_of_the_contract_are_shipped():
    """Contract section 9 names eight recipes; the StructEval one has three stages."""
    assert {path.parent.name for path in FILES} == {
        "structeval_qwen3_4b",
        "offender_qwen3_30b_a3b",
        "ontology_mistral_7b",
        "socratic_gemma2_2b",
        "instruct_llama2_7b",
        "instruct_llama2_70b_4bit",
        "smollm2_135m",
        "debug_gpt2",
    }
    assert [path.name for path in FILES if path.parent.name == "structeval_qwen3_4b"] == [
        "stage1.env",
        "stage2.env",
        "stage3.env",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_env_file_loads(path):
    """No unknown name, no bad value: load_settings raises Problems otherwise."""
    settings = read(path)
    assert settings.stage == stage_number(path)
    assert settings.sources


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_env_file_says_only_what_differs_from_the_default(path, tmp_path):
    """A line that repeats a default hides what a recipe is about."""
    (tmp_path / "stage1.env").write_text("SFT_BASE_MODEL=m\nSFT_OUT_LORA_DIR=o\nSFT_DATASET_ID=d\n", encoding="utf-8")
    defaults = load_settings(1, env_dir=tmp_path, environ={}).record()
    repeated = [
        name
        for name, entry in read(path).record().items()
        if entry["origin"].startswith("stage") and entry["value"] == defaults[name]["value"]
    ]
    assert repeated == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_stages_of_a_ladder_share_base_and_output(folder):
    """A ladder is one base model and one output name."""
    for before, after in pairwise(read(path) for path in FILES if path.parent == folder):
        assert (before.base_model, before.out_lora_dir) == (after.base_model, after.out_lora_dir)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_says_what_machine_it_is_meant_for(path):
    """The first stage of a ladder names the machine in its opening comment."""
    if stage_number(path) == 1:
        assert re.search(r"^# .*\bMeant for\b", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_offender_recipe_has_the_numbers_of_document_001():
    """26,221 positives x 3 and 96,000 negatives: 174,663 rows, 1.5 epochs, global batch 64 on 4 GPUs, 4,094 steps."""
    settings = read(RECIPES / "offender_qwen3_30b_a3b" / "stage1.env")
    positives, negatives = settings.sources
    assert (positives.repeat, positives.limit) == (3.0, None)
    assert (negatives.repeat, negatives.limit) == (1.0, 96000)
    total = 26221 * 3 + 96000
    assert total == settings.dataset_mix_total_size == 174663
    assert positives.weight / (positives.weight + negatives.weight) * total == pytest.approx(78663, abs=1e-6)
    assert settings.per_device_train_bs * settings.grad_accum * 4 == 64
    assert -(-total * 1.5 // 64) == 4094
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout, settings.max_seq_len) == (16, 32, 0.0, 1536)
    assert (settings.lr, settings.min_lr_ratio, settings.warmup_ratio, settings.epochs) == (2e-4, 0.05, 0.03, 1.5)
    assert (settings.eval_steps, settings.save_steps, settings.save_total_limit) == (200, 200, 3)
    assert settings.gen_eval == "extraction"
    assert {"gate_proj", "up_proj", "down_proj"} < set(settings.lora_target_modules)


def test_structeval_recipe_has_the_values_of_document_000():
    """Rank 8 / 8 / default, 1e-4 then 5e-5 then 2e-5, 1,500 steps in the first stage, mixes 1 : 2 and 1 : 1.5."""
    stages = [read(RECIPES / "structeval_qwen3_4b" / f"stage{number}.env") for number in (1, 2, 3)]
    assert [stage.lr for stage in stages] == [1e-4, 5e-5, 2e-5]
    assert [stage.lora_r for stage in stages] == [8, 8, 16]
    assert [stage.max_steps for stage in stages] == [1500, -1, -1]
    assert [[source.weight for source in stage.sources] for stage in stages] == [[1.0], [1.0, 2.0], [1.0, 1.5]]
    assert stages[1].upsample_rules == {"text_to_toml": 3.0, "toml_to_yaml": 2.0}
    assert {(stage.lora_alpha, stage.max_seq_len, stage.epochs) for stage in stages} == {(32, 2048, 1.0)}

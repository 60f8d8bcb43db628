"""The ontology recipe has the values of document 003 and of its second stage."""

from pathlib import Path

import pytest

from sft.settings import load_settings

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "recipes" / "ontology_mistral_7b"
BOTH = {
    "base_model": "mistralai/Mistral-7B-Instruct-v0.2",
    "chat_template": "mistral",
    "masked_loss": "inverse_frequency",
    "masked_loss_unit": "path_edge",
    "masked_loss_redraw": "epoch",
    "masked_loss_mode": "sample",
    "lora_dropout": 0.0,
    "lora_target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "per_device_train_bs": 8,
    "grad_accum": 1,
    "lr_scheduler": "constant_with_warmup",
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": "1",
    "max_seq_len": 2048,
    "overlong": "drop",
    "seed": 0,
    "num_proc": 16,
    "gen_eval": "structured",
    "num_generate_samples": 5,
}
STAGES = {
    1: {
        "lora_r": 32, "lora_alpha": 16, "lr": 1e-5, "epochs": 2.0, "warmup_steps": 100, "group_by_length": True,
        "logging_steps": 50, "eval_steps": 500, "save_steps": 500,
    },
    2: {
        "lora_r": 8, "lora_alpha": 8, "lr": 3e-6, "epochs": 3.0, "warmup_steps": 10, "group_by_length": False,
        "logging_steps": 32, "eval_steps": 32, "save_steps": 32,
    },
}  # fmt: skip
FILES = {
    1: ("out/linearised_datasets/wikipedia", None, 1024),
    2: ("out/linearised_datasets/arxiv", 2048, 256),
}


@pytest.mark.parametrize("stage", [1, 2])
def test_values_of_the_document(stage):
    """Every value of the document's tables, defaults included, so that a changed default shows up here."""
    settings = load_settings(stage, env_dir=RECIPE, environ={})
    wanted = BOTH | STAGES[stage]
    assert {name: getattr(settings, name) for name in wanted} == wanted


@pytest.mark.parametrize("stage", [1, 2])
def test_files_and_limits_of_the_document(stage):
    """All of Wikipedia with 1,024 rows to evaluate on; 2,048 and 256 rows of arXiv."""
    settings = load_settings(stage, env_dir=RECIPE, environ={})
    folder, limit, eval_limit = FILES[stage]
    assert [(source.id, source.limit) for source in settings.sources] == [(f"{folder}/train_dataset.jsonl", limit)]
    assert [(source.id, source.limit) for source in settings.eval_sources] == [
        (f"{folder}/eval_dataset.jsonl", eval_limit)
    ]

"""Every recipe with a tiny stand-in of its architecture: `--check`, then two steps, with template and quantisation."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import chat_template_utils

from sft.settings import load_settings
from tests.tiny import run_train, tokenizer

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"
TEMPLATES = Path(chat_template_utils.__file__).parent / "chat_templates"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Recipe -> model type, what its configuration needs beside SMALL, chat template of the real model (None: the recipe's).
STAND_INS: dict[str, tuple[str, dict[str, object], str | None]] = {
    "structeval_qwen3_4b": ("qwen3", {"intermediate_size": 64}, "qwen3_instruct_2507.jinja"),
    "offender_qwen3_30b_a3b": ("qwen3_moe", {"intermediate_size": 64, **EXPERTS}, "qwen3_instruct_2507.jinja"),
    "ontology_mistral_7b": ("mistral", {"intermediate_size": 64, "sliding_window": None}, None),
    "socratic_gemma2_2b": ("gemma2", {"intermediate_size": 64}, "gemma.jinja"),
    "instruct_llama2_7b": ("llama", {"intermediate_size": 64}, None),
    "instruct_llama2_70b_4bit": ("llama", {"intermediate_size": 64}, None),
    "smollm2_135m": ("llama", {"intermediate_size": 64, "tie_word_embeddings": True}, "qwen2_5.jinja"),
    "debug_gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024}, None),
}


def stand_in(folder: Path, recipe: str) -> Path:
    """A random model of the recipe's type with two layers, and a tokenizer with the real model's template."""
    kind, more, template = STAND_INS[recipe]
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"], "bos_token": "<s>"})
    sizes = more if kind == "gpt2" else SMALL | more
    config = AutoConfig.for_model(
        kind, vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    found = TEMPLATES / template if template else None
    if found is not None and found.is_file():
        words.chat_template = found.read_text(encoding="utf-8")
    words.save_pretrained(folder)
    return folder


def rows(recipe: str, number: int) -> dict[str, object]:
    """One row in the shape of the recipe's data."""
    if recipe == "ontology_mistral_7b":
        paths = [["topics", "colors", f"color {number % 3}"], ["topics", "sizes"]]
        return {"id": str(number), "title": f"name {number}", "abstract": "the size and the color", "paths": paths}
    if recipe == "offender_qwen3_30b_a3b":
        person = {"name": f"name {number}", "is_real": True, "is_offender": True, "act": "size"}
        found = {"persons": [person] if number % 2 else [], "occured_locations": [], "police_departments": []}
        said = f"the name is {number}" * (1 + number % 4)  # prompts of unequal length in one batch
        return {"instruction": "Write JSON", "input": said, "output": json.dumps(found)}
    if recipe in ("instruct_llama2_7b", "instruct_llama2_70b_4bit", "debug_gpt2"):
        return {"instruction": f"Write the color {number}", "input": "", "output": f"blue {number}"}
    answer = f"Approach:\n1. is\n\nOutput:\nname = {number}"
    user, role = f"Write this as TOML: the name is {number}", "assistant"
    if recipe == "socratic_gemma2_2b":
        user, role, answer = f"幸せとは何か {number}", "model", f"それは何だろうか {number}"
    messages = [{"role": "user", "content": user}, {"role": role, "content": answer}]
    return {"messages": messages, "subcategory": "text_to_toml"}


def overrides(recipe: str, number: int, folder: Path, model: Path) -> list[str]:
    """What points the recipe at local things and makes it short; everything else stays as it is shipped."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(rows(recipe, n)) + "\n" for n in range(24)), encoding="utf-8")
    settings = load_settings(number, env_dir=RECIPES / recipe, environ={})
    values: dict[str, object] = {
        "SFT_BASE_MODEL": model, "SFT_OUT_LORA_DIR": folder / "out", "SFT_MAX_STEPS": 2, "SFT_LOGGING_STEPS": 1,
        "SFT_GRAD_ACCUM": 1, "SFT_PER_DEVICE_TRAIN_BS": 2, "SFT_GEN_EVAL_SAMPLES": 2, "SFT_GEN_MAX_NEW_TOKENS": 4,
        "SFT_REPORT_TO": "none", "SFT_LORA_R": min(settings.lora_r, 8), "SFT_DATASET_MIX_TOTAL_SIZE": -1,
    }  # fmt: skip
    if settings.origins["SFT_DATASET_MIX"] == "default":
        values["SFT_DATASET_ID"] = path
    else:
        local = [
            {"id": str(path), "weight": source.weight, "repeat": source.repeat, "limit": source.limit}
            for source in settings.sources
        ]
        values["SFT_DATASET_MIX"] = json.dumps([{k: v for k, v in each.items() if v is not None} for each in local])
    if settings.eval_dataset:
        values["SFT_EVAL_DATASET"] = ""
        values["SFT_VAL_RATIO"] = 0.2
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@pytest.mark.parametrize("recipe", sorted(STAND_INS))
def test_a_recipe_checks_and_trains_two_steps(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Exit code 0 from --check and from every stage; what the check announces is what the stage trains."""
    model = stand_in(tmp_path / "model", recipe)
    for stage in sorted((RECIPES / recipe).glob("stage*.env")):
        number = int(stage.stem.removeprefix("stage"))
        arguments = ["--stage", number, "--env-dir", RECIPES / recipe, *overrides(recipe, number, tmp_path, model)]
        capsys.readouterr()
        assert run_train(*arguments, "--check", "--json") == 0, capsys.readouterr()
        document = json.loads(capsys.readouterr().out)
        assert run_train(*arguments) == 0, capsys.readouterr()
        manifest = json.loads((tmp_path / f"out_stage{number}" / "stage.json").read_text())
        assert (document["train_rows"], document["val_rows"]) == (manifest["train_rows"], manifest["val_rows"])
        assert document["steps"]["total"] == manifest["steps"] == 2
        assert document["tokens"] == manifest["tokens"]


def test_no_recipe_is_left_out():
    """A new recipe needs a stand-in."""
    assert {path.name for path in RECIPES.iterdir()} == set(STAND_INS)

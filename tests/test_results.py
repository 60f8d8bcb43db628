"""What a stage leaves: the result beside its configuration, each file whole or not there."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments

from sft.storage import seals
from sft.training.results import (
    best_model_record,
    parameter_counts,
    published_together,
    training_config,
    write_result,
)

WEIGHTS = "adapter_model.safetensors"
SAVED = {WEIGHTS: "new weights", "adapter_config.json": "{}", "tokenizer.json": "words"}


def save_model(folder: str, *, _internal_call: bool) -> None:
    """As the trainer does, with what nobody wants."""
    assert _internal_call
    for name, text in (SAVED | {"training_args.bin": "a pickle", "README.md": "a card"}).items():
        Path(folder, name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_result_is_what_was_saved_and_its_configuration(tmp_path: Path):
    """No pickle, no model card, nothing of the folders it was written in."""
    write_result(tmp_path, save_model, {"model_name": "owner/tiny"}, main=True)
    config = '{\n  "model_name": "owner/tiny"\n}\n'
    assert contents(tmp_path) == SAVED | {"training_config.json": config}
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_an_earlier_result_stands_until_the_new_one_is_whole(tmp_path: Path):
    """A disk that fills up while the weights are written costs nothing that was there, and half a file nobody sees."""
    (tmp_path / WEIGHTS).write_text("old weights")

    def full(folder: str, **_: Any) -> None:
        Path(folder, WEIGHTS).write_text("new wei")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_result(tmp_path, full, {}, main=True)
    assert contents(tmp_path) == {WEIGHTS: "old weights"}
    write_result(tmp_path, save_model, {}, main=True)
    assert (tmp_path / WEIGHTS).read_text() == "new weights"


def test_whoever_finds_the_weights_finds_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They get their name last, whatever order the folder is read in."""
    order: list[str] = []
    replace = Path.replace

    def noted(path: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    write_result(tmp_path, save_model, {}, main=True)
    moved = [name for name in order if name in SAVED]
    assert (set(moved), len(moved), moved[-1]) == (set(SAVED), 3, WEIGHTS)


def test_a_published_folder_appears_when_all_is_written_and_carries_its_checksums(tmp_path: Path):
    """Until then what was there before; what a killed process left is not taken along."""
    target = tmp_path / "best_model"
    target.mkdir()
    (target / WEIGHTS).write_text("old weights")
    (tmp_path / ".saving" / "best_model").mkdir(parents=True)
    (tmp_path / ".saving" / "best_model" / "left.txt").touch()
    with published_together(target, main=True, sealed=True) as folder:
        save_model(str(folder), _internal_call=True)
        assert contents(target) == {WEIGHTS: "old weights"}
    assert {path.name for path in target.iterdir()} == {*SAVED, seals.MARK}
    assert seals.damage(target) == []
    assert [path.name for path in tmp_path.iterdir()] == ["best_model"]


def adapted(dtype: torch.dtype = torch.bfloat16) -> Any:
    model = torch.nn.Linear(3, 2, dtype=dtype)
    model.peft_config = {"default": LoraConfig(r=4, target_modules=["up", "down"])}  # type: ignore[assignment]
    return model


def test_the_configuration_has_four_keys_and_no_token(tmp_path: Path, make_settings: Callable[..., Any]):
    """Not the hub's under its name, nor one inside an address; numbers of tokens are none."""
    secret = "hf_" + "abcdefghij" * 3
    args = TrainingArguments(str(tmp_path), use_cpu=True, hub_token=secret, run_name="http://user:geheim@host/")
    config = training_config(make_settings(load_in_4bit=True), args, adapted())
    assert list(config) == ["model_name", "training_args", "lora_config", "bnb_config"]
    assert config["model_name"] == "owner/tiny"
    assert (config["lora_config"]["r"], config["lora_config"]["target_modules"]) == (4, ["down", "up"])
    assert config["bnb_config"] == {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    said = config["training_args"]
    assert (said["num_train_epochs"], said["include_num_input_tokens_seen"]) == (3.0, "no")
    assert "hub_token" not in said
    assert json.loads(json.dumps(config)) == config
    assert secret not in str(config)
    assert "geheim" not in str(config)


def test_a_stage_without_adapter_has_no_lora_config(tmp_path: Path, make_settings: Callable[..., Any]):
    """The key stays, its value is null."""
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert training_config(make_settings(), args, torch.nn.Linear(3, 2))["lora_config"] is None


def test_the_best_model_says_what_it_was_chosen_by():
    """Its perplexity besides, where validation rows were measured."""
    record = best_model_record({"eval_perplexity": 3.5, "eval_loss": 1.25}, "gen_score", 0.5, 40)
    assert record == {
        "best_metric": 0.5,
        "best_metric_name": "gen_score",
        "best_model_checkpoint": "checkpoint-40",
        "best_perplexity": 3.5,
        "step": 40,
    }
    assert best_model_record({}, "gen_score", 0.5, 40)["best_perplexity"] is None


def test_parameters_are_counted_by_whether_they_are_trained():
    """3 x 2 weights are frozen, 2 biases are not; under ZeRO-3 the number stands beside an empty parameter."""
    model = torch.nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    assert parameter_counts(model) == (2, 8)
    split = SimpleNamespace(ds_numel=100, requires_grad=True, numel=lambda: 0)
    assert parameter_counts(SimpleNamespace(parameters=lambda: [split, *model.parameters()])) == (102, 108)  # type: ignore[arg-type]

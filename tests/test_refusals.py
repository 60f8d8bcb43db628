"""What can be known before the first step is exit code 2, in a run and in --check, in the same words."""

import json
import re
import zipfile
from typing import get_args

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from sft.errors import Problems
from sft.models.model import cut_away
from sft.planning import refusals
from sft.planning.machine import Finding
from sft.planning.refusals import cache_problems, file_problems, question_problems, unwritable, weight_problems
from sft.settings.values import Optimizer
from tests.architectures import CONFIGS, tiny_model
from tests.ladders import make_settings
from tests.tiny import run_train, write_model, write_rows, write_stage


def test_a_gpu_that_torch_does_not_see_ends_run_and_check(tmp_path, monkeypatch, capsys):
    """Training does not fall to the CPU: exit 2 with the remedy, nothing written."""
    common = {"SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_OUT_LORA_DIR": tmp_path / "out"}
    write_stage(tmp_path, 1, common | {"SFT_DATASET_ID": write_rows(tmp_path / "rows.jsonl", 24)})
    unseen = Finding("GPU", "broken", "driver 535.104.05 is too old", "update the driver to 580 or newer")
    monkeypatch.setattr("sft.planning.machine.devices", lambda: iter([unseen]))
    for arguments in ((), ("--check",)):
        assert run_train("--stage", 1, "--env-dir", tmp_path, *arguments) == 2
        assert unseen.text in capsys.readouterr().err
    assert not (tmp_path / "out_stage1").exists()


@pytest.fixture
def weights(tmp_path):
    """A folder with one whole file of weights."""
    save_file({"a": torch.zeros(64, 64), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("cut", "said"),
    [(1, "is cut off: "), (8_000, "is cut off: "), (-1, "is too long: ")],
)  # fmt: skip
def test_a_file_of_another_length_than_its_header_says(weights, cut, said):
    """An interrupted copy: found by the length alone, in no time whatever the size."""
    path = weights / "model.safetensors"
    assert list(file_problems(weights)) == []
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - cut)
    (problem,) = file_problems(weights)
    assert problem.startswith(f"SFT_BASE_MODEL={weights}: model.safetensors {said}{size - cut:,} bytes of {size:,};")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is cut off at 0 bytes"),
        (b"\0" * 5, "is cut off at 5 bytes"),
        (b"<html>not found</html>", "is cut off at 22"),
        (b"version https:// git-lfs", "is a Git LFS pointer and no weights: run git lfs pull there"),
        ((2).to_bytes(8, "little") + b"[]", "its header can't be read"),
        ((4).to_bytes(8, "little") + b"{\xff\xff}", "its header can't be read"),
    ],
)
def test_a_file_that_holds_no_weights(tmp_path, content, said):
    """Each kind of content with what is wrong about it."""
    (tmp_path / "model.safetensors").write_bytes(content)
    (problem,) = file_problems(tmp_path)
    assert said in problem


def test_a_shard_that_is_not_there(weights):
    """The index names two files, one is missing."""
    index = {"weight_map": {"a": "model.safetensors", "c": "model-00002-of-00002.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(file_problems(weights)) == [
        f"SFT_BASE_MODEL={weights}: model-00002-of-00002.safetensors is missing; copy or download the model again"
    ]


def test_a_torch_archive_that_is_cut_off(tmp_path):
    """Half of a zip archive; the whole one is no problem."""
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"0" * 1000)
    assert list(file_problems(tmp_path)) == []
    path.write_bytes(path.read_bytes()[:500])
    assert "pytorch_model.bin is cut off" in next(file_problems(tmp_path))


def read_only(monkeypatch, *folders):
    """These folders and all below them can't be written, whoever asks."""
    allowed = refusals.os.access
    denied = {str(folder) for folder in folders}
    monkeypatch.setattr(
        refusals.os,
        "access",
        lambda path, mode: not any(str(path).startswith(f) for f in denied) and allowed(path, mode),
    )


def test_a_cache_of_rows_that_cannot_be_written_names_the_setting(tmp_path, monkeypatch):
    """Not there yet, below a read-only folder, or there itself."""
    shared = tmp_path / "shared"
    shared.mkdir()
    settings = make_settings(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", shared / "datasets" / "more")
    assert list(cache_problems(settings)) == []
    read_only(monkeypatch, shared)
    (problem,) = cache_problems(settings)
    assert problem.startswith(f"HF_DATASETS_CACHE={shared}/datasets/more: ")
    assert problem.endswith("set HF_DATASETS_CACHE to a folder that can")
    assert unwritable(shared / "a" / "b") == shared


def test_a_hub_cache_that_cannot_be_written_matters_where_the_model_is_not_in_it(tmp_path, monkeypatch):
    """A folder, or a model that was loaded before, needs no writing."""
    hub = tmp_path / "hub"
    hub.mkdir()
    monkeypatch.setattr(refusals.constants, "HF_HUB_CACHE", str(hub))
    read_only(monkeypatch, hub)
    assert list(cache_problems(make_settings(tmp_path))) == []  # a folder
    remote = make_settings(tmp_path, base_model="org/model")
    (problem,) = cache_problems(remote)
    assert problem.startswith(f"HF_HUB_CACHE={hub}: does not hold org/model and can't be written;")
    monkeypatch.setattr(refusals, "try_to_load_from_cache", lambda *name, **revision: "there")
    assert list(cache_problems(remote)) == []


def test_missing_questions_are_found_before_anything_is_written(tmp_path):
    """Only where answers are generated at all."""
    settings = make_settings(tmp_path, gen_eval="structured", gen_eval_dataset="nowhere.jsonl")
    assert list(question_problems(settings)) == ["SFT_GEN_EVAL_DATASET=nowhere.jsonl: there is no file nowhere.jsonl"]
    assert list(question_problems(make_settings(tmp_path, gen_eval_dataset="nowhere.jsonl"))) == []


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_an_optimizer_is_taken_exactly_where_the_trainer_can_make_it(tmp_path, name):
    """transformers looks for the package only when the model is loaded; every name is asked of both."""
    try:
        make_settings(tmp_path, optim=name)
        taken = True
    except Problems as problems:
        assert re.search(rf"SFT_OPTIM={name}: .* needs [\w-]+, which is not installed; pip install ", str(problems))
        taken = False
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to=[])
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(2, 2))
        made = True
    except (ImportError, ValueError) as error:
        made = "need to pass a `model`" in str(error)
    assert taken == made


@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attention_needs_its_package(tmp_path, monkeypatch, version):
    """Neither the package nor the library that fetches kernels from the hub: one line with the command."""
    monkeypatch.setattr("sft.settings.values.find_spec", lambda name: None)
    with pytest.raises(Problems, match="is not installed; pip install flash-attn"):
        make_settings(tmp_path, attn=f"flash_attention_{version}")
    monkeypatch.setattr("sft.settings.values.find_spec", lambda name: object())
    assert make_settings(tmp_path, attn=f"flash_attention_{version}").attn == f"flash_attention_{version}"


def test_weights_that_belong_to_no_part_of_the_model_are_left_alone():
    """A layer more or a bias is a model cut by its config.json; a head, a tower and layers for
    guessing ahead are not."""
    config = Qwen3Config(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    more = [f"model.layers.{number}.mlp.up_proj.weight" for number in (1, 2)]
    others = ["score.weight", "vision_tower.layers.0.mlp.up.weight", "v_head.bias", "mtp.0.proj.weight"]
    assert cut_away(others, model) == ""
    assert "leaves out model.layers.1.mlp.up_proj.weight and 1 more of its files" in cut_away(more, model)
    assert "layers.1.mlp.up_proj.weight" in cut_away(["layers.1.mlp.up_proj.weight"], model)
    assert "q_proj.bias" in cut_away(["model.layers.0.self_attn.q_proj.bias"], model)
    model.config.num_nextn_predict_layers = 1
    assert cut_away(more, model) == ""


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_files_of_every_architecture_fit_it(tmp_path, kind):
    """What transformers itself writes is no cut model, nor is a tied head that is stored all the same."""
    settings = make_settings(tmp_path)
    tiny_model(kind).save_pretrained(tmp_path / "base")
    assert list(weight_problems(tmp_path / "base", settings)) == []
    tied = tiny_model(kind, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    head = tied.get_output_embeddings().weight.detach().clone()
    save_file(stored | {"lm_head.weight": head}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert list(weight_problems(tmp_path / "base", settings)) == []

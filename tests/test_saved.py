"""Modules trained in full beside the adapter: named, kept exact, counted, merged, resumed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig, Trainer

from sft.models.model import keep_adapters_exact, load_config, load_model
from sft.models.saved import saved_in_full
from sft.models.targets import adapter_config, adapter_problems
from sft.planning.memory import parameter_bytes
from sft.programs.export import export, find_origin
from tests import tiny
from tests.launching import ROOT, run
from tests.stops import before

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SMALL = {"intermediate_size": 48, "num_key_value_heads": 2, **SIZES}
CONFIGS = {
    "tied": Qwen3Config(head_dim=8, tie_word_embeddings=True, **SMALL),
    "untied": LlamaConfig(tie_word_embeddings=False, **SMALL),
    "mixture": Qwen3MoeConfig(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **SMALL),
}


def built(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).to(dtype)


def said(kind: str, make_settings: Any, saved: str, **values: Any) -> list[str]:
    settings = make_settings(lora_modules_to_save=tuple(saved.split(",")), **values)
    return adapter_problems(built(kind), settings)


@pytest.mark.parametrize(
    ("saved", "values", "text"),
    [
        ("lm_haed", {}, "LlamaForCausalLM has no lm_haed (did you mean lm_head?); it has down_proj, embed_tokens, "),
        ("lm_head,zzz", {}, "SFT_LORA_MODULES_TO_SAVE=lm_head,zzz: LlamaForCausalLM has no zzz; it has down_proj"),
        ("mlp", {}, "mlp can't be trained in full in LlamaForCausalLM; choose among down_proj, embed_tokens"),
        ("k_proj", {}, "k_proj is among SFT_LORA_TARGET_MODULES as well; leave it out of one of the two"),
        ("k_proj", {"lora_target_modules": ("q_proj",), "load_in_4bit": True}, "k_proj is quantised and can't be"),
        ("k_proj", {"lora_target_modules": ("q_proj",), "load_in_8bit": True}, "choose among embed_tokens, input_lay"),
        ("embed_token", {}, "LlamaForCausalLM has no embed_token (did you mean embed_tokens?)"),
    ],
)
def test_names_that_do_not_fit_are_refused_with_those_that_do(saved: str, values: Any, text: str, make_settings: Any):
    """One problem each, with the reason and the names there are."""
    (problem,) = said("untied", make_settings, saved, **values)
    assert text in problem


def test_what_fits_is_no_problem(make_settings: Any):
    """Heads, embeddings and norms, quantised or not; routers; a linear layer that all-linear then leaves alone."""
    for quantised in ({}, {"load_in_4bit": True}, {"load_in_8bit": True}):
        assert said("untied", make_settings, "lm_head,embed_tokens,norm", **quantised) == []
    assert said("mixture", make_settings, "mlp.gate") == []
    assert said("mixture", make_settings, "experts")[0].startswith("SFT_LORA_MODULES_TO_SAVE=experts: experts can't be")
    assert said("untied", make_settings, "o_proj", lora_target_modules=("all-linear",)) == []


def test_a_tied_embedding_that_is_a_target_is_refused_whichever_of_the_two_is_saved(make_settings: Any):
    """Both are one matrix, which can't be trained in full and carry an adapter."""
    (problem,) = said("tied", make_settings, "lm_head", lora_target_modules=("q_proj", "embed_tokens"))
    assert "embed_tokens is among SFT_LORA_TARGET_MODULES as well" in problem


def trained_names(kind: str, make_settings: Any, saved: str, **values: Any) -> set[str]:
    model = built(kind)
    settings = make_settings(lora_modules_to_save=tuple(saved.split(",")), **values)
    adapted = get_peft_model(model, adapter_config(model, settings))
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }


def test_only_what_is_named_is_trained_in_full(make_settings: Any):
    """PEFT alone would take every module whose name ends with "norm": all five kinds of them."""
    assert trained_names("untied", make_settings, "norm") == {"model.norm.weight"}
    layers = {f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)}
    assert trained_names("untied", make_settings, "input_layernorm,lm_head") == layers | {"lm_head.weight"}
    gates = {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert trained_names("mixture", make_settings, "mlp.gate") == gates
    o_proj = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)}
    assert trained_names("untied", make_settings, "o_proj", lora_target_modules=("all-linear",)) == o_proj


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens", "lm_head,embed_tokens"])
def test_tied_weights_are_trained_as_the_one_matrix_they_are(saved: str, make_settings: Any):
    """Whichever is named: one parameter, which head and embedding share."""
    assert trained_names("tied", make_settings, saved) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("kind", ["untied", "mixture"])
def test_saved_modules_are_float32_inside_a_bfloat16_model(kind: str, make_settings: Any):
    """The same logits as before training with or without autocast (0.01: bfloat16's own noise); nothing is shared with
    the original, so that disabling the adapter gives the base back after the weights have moved."""
    model = built(kind, torch.bfloat16)
    ids = torch.arange(20).reshape(2, 10)
    before = model(ids).logits
    saved = ("lm_head", "embed_tokens", "norm", "input_layernorm", *(("gate",) if kind == "mixture" else ()))
    settings = make_settings(lora_modules_to_save=saved, lora_target_modules=("q_proj",))
    adapted = get_peft_model(model, adapter_config(model, settings))
    keep_adapters_exact(adapted)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    torch.testing.assert_close(adapted(ids).logits, before, rtol=0, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(adapted(ids).logits, before, rtol=0, atol=0.01)
    for parameter in trained:
        parameter.data += 1.0
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(ids).logits, before, rtol=0, atol=0)


def test_memory_counts_them_in_float32(tmp_path: Path, make_settings: Any):
    """Beside 2 bytes a weight of the frozen original: 4 for the copy and as many for its gradient, 8 for AdamW."""
    built("untied", torch.bfloat16).save_pretrained(tmp_path / "base")
    plain = make_settings(dtype="bfloat16").model_copy(update={"base_model": str(tmp_path / "base")})
    more = plain.model_copy(update={"lora_modules_to_save": ("lm_head", "norm")})
    without, beside = (parameter_bytes(load_config(each), each) for each in (plain, more))
    assert beside.frozen == without.frozen
    assert beside.trained_count - without.trained_count == 96 * 32 + 32
    assert beside.trained - without.trained == 4 * (96 * 32 + 32)


def test_quantised_weights_are_not_what_saved_modules_begin_as(tmp_path: Path, make_settings: Any):
    """Head and embedding stay unquantised and begin as they were, bit for bit, though TRL casts them to bfloat16."""
    built("untied").save_pretrained(tmp_path / "base")
    settings = make_settings(load_in_4bit=True, lora_modules_to_save=("lm_head", "embed_tokens"))
    model = load_model(tmp_path / "base", settings)
    adapted = get_peft_model(model, adapter_config(model, settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    keep_adapters_exact(adapted)
    for name, (trained, _) in saved_in_full(adapted).items():
        expected = built("untied").get_submodule(name.removeprefix("base_model.model.")).weight
        assert torch.equal(trained.weight, expected), name


def ladder(folder: Path, stages: dict[int, dict[str, object]]) -> Path:
    common = {
        "SFT_BASE_MODEL": tiny.write_model(folder / "base"),
        "SFT_OUT_LORA_DIR": folder / "out",
        "SFT_DATASET_ID": tiny.write_rows(folder / "rows.jsonl", 40),
        "SFT_MAX_STEPS": 5,
    }
    for number, settings in stages.items():
        tiny.write_stage(folder, number, common | settings)
    return folder


STAGES = {
    1: {"SFT_LORA_MODULES_TO_SAVE": "lm_head,norm"},
    2: {"SFT_LORA_MODULES_TO_SAVE": "input_layernorm", "SFT_LORA_TARGET_MODULES": "q_proj,embed_tokens"},
    3: {"SFT_LORA_MODULES_TO_SAVE": "embed_tokens"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages on a tied model; the second changes the embedding alone, so that the third's base is untied."""
    folder = ladder(tmp_path_factory.mktemp("saved"), STAGES)
    assert tiny.run_train("--stage", "all", "--env-dir", folder) == 0
    return folder


def peft_merged(folder: Path, stages: int) -> dict[str, torch.Tensor]:
    """PEFT's own merge, one stage after the other; head and embedding parted before the second, which trained the
    embedding alone: PEFT would add its update to both."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    for stage in range(1, stages + 1):
        if stage == 2:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model = PeftModel.from_pretrained(model, folder / f"out_stage{stage}").merge_and_unload()
    return model.state_dict()


@pytest.mark.parametrize(("stages", "tied"), [(1, True), (2, False)])
def test_the_merge_is_pefts_bit_for_bit(trained: Path, stages: int, tied: bool):
    """One stage: the pair stays tied, one tensor in the file. Two: parted, since only the embedding moved on."""
    merged = trained / f"out_stage{stages + 1}_merged_base"
    loaded = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    expected = peft_merged(trained, stages)
    assert loaded.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) is not tied


def test_export_holds_all_three_stages(trained: Path, tmp_path: Path):
    """export_model.py's folder answers with PEFT's weights; best_model/ is an adapter of the same kind."""
    export(find_origin(trained / "out_stage3"), tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    expected = peft_merged(trained, 3)
    assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []
    best = load_file(trained / "out_stage3" / "best_model" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.weight" in best


class Killed(BaseException):
    """Ends a run where it stands."""


def kill() -> None:
    raise Killed


def test_a_resumed_run_ends_with_the_same_bits(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed in the fourth step and gone on from checkpoint-2: the adapter file of the run that was not killed."""
    arguments = ["--stage", "1", "--env-dir", trained, "--set", f"SFT_OUT_LORA_DIR={tmp_path / 'out'}"]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        step = "sft.training.trainer.StagedTrainer.compute_loss"
        before(patched, step, kill, lambda trainer, *a, **k: trainer.state.global_step == 3)
        tiny.run_train(*arguments)
    assert not (tmp_path / "out_stage1" / "adapter_model.safetensors").exists()
    assert tiny.run_train(*arguments) == 0
    first, again = (root / "out_stage1" / "adapter_model.safetensors" for root in (trained, tmp_path))
    assert first.read_bytes() == again.read_bytes()


def test_a_stage_whose_save_left_the_base_in_place_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The library writes the base's head where the trained one belongs: exit 1."""
    folder = ladder(tmp_path, {1: STAGES[1]})
    base = load_file(folder / "base" / "model.safetensors")["model.embed_tokens.weight"]
    save = Trainer._save

    def lossy(self, output_dir=None, state_dict=None):
        save(self, output_dir, state_dict)
        path = Path(output_dir) / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"base_model.model.model.embed_tokens.weight": base.clone()}, path)

    monkeypatch.setattr(Trainer, "_save", lossy)
    assert tiny.run_train("--stage", "1", "--env-dir", folder) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "embed_tokens.weight: all rows are exactly what they were at first after step 4" in shown, shown


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"SFT_LORA_MODULES_TO_SAVE": "lm_haed"}, "SFT_LORA_MODULES_TO_SAVE=lm_haed: Qwen3ForCausalLM has no lm_haed"),
        ({"SFT_LORA_MODULES_TO_SAVE": "q_proj", "SFT_LOAD_IN_4BIT": 1}, "q_proj is quantised and can't be trained in"),
        ({"SFT_LORA_MODULES_TO_SAVE": "lm_head", "SFT_USE_LORA": 0}, "SFT_USE_LORA=0 trains every module in full"),
    ],
)
def test_check_and_run_refuse_in_the_same_words(
    tmp_path: Path, settings: dict[str, object], text: str, capsys: pytest.CaptureFixture[str]
):
    """Exit 2 from both, nothing written."""
    folder = ladder(tmp_path, {1: settings})
    errors = []
    for options in (["--check"], []):
        assert tiny.run_train("--stage", "1", "--env-dir", folder, *options) == 2
        errors.append([line for line in capsys.readouterr().err.splitlines() if "MODULES_TO_SAVE" in line])
    assert errors[0] == errors[1]
    assert text in errors[0][0]
    assert not (folder / "out_stage1").exists()


def assert_same_adapter(one: Path, other: Path) -> None:
    """To 1e-4: sums run in another order."""
    first, second = (load_file(root / "out_stage1" / "adapter_model.safetensors") for root in (one, other))
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4


def together(kind: str, folder: Path, out: Path, **options: Any) -> tuple[int, str]:
    """Stage 1 by two processes, half of the accumulation each."""
    sets = ["--set", f"SFT_OUT_LORA_DIR={out / 'out'}", "--set", "SFT_GRAD_ACCUM=1"]
    return run(kind, out / "mark", "--stage", "1", "--env-dir", folder, *sets, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_two_processes_train_them_as_one_does(kind: str, trained: Path, tmp_path: Path):
    """A norm, and a head that is tied to its embedding."""
    code, shown = together(kind, trained, tmp_path)
    assert code == 0, shown
    assert_same_adapter(trained, tmp_path)


@pytest.mark.slow
def test_fsdp_trains_them_but_for_a_tied_pair(trained: Path, tmp_path: Path):
    """FSDP2 ends in an error where it ties the pair anew: refused before that; a norm is trained as by one process."""
    code, shown = together("fsdp", trained, tmp_path)
    assert code == 1
    assert "which FSDP tears apart once they are trained in full" in " ".join(shown.split())
    folder = ladder(tmp_path, {1: {"SFT_LORA_MODULES_TO_SAVE": "norm"}})
    assert tiny.run_train("--stage", "1", "--env-dir", folder) == 0
    (tmp_path / "split").mkdir()
    code, shown = together("fsdp", folder, tmp_path / "split", script=ROOT / "tests" / "fsdp_on_cpu.py")
    assert code == 0, shown
    assert_same_adapter(folder, tmp_path / "split")

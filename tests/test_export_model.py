"""export_model.py: the whole lineage of a stage, verified, with tokenizer and card; mistakes named before any merge."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from sft.errors import Problems
from sft.evaluation.answers import Answer
from sft.merging.probe import store_probe
from sft.programs.command_line import run_program
from sft.programs.export import check_repository
from sft.stages.fingerprints import model_fingerprint
from sft.stages.lineage import result_sha256
from sft.stages.manifest import blank_manifest
from sft.stages.paths import PROBE

PROGRAM = Path(__file__).resolve().parents[1] / "official_content" / "export_model.py"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 130}
CONFIG = LlamaConfig(intermediate_size=48, num_key_value_heads=1, initializer_range=0.2, **SIZES)


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    words = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet())[:129])}
    tokenizer = Tokenizer(WordLevel(words | {"?": 129}, unk_token="?"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", chat_template="{{ messages }}")
    fast.save_pretrained(folder)
    return fast


def save_manifest(folder: Path, number: int, base: Path, parents: list[Path], **fields) -> None:
    digests = [hashlib.sha256((p / "adapter_model.safetensors").read_bytes()).hexdigest() for p in [*parents, folder]]
    settings = {"SFT_LR": 1e-4, "SFT_LORA_R": 2, "SFT_LORA_ALPHA": 4}
    manifest = blank_manifest().record() | {
        "stage": number,
        "status": "complete",
        "base_model": str(base),
        "parents": [{"stage": n, "adapter_sha256": digests[n - 1]} for n in range(1, number)],
        "settings": {name: {"value": value, "origin": "default"} for name, value in settings.items()},
        "sources": [{"id": f"org/rows{number}", "drawn": 70, "fingerprint": None}],
        "train_rows": 70,
        "steps": 9,
        "metrics": {"eval_loss": 1.25},
        "adapter_sha256": digests[-1],
    }
    (folder / "stage.json").write_text(json.dumps(manifest | fields))


@pytest.fixture
def ladder(tmp_path) -> tuple[Path, list[Path]]:
    """(base, [out_stage1, out_stage2]): two stages trained one on the other, the second with a probe."""
    base, stages = tmp_path / "base", [tmp_path / "out_stage1", tmp_path / "out_stage2"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(base)
    save_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    for number, folder in enumerate(stages, start=1):
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.3
        adapted.save_pretrained(folder)
        store_probe(folder, adapted, save_tokenizer(folder))
        save_manifest(folder, number, base, stages[: number - 1])
        model = adapted.merge_and_unload()
    return base, stages


@pytest.fixture
def export(monkeypatch, capsys):
    """Runs the program; (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("export_model", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export_model.py", *map(str, arguments)])
        capsys.readouterr()
        code = run_program(module.main)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def expected_weights(base: Path, adapters: list[Path]) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.state_dict()


def assert_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_stage_is_exported_with_all_stages_before_it(export, ladder):
    """D/merged is base + adapter 1 + adapter 2, loads with its tokenizer, and was verified by the probe."""
    base, stages = ladder
    code, out, err = export("--checkpoint_dir", stages[1])
    assert (code, err) == (0, "")
    assert_weights(stages[1] / "merged", expected_weights(base, stages))
    assert AutoTokenizer.from_pretrained(stages[1] / "merged").chat_template == "{{ messages }}"
    assert f"Merging 2 adapters into {base} ..." in out
    assert "Verified: KL " in out
    record = json.loads((stages[1] / "merged" / "merge.json").read_text())
    assert record["kl"] < 1e-9
    assert len(record["adapters"]) == 2


def test_the_card_names_base_stages_data_and_no_path(export, ladder, tmp_path):
    """What a reader of the hub needs: base, one line per stage, how it was verified, licence unknown."""
    export("--checkpoint_dir", ladder[1][1], "--output", tmp_path / "served")
    card = (tmp_path / "served" / "README.md").read_text(encoding="utf-8")
    assert "`base` with 2 LoRA adapters, in the order in which they were trained, folded into its weights." in card
    assert "| 1 | org/rows1 (70) | 70 | 9 | 0.0001 | 2, 4 | 1.25 |" in card
    assert "| 2 | org/rows2 (70) | 70 | 9 | 0.0001 | 2, 4 | 1.25 |" in card
    assert "Verified on probe prompts against base + adapters: mean KL" in card
    assert "## Licence\nNot stated" in card
    assert str(tmp_path) not in card


def test_a_checkpoint_is_exported_on_its_stages_parents(export, ladder):
    """checkpoint-X has no manifest of its own: the parents are those of the stage, the adapter is its own."""
    base, stages = ladder
    checkpoint = stages[1] / "checkpoint-5"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (checkpoint / name).write_bytes((stages[0] / name).read_bytes())
    code, out, _ = export("--checkpoint_dir", checkpoint)
    assert code == 0
    assert_weights(checkpoint / "merged", expected_weights(base, [stages[0], stages[0]]))
    assert "Verified: KL " in out


def test_a_plain_adapter_goes_into_the_base_it_names(export, ladder):
    """Without stage.json the base is the one of adapter_config.json, and the card says that stages are not known."""
    base, stages = ladder
    for name in ("stage.json", PROBE):
        (stages[0] / name).unlink()
    code, out, _ = export("--checkpoint_dir", stages[0])
    assert code == 0
    assert_weights(stages[0] / "merged", expected_weights(base, [stages[0]]))
    assert "Verified: KL " in out
    assert "Not known: the adapter came without" in (stages[0] / "merged" / "README.md").read_text()


def test_a_base_that_is_gone_is_said_of_the_adapter(export, ladder):
    """There is no SFT_BASE_MODEL here: the option that was given and the name in the adapter's file."""
    folder = ladder[1][0]
    for name in ("stage.json", PROBE):
        (folder / name).unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/base"}))
    code, _, err = export("--checkpoint_dir", folder)
    assert code == 2
    assert f"[ERROR] --checkpoint_dir {folder}: its base model gone/base: is no folder here" in err
    assert "SFT_" not in err
    assert not (folder / "merged").exists()


def test_a_stage_trained_in_full_is_copied(export, ladder):
    """Full fine-tuning: the result is a model already, exported as it is and said to be so."""
    base, stages = ladder
    for path in stages[0].iterdir():
        path.unlink()
    for path in base.iterdir():
        (stages[0] / path.name).write_bytes(path.read_bytes())
    (stages[0] / "adapter_model.safetensors").write_bytes(b"")  # for the manifest's helper
    save_manifest(stages[0], 1, base, [], adapter_sha256=None)
    (stages[0] / "adapter_model.safetensors").unlink()
    digest = result_sha256(stages[0])[1]
    manifest = json.loads((stages[0] / "stage.json").read_text())
    (stages[0] / "stage.json").write_text(json.dumps(manifest | {"adapter_sha256": digest}))
    code, _, err = export("--checkpoint_dir", stages[0])
    assert (code, err) == (0, "")
    assert_weights(stages[0] / "merged", expected_weights(base, []))
    assert "`out_stage1`, all of whose weights were trained." in (stages[0] / "merged" / "README.md").read_text()


def test_a_second_export_replaces_the_first(export, ladder):
    """An earlier export may be replaced, a folder of something else may not."""
    stage = ladder[1][0]
    assert export("--checkpoint_dir", stage)[0] == 0
    assert export("--checkpoint_dir", stage)[0] == 0
    code, _, err = export("--checkpoint_dir", stage, "--output", ladder[0])
    assert code == 2
    assert err == f"[ERROR] {ladder[0]}: exists and is no earlier export; name another --output\n"


def test_weights_that_do_not_answer_like_the_stage_are_not_published(export, ladder):
    """A probe of another training: exit 1 with the figures, and no folder appears."""
    stages = ladder[1]
    (stages[1] / PROBE).write_bytes((stages[0] / PROBE).read_bytes())
    code, _, err = export("--checkpoint_dir", stages[1])
    assert code == 1
    assert err.startswith("[ERROR] The merged model does not answer as base + adapter did: KL ")
    assert [path.name for path in stages[1].iterdir() if "merged" in path.name] == []


def test_a_retrained_parent_is_refused(export, ladder):
    """Stage 2 does not fit an adapter 1 that was trained again later."""
    stages = ladder[1]
    weights = stages[0] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, _, err = export("--checkpoint_dir", stages[1])
    assert code == 2
    assert f"{stages[0]}: was trained again after stage 2; train stage 2 again with --fresh" in err


def test_a_missing_parent_is_refused(export, ladder):
    """The folder that is not there is named."""
    stages = ladder[1]
    stages[0].rename(stages[0].with_name("elsewhere"))
    code, _, err = export("--checkpoint_dir", stages[1])
    assert code == 2
    assert f"{stages[0]}: holds no adapter, but stage 2 was trained on it" in err


def test_an_unfinished_stage_is_refused(export, ladder):
    """A running stage has no result yet; its checkpoints are named as the way out."""
    base, stages = ladder
    save_manifest(stages[1], 2, base, stages[:1], status="running")
    code, _, err = export("--checkpoint_dir", stages[1])
    assert code == 2
    assert "stage 2 is running; wait for its end, resume it, or name one of its checkpoints" in err


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_folders_without_a_result_are_refused(export, tmp_path, name):
    """A folder that is missing, or holds no adapter and no model."""
    code, _, err = export("--checkpoint_dir", tmp_path / name)
    assert code == 2
    assert err.count("\n") == 1
    assert "--checkpoint_dir" in err


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"auth": {"accessToken": {"role": "read"}}}, "may only read"),
        (HfHubHTTPError("401", response=SimpleNamespace(status_code=401, headers={}, request=None)), "does not know"),
        ({"auth": {"accessToken": {"role": "write"}}}, ""),
        ({"auth": {"accessToken": {"role": "fineGrained"}}}, ""),
        ({"name": "someone"}, ""),
        (ConnectionError("gone"), ""),
    ],
)
def test_a_token_that_cannot_write_is_said_before_the_merge(monkeypatch, answer, reason):
    """One line with the page where another is made; what the hub does not tell is left to the upload."""

    def whoami(self):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("sft.programs.export.HfApi.whoami", whoami)
    monkeypatch.setattr("sft.programs.export.get_token", lambda: "token")
    if not reason:
        check_repository("me/model", offline=False)
        return
    with pytest.raises(Problems) as found:
        check_repository("me/model", offline=False)
    (text,) = found.value.problems
    assert reason in text
    assert "HF_TOKEN" in text


def test_a_push_that_cannot_work_is_refused_before_merging(export, ladder):
    """Without network, and for a name that is none, nothing is merged; --private alone is a mistake."""
    stage = ladder[1][0]
    for arguments in (["--push", "me/model"], ["--push", "no such/name"], ["--private"]):
        code, _, err = export("--checkpoint_dir", stage, *arguments)
        assert (code, err[:9]) == (2, "[ERROR] -")
    assert not (stage / "merged").exists()


def test_help_comes_without_torch():
    """--help is read before anything heavy is imported."""
    program = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {program}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_all_stages_become_one_adapter_for_the_untouched_base(export, ladder):
    """Ranks add up, plain PEFT loads it on the base alone, and it answers as base + adapter 1 + adapter 2."""
    base, stages = ladder
    code, out, err = export("--checkpoint_dir", stages[1], "--as-adapter")
    assert (code, err) == (0, "")
    assert f"Joining 2 adapters for {base} ..." in out
    assert f"Adapter: {stages[1] / 'adapter'} (rank 4)" in out
    assert "Serving: vLLM: --max-lora-rank 8" in out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), stages[1] / "adapter")
    merged = model.merge_and_unload().state_dict()
    for name, expected in expected_weights(base, stages).items():
        assert torch.allclose(merged[name], expected, atol=1e-6), name
    assert AutoTokenizer.from_pretrained(stages[1] / "adapter").chat_template == "{{ messages }}"
    record = json.loads((stages[1] / "adapter" / "merge.json").read_text())
    assert record["kl"] < 1e-9
    code, out, _ = export("--checkpoint_dir", stages[1], "--as-adapter", "--rank", 2)
    assert code == 0
    assert "Shortened: 4 matrices lose up to " in out
    assert "The stage's questions" not in out  # it has none


def test_a_shortened_adapter_says_what_it_costs_in_answers(export, ladder, monkeypatch):
    """The stage's own questions, answered by base + all adapters and by the shortened one: 8 of 8 right, then 6."""
    stage = ladder[1][1]
    row = {"task": "text_to_json", "prompt": [{"role": "user", "content": "a is 1"}], "reference": '{"a": 1}'}
    (stage / "gen_rows.jsonl").write_text((json.dumps(row | {"kind": "structured"}) + "\n") * 8)
    manifest = json.loads((stage / "stage.json").read_text())
    manifest["settings"]["SFT_GEN_EVAL"] = {"value": "structured", "origin": "stage2.env"}
    (stage / "stage.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "digest"}))
    given = iter([['{"a": 1}'] * 8, ['{"a": 1}'] * 6 + ["nothing"] * 2])
    answer = "sft.evaluation.generation_evaluation.GenerationEvaluation.answer"
    monkeypatch.setattr(answer, lambda self, model, rows: [Answer(text) for text in next(given)])
    code, out, err = export("--checkpoint_dir", stage, "--as-adapter", "--rank", 2)
    assert (code, err) == (0, "")
    assert "The stage's questions, all stages against this adapter: gen_score 1.000 -> 0.750 (-0.250, 95 % int" in out
    record = json.loads((stage / "adapter" / "merge.json").read_text())["answers"]
    assert (record["exact"], record["shortened"], record["difference"]["questions"]) == (1.0, 0.75, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rank", 4), "--rank 4: is a number from 1 on and goes with --as-adapter"),
        (("--as-adapter", "--rank", 0), "--rank 0: is a number from 1 on"),
    ],
)
def test_a_rank_that_means_nothing_is_refused(export, ladder, arguments, said):
    """Without --as-adapter, or below 1: exit 2, nothing written."""
    code, _, err = export("--checkpoint_dir", ladder[1][1], *arguments)
    assert code == 2
    assert said in err
    assert not (ladder[1][1] / "adapter").exists()


def test_a_ladder_with_a_fully_trained_stage_has_no_adapter(export, ladder):
    """The weights of that stage are no sum of low-rank updates: refused, with what to do instead."""
    manifest = json.loads((ladder[1][0] / "stage.json").read_text())
    manifest["settings"]["SFT_USE_LORA"] = {"value": False, "origin": "stage1.env"}
    (ladder[1][0] / "stage.json").write_text(json.dumps(manifest))
    code, _, err = export("--checkpoint_dir", ladder[1][1], "--as-adapter")
    assert code == 2
    assert "--as-adapter: stage 1 trained all weights, which no adapter on the base model holds" in err


def fingerprinted(stages: list[Path], base: Path) -> None:
    """Manifests as train.py writes them: they know the base model's content."""
    for folder in stages:
        manifest = json.loads((folder / "stage.json").read_text())
        manifest["inputs"] = {"SFT_BASE_MODEL": model_fingerprint(str(base))}
        (folder / "stage.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("form", [(), ("--as-adapter",)])
def test_a_base_model_that_was_moved_is_named_by_an_option(export, ladder, form, tmp_path):
    """Without it the message says so and nothing is written; with it the result is that of the old place."""
    base, stages = ladder
    fingerprinted(stages, base)
    expected = expected_weights(base, stages)
    moved = base.rename(tmp_path / "elsewhere")
    code, _, err = export("--checkpoint_dir", stages[1], *form)
    assert code == 2
    assert err == (
        f"[ERROR] --checkpoint_dir {stages[1]}: its base model {base} is not there any more; if it was moved, "
        "say where to with --base-model FOLDER\n"
    )
    code, out, err = export(
        "--checkpoint_dir", stages[1], "--base-model", moved, *form, "--output", tmp_path / "served"
    )
    assert (code, err) == (0, "")
    assert str(moved) in out
    if form:
        config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(moved)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moved), tmp_path / "served")
        merged = model.merge_and_unload().state_dict()
        assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in expected.items())
    else:
        assert_weights(tmp_path / "served", expected)


@pytest.mark.parametrize("form", [(), ("--as-adapter",)])
@pytest.mark.parametrize("there", [True, False])
def test_a_base_model_of_another_content_is_refused(export, ladder, form, there, tmp_path):
    """One weight is different; both models are named, whether the recorded one is still there or not."""
    base, stages = ladder
    fingerprinted(stages, base)
    other = AutoModelForCausalLM.from_pretrained(base)
    other.lm_head.weight.data[3, 4] += 1
    other.save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    if not there:
        base.rename(tmp_path / "elsewhere")
    code, _, err = export("--checkpoint_dir", stages[1], "--base-model", tmp_path / "other", *form)
    assert code == 2
    assert err == (
        f"[ERROR] --base-model {tmp_path / 'other'}: is not the model that {stages[1].name} was trained on, {base}: "
        "its content is another; name that model's folder\n"
    )
    assert not (stages[1] / "merged").exists()
    assert not (stages[1] / "adapter").exists()


@pytest.mark.parametrize("place", ["nowhere/at/all", "nowhere", "out_stage1", "base/config.json"])
def test_a_base_model_option_that_names_no_model_is_refused(export, ladder, place, tmp_path):
    """No folder, an adapter, a file: one line that names the option, no traceback."""
    base, stages = ladder
    fingerprinted(stages, base)
    code, _, err = export("--checkpoint_dir", stages[1], "--base-model", tmp_path / place)
    assert code == 2
    assert err.startswith(f"[ERROR] --base-model {tmp_path / place}: ")
    assert err.count("\n") == 1
    assert "SFT_" not in err


def test_a_plain_adapter_takes_a_base_model_by_the_option(export, ladder, tmp_path):
    """Nothing but a name is known of its base: taken as given, and said; still compared where that base is there."""
    base, stages = ladder
    for name in ("stage.json", PROBE):
        (stages[0] / name).unlink()
    expected = expected_weights(base, stages[:1])
    code, _, err = export("--checkpoint_dir", stages[0], "--base-model", stages[1])
    assert code == 2
    assert str(stages[1]) in err
    moved = base.rename(tmp_path / "elsewhere")
    code, _, err = export("--checkpoint_dir", stages[0])
    assert code == 2
    assert "--base-model" in err
    code, out, err = export("--checkpoint_dir", stages[0], "--base-model", moved)
    assert (code, err) == (0, "")
    assert f"[WARNING] Nothing says whether {moved} is the model" in out
    assert_weights(stages[0] / "merged", expected)


def test_a_stage_trained_in_full_takes_no_base_model(export, ladder):
    """Its weights are all its own: the option would have no effect, so it is refused."""
    base, stages = ladder
    manifest = json.loads((stages[0] / "stage.json").read_text())
    for path in stages[0].iterdir():
        path.unlink()
    for path in base.iterdir():
        (stages[0] / path.name).write_bytes(path.read_bytes())
    manifest["adapter_sha256"] = result_sha256(stages[0])[1]
    (stages[0] / "stage.json").write_text(json.dumps(manifest))
    code, _, err = export("--checkpoint_dir", stages[0], "--base-model", base)
    assert code == 2
    assert f"--base-model {base}: " in err
    assert "all weights were trained" in err

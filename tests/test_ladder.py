"""The three-stage ladder end to end on a tiny model, and what it leaves on disk."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from official_content import compare_answers
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three completed stages: JSON, then JSON and YAML mixed, then YAML; generation evaluation on."""
    folder = tmp_path_factory.mktemp("ladder")
    base = write_model(folder / "base")
    json_rows, yaml_rows = write_rows(folder / "json.jsonl", 40), write_rows(folder / "yaml.jsonl", 20, target="yaml")
    mix = [{"id": str(json_rows), "weight": 1.0}, {"id": str(yaml_rows), "weight": 2.0}]
    common = {
        "SFT_BASE_MODEL": base, "SFT_OUT_LORA_DIR": folder / "out", "SFT_GEN_EVAL": "structured",
        "SFT_GEN_EVAL_SAMPLES": 3, "SFT_GEN_MAX_NEW_TOKENS": 8, "SFT_MAX_STEPS": 4,
    }  # fmt: skip
    write_stage(folder, 1, common | {"SFT_DATASET_ID": json_rows})
    write_stage(folder, 2, common | {"SFT_DATASET_MIX": json.dumps(mix)})
    write_stage(folder, 3, common | {"SFT_DATASET_ID": yaml_rows, "SFT_MAX_STEPS": -1, "SFT_EPOCHS": 1.5})
    assert run_train("--stage", "all", "--env-dir", folder) == 0
    return folder


def test_every_stage_leaves_the_files_of_the_contract(ladder: Path):
    """Contract section 6, and no pickle among the results."""
    for number in (1, 2, 3):
        names = {path.name for path in (ladder / f"out_stage{number}").iterdir()}
        assert names >= {
            "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "stage.json", "training_config.json",
            "best_model", "report.html", "report.json", "metrics.jsonl", "gen_metrics_step0.json",
        }  # fmt: skip
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        best = {path.name for path in (ladder / f"out_stage{number}" / "best_model").iterdir()}
        assert best >= {"adapter_model.safetensors", "config.json", "tokenizer.json", "best_model_info.json"}
        assert not [name for name in best if name.endswith(".bin")]
    assert (ladder / "out_report.html").is_file()


@pytest.mark.parametrize("page", ["README.md", "official_content/TRAINING_GUIDE.md"])
def test_every_file_of_a_stage_is_listed(ladder: Path, page: str):
    """By its name, with <step> and <K> for the numbers; the tokenizer's own files stand there as such."""
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    names = {path.name for number in (1, 2, 3) for path in (ladder / f"out_stage{number}").iterdir()}
    own = {name for name in names if not name.startswith(("tokenizer", "chat_template"))}
    numbered = {re.sub(r"(step|checkpoint-)\d+", r"\1<step>", re.sub(r"stage\d+", "stage<K>", name)) for name in own}
    assert {name for name in numbered if name not in text} == set()


def test_stage_three_starts_from_base_plus_both_adapters(ladder: Path):
    """An independent computation by PEFT, in float32: every tensor of the merged base equals it."""
    model = AutoModelForCausalLM.from_pretrained(ladder / "base", dtype=torch.float32)
    for number in (1, 2):
        model = PeftModel.from_pretrained(model, ladder / f"out_stage{number}").merge_and_unload()
    expected = model.state_dict()
    merged = load_file(ladder / "out_stage3_merged_base" / "model.safetensors")
    base = load_file(ladder / "base" / "model.safetensors")
    assert merged.keys() == base.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert len(changed) == 14  # seven kinds of projection in two layers


def test_the_manifest_tells_lineage_data_and_verification(ladder: Path):
    """stage.json of stage 3 names both parents by hash, the rows drawn, and how far the merge is from its adapter."""
    manifests = [json.loads((ladder / f"out_stage{n}" / "stage.json").read_text()) for n in (1, 2, 3)]
    assert [m["status"] for m in manifests] == ["complete"] * 3
    expected = [{"stage": n + 1, "adapter_sha256": manifests[n]["adapter_sha256"]} for n in (0, 1)]
    assert manifests[2]["parents"] == expected
    assert manifests[2]["merge"]["kl"] < 1e-6
    assert [source["drawn"] for source in manifests[1]["sources"]] == [12, 24]  # 36 rows at 1 : 2
    assert (manifests[0]["train_rows"], manifests[0]["val_rows"]) == (36, 4)
    assert manifests[0]["steps"] == 4
    assert manifests[2]["steps"] == 5  # 18 rows: 3 steps an epoch of 8 rows, one and a half epochs


def test_the_forgetting_matrix_is_full(ladder: Path):
    """Base and every stage on every stage's rows."""
    matrix = json.loads((ladder / "out_stage3" / "stage.json").read_text())["forgetting"]
    assert matrix["models"] == ["base", "stage 1", "stage 2", "stage 3"]
    assert matrix["tasks"] == ["stage 1", "stage 2", "stage 3"]
    assert all(score is not None for row in matrix["scores"] for score in row)


def test_answers_of_every_two_models_can_be_compared(ladder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """What a ladder leaves is enough for every pair of stages, on the questions of each up to the later one, and the
    ladder's report says what changed from stage to stage."""
    for one, other in ((1, 2), (2, 3), (1, 3)):
        capsys.readouterr()
        arguments = ["--stage", str(one), "--with", str(other), "--env-dir", str(ladder), "--json"]
        monkeypatch.setattr(sys, "argv", ["compare_answers.py", *arguments])
        assert compare_answers.program() == 0
        found = json.loads(capsys.readouterr().out)["questions"]
        assert [(each["of_stage"], each["missing"], len(each["answers"])) for each in found] == [
            (number, None, len((ladder / f"out_stage{number}" / "gen_rows.jsonl").read_text().splitlines()))
            for number in range(1, other + 1)
        ]
    facts = json.loads((ladder / "out_report.json").read_text())
    assert len(facts["answers"]) == 2 + 3
    assert "What changed in the answers" in (ladder / "out_report.html").read_text()


def test_a_completed_stage_is_left_alone(ladder: Path, capsys: pytest.CaptureFixture[str]):
    """The same command again prints the notice, exits 0 and changes nothing."""
    before = (ladder / "out_stage2" / "stage.json").read_bytes()
    assert run_train("--stage", 2, "--env-dir", ladder) == 0
    shown = capsys.readouterr()
    assert "IMPORTANT NOTICE:" in shown.err + shown.out
    assert (ladder / "out_stage2" / "stage.json").read_bytes() == before


def test_changed_settings_are_refused_and_named(ladder: Path, capsys: pytest.CaptureFixture[str]):
    """Another learning rate on a completed stage: exit 2, the difference and --fresh."""
    assert run_train("--stage", 1, "--env-dir", ladder, "--set", "SFT_LR=3e-3") == 2
    shown = capsys.readouterr().err
    assert "SFT_LR: 0.01 → 0.003" in shown
    assert "--fresh" in shown


def test_retraining_a_parent_is_noticed(ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """After stage 1 is trained anew stage 2 no longer counts as complete: exit 2, nothing is overwritten."""
    copy = tmp_path / "copy"
    shutil.copytree(ladder, copy)
    settings = ["--env-dir", copy, "--set", f"SFT_OUT_LORA_DIR={copy / 'out'}"]
    assert run_train("--stage", 1, "--fresh", *settings, "--set", "SFT_LR=3e-3") == 0
    assert len(list(copy.glob("out_stage1.old-*"))) == 1
    assert run_train("--stage", 2, *settings) == 2
    assert "stage 1's adapter" in capsys.readouterr().err


def test_losses_do_not_depend_on_batch_and_accumulation(ladder: Path, tmp_path: Path):
    """8 rows at once, 4 x 2 and 1 x 8 give the same loss series, padded nowhere, to 1e-5."""
    series = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        out = tmp_path / f"out{batch}"
        code = run_train(
            "--stage", 1, "--env-dir", ladder, "--set", f"SFT_OUT_LORA_DIR={out}", "--set", "SFT_GEN_EVAL=none",
            "--set", f"SFT_PER_DEVICE_TRAIN_BS={batch}", "--set", f"SFT_GRAD_ACCUM={accumulation}",
        )  # fmt: skip
        assert code == 0
        folder = tmp_path / f"out{batch}_stage1"
        series.append(metric_lines(folder, "loss") + metric_lines(folder, "eval_loss"))
    assert len(series[0]) == 7  # four steps, evaluations at steps 0, 3 and 4
    for other in series[1:]:
        assert other == pytest.approx(series[0], abs=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("SFT_LOAD_IN_4BIT", "load_in_4bit"), ("SFT_LOAD_IN_8BIT", "load_in_8bit")])
def test_quantised_stages_keep_the_merged_base_in_full_precision(ladder: Path, tmp_path: Path, name: str, kind: str):
    """Two stages on quantised weights: the second starts from a float32 merge and is verified against the first."""
    code = run_train(
        "--stage", "1-2", "--env-dir", ladder, "--set", f"SFT_OUT_LORA_DIR={tmp_path / 'out'}", "--set", f"{name}=1",
        "--set", "SFT_GEN_EVAL=none", "--set", "SFT_MAX_STEPS=2",
    )  # fmt: skip
    assert code == 0
    merged = load_file(tmp_path / "out_stage2_merged_base" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert json.loads((tmp_path / "out_stage2" / "training_config.json").read_text())["bnb_config"][kind]
    assert json.loads((tmp_path / "out_stage2" / "stage.json").read_text())["merge"]["kl"] < 0.5


def test_full_fine_tuning_gives_model_folders_that_the_next_stage_starts_from(ladder: Path, tmp_path: Path):
    """SFT_USE_LORA=0: stage 2 trains stage 1's weights; nothing is merged, the manifest names the parent."""
    code = run_train(
        "--stage", "1-2", "--env-dir", ladder, "--set", f"SFT_OUT_LORA_DIR={tmp_path / 'out'}", "--set",
        "SFT_USE_LORA=0", "--set", "SFT_GEN_EVAL=none", "--set", "SFT_LR=1e-3",
    )  # fmt: skip
    assert code == 0
    assert not (tmp_path / "out_stage2_merged_base").exists()
    manifests = [json.loads((tmp_path / f"out_stage{n}" / "stage.json").read_text()) for n in (1, 2)]
    assert manifests[1]["parents"] == [{"stage": 1, "adapter_sha256": manifests[0]["adapter_sha256"]}]
    first, second = (load_file(tmp_path / f"out_stage{n}" / "model.safetensors") for n in (1, 2))
    started = metric_lines(tmp_path / "out_stage2", "eval_loss")[0]
    assert started < metric_lines(tmp_path / "out_stage1", "eval_loss")[0]
    assert any(not torch.equal(first[key], second[key]) for key in first)

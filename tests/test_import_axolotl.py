"""An Axolotl file becomes a stageN.env the settings accept; every key has a line or a reason."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft.programs.axolotl import translate
from sft.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "official_content" / "import_axolotl.py"

# The keys and values of document 001.
DOCUMENT_001 = """
base_model: unsloth/Qwen3-30B-A3B-Instruct-2507
model_type: qwen3
trust_remote_code: true
load_in_4bit: false
load_in_8bit: false
bf16: true
fp16: false
tf32: true
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.0
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, up_proj, down_proj, gate_proj]
lora_target_linear: true
lora_fan_in_fan_out: false
datasets:
  - path: data/train/hawks_train_curriculum.json
    type: custom_instruction
    format: instruction
    field_instruction: instruction
    field_input: input
    field_output: output
chat_template: qwen3_instruct
train_on_inputs: false
sequence_len: 1536
sample_packing: false
num_epochs: 1.5
max_steps: -1
micro_batch_size: 1
gradient_accumulation_steps: 16
learning_rate: 0.0002
lr_scheduler: cosine
cosine_min_lr_ratio: 0.05
warmup_ratio: 0.03
optimizer: adamw_torch
weight_decay: 0.0
adam_beta1: 0.9
adam_beta2: 0.999
adam_epsilon: 1e-8
max_grad_norm: 1.0
datasets_eval:
  - path: data/train/hawks_val.json
evaluation_strategy: steps
eval_steps: 200
eval_batch_size: 1
output_dir: ./outputs/axolotl_qwen_finetune
save_strategy: steps
save_steps: 200
save_total_limit: 3
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
flash_attention: true
unsloth: false
torch_compile: false
deepspeed: deepspeed_configs/zero2.json
plugins:
  - callbacks.generation_eval:GenerationEvalCallback
  - callbacks.mlflow_logger:MLflowLoggerCallback
"""


def run(folder: Path, text: str) -> subprocess.CompletedProcess:
    (folder / "axolotl.yml").write_text(text, encoding="utf-8")
    command = [sys.executable, str(PROGRAM), "axolotl.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def translated(text: str) -> tuple[dict[str, str], dict[str, str]]:
    translation = translate(yaml.safe_load(text))
    return translation.values, translation.reasons


def test_document_001_becomes_its_recipe(tmp_path):
    """The settings read from the translated file are those of configs/recipes/offender_qwen3_30b_a3b, data apart."""
    result = run(tmp_path, DOCUMENT_001)
    assert result.returncode == 0, result.stderr
    (tmp_path / "stage1.env").write_text(result.stdout, encoding="utf-8")
    made = load_settings(1, env_dir=tmp_path, environ={}).record()
    recipe = load_settings(1, env_dir=ROOT / "configs/recipes/offender_qwen3_30b_a3b", environ={}).record()
    differing = {name for name in made if made[name]["value"] != recipe[name]["value"]}
    assert differing == {
        "SFT_OUT_LORA_DIR",
        "SFT_LORA_TARGET_MODULES",  # the same seven in another order
        "SFT_DATASET_ID",
        "SFT_DATASET_MIX",
        "SFT_DATASET_MIX_TOTAL_SIZE",
        "SFT_GEN_EVAL_SAMPLES",
        "SFT_GEN_MAX_NEW_TOKENS",
    }
    assert set(made["SFT_LORA_TARGET_MODULES"]["value"]) == set(recipe["SFT_LORA_TARGET_MODULES"]["value"])


def test_every_key_of_document_001_has_a_line_or_a_reason(tmp_path):
    """None is unknown, and what has no line stands in the file and on stderr."""
    _, reasons = translated(DOCUMENT_001)
    assert "has no equivalent here" not in reasons.values()
    result = run(tmp_path, DOCUMENT_001)
    for key, reason in reasons.items():
        assert f"#   {key}: {reason}" in result.stdout
        assert f"  {key}: {reason}" in result.stderr
    assert "configs/accelerate/zero2.yaml" in reasons["deepspeed"]


def test_axolotls_defaults_are_written_out():
    """512 tokens, batch 1 x 1 and no validation are its defaults, not ours."""
    values, _ = translated("base_model: m\nadapter: lora\ndatasets: [{path: d}]\n")
    assert values["SFT_MAX_SEQ_LEN"] == "512"
    assert (values["SFT_PER_DEVICE_TRAIN_BS"], values["SFT_GRAD_ACCUM"]) == ("1", "1")
    assert (values["SFT_VAL_RATIO"], values["SFT_OUT_LORA_DIR"]) == ("0", "./model-out")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("adapter: qlora", "SFT_LOAD_IN_4BIT", "1"),
        ("adapter:", "SFT_USE_LORA", "0"),
        ("lora_target_linear: true", "SFT_LORA_TARGET_MODULES", "all-linear"),
        ("bf16: auto", "SFT_DTYPE", "auto"),
        ("{bf16: false, fp16: true}", "SFT_DTYPE", "float16"),
        ("lora_modules_to_save: [lm_head, embed_tokens]", "SFT_LORA_MODULES_TO_SAVE", "lm_head,embed_tokens"),
        ("chat_template: chatml", "SFT_CHAT_TEMPLATE", "chatml"),
        ("gradient_checkpointing: offload", "SFT_GRADIENT_CHECKPOINTING", "1"),
        ("val_set_size: 0.1", "SFT_VAL_RATIO", "0.1"),
        ("datasets: [{path: a, split: test}]", "SFT_DATASET_SPLIT", "test"),
        ("datasets: [{path: json, data_files: rows.jsonl}]", "SFT_DATASET_ID", "rows.jsonl"),
        (
            "datasets: [{path: a, type: {field_instruction: ask, field_output: say}}]",
            "SFT_DATASET_MIX",
            '[{"id": "a", "columns": {"instruction": "ask", "output": "say"}}]',
        ),
        ("datasets: [{path: a}, {path: b}]", "SFT_DATASET_MIX", '[{"id": "a"}, {"id": "b"}]'),
        ("test_datasets: [{path: a, split: test}]", "SFT_EVAL_DATASET", '[{"id": "a", "split": "test"}]'),
    ],
)
def test_a_key_becomes_a_setting(text, name, value):
    """Values that do not carry over as they stand."""
    assert translated(text)[0][name] == value


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        ("eval_steps: 0.05", "eval_steps", "SFT_EVAL_STEPS"),
        ("val_set_size: 200", "val_set_size", "SFT_VAL_RATIO"),
        ("datasets: [{path: a}, {path: b}]", "datasets", "SFT_DATASET_MIX_TOTAL_SIZE"),
        ("datasets: [{path: a, shards: 4}]", "datasets[].shards", "no equivalent"),
        ("relora_steps: 5", "relora_steps", "no equivalent"),
        ("fsdp_config: {fsdp_version: 2}", "fsdp", "configs/accelerate/fsdp.yaml"),
    ],
)
def test_what_has_no_line_has_a_reason(text, key, part):
    """The reason names the setting to use where there is one."""
    assert part in translated(text)[1][key]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: [m\n", "not readable as YAML"),
        ("- a\n- b\n", "keys and values"),
        ("base_model: m\n", "SFT_DATASET_ID"),
        ("base_model: m\ndatasets: [{path: d}]\noptimizer: adamw_magic\n", "SFT_OPTIM=adamw_magic"),
        ("base_model: m\ndatasets: [d]\n", "datasets: is no list of data sets"),
        ("base_model: m\ndatasets: {path: d}\n", "datasets: is no list of data sets"),
        ("base_model: m\ndatasets: [{path: 3}]\n", "datasets: is no list of data sets"),
        ("base_model: m\ndatasets: [{path: json, data_files: [1]}]\n", "datasets: is no list of data sets"),
        ("base_model: m\ndatasets: [{path: d}]\nplugins: a.b\n", "plugins: a.b is no list of names"),
        ("base_model: m\ndatasets: [{path: d}]\nlora_target_modules: [1]\n", "lora_target_modules: [1] is no list"),
        ("base_model: m\ndatasets: [{path: d}]\nlora_modules_to_save: a\n", "lora_modules_to_save: a is no list"),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_printed(tmp_path, text, message):
    """Exit 2, one plain message, an empty stdout so that no half env file is redirected anywhere."""
    result = run(tmp_path, text)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_file_is_named(tmp_path):
    """Exit 2."""
    result = subprocess.run([sys.executable, PROGRAM, tmp_path / "no.yml"], capture_output=True, text=True, check=False)
    assert (result.returncode, "no.yml" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "text",
    [
        '"relora\\nSFT_TRUST_REMOTE_CODE=1\\n": 3',
        '"relora\\rSFT_TRUST_REMOTE_CODE=1": 3',
        'optimizer: "adamw_torch\\rSFT_TRUST_REMOTE_CODE=1"',
        'base_model: "m\\nSFT_TRUST_REMOTE_CODE=1"',
        'mlflow_run_name: "a\\u2028b\\x00"',
    ],
)
def test_what_would_write_a_line_of_its_own_is_refused(tmp_path, text):
    """Line ends and control characters in keys and values: exit 2, nothing on stdout."""
    result = run(tmp_path, f"base_model: m\ndatasets: [{{path: d}}]\n{text}\n")
    assert (result.returncode, result.stdout) == (2, "")
    assert "a line end or a control character; remove it" in result.stderr


@pytest.mark.parametrize(
    "value", ["it's", "a 'b' # c", "back\\slash and 'quote'", "tail\\", 'double " quote', "${HOME} x"]
)
def test_values_are_read_back_as_they_were(tmp_path, value):
    """Quotes, backslashes and hashes within a value end nothing."""
    text = yaml.safe_dump({"base_model": "m", "datasets": [{"path": "d"}], "mlflow_run_name": value})
    result = run(tmp_path, text)
    assert result.returncode == 0, result.stderr
    (tmp_path / "stage1.env").write_text(result.stdout, encoding="utf-8")
    assert load_settings(1, env_dir=tmp_path, environ={}).run_name == value


def test_a_reason_stays_on_its_line(tmp_path):
    """What a comment quotes from the file cannot end the comment."""
    template = "chat_template: |\n  {{ x }}\n  SFT_TRUST_REMOTE_CODE=1\n"
    result = run(tmp_path, f"base_model: m\ndatasets: [{{path: d}}]\n{template}")
    assert result.returncode == 0
    assert [line for line in result.stdout.splitlines() if line.startswith("SFT_TRUST")] == []

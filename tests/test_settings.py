"""Settings: defaults, where values come from, and what a person is told about each mistake."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given as examples
from hypothesis import settings as effort
from hypothesis import strategies as st

from sft.errors import Problems
from sft.scoring.metrics import metric_direction
from sft.settings import Settings, Source, load_settings
from sft.settings.env_file import closest
from sft.settings.mistakes import literals
from sft.settings.page import settings_page
from sft.settings.rules import RESULT_NEUTRAL
from sft.settings.schema import NAMES

ROOT = Path(__file__).resolve().parents[1]
BASE = "SFT_BASE_MODEL=org/model\nSFT_OUT_LORA_DIR=out\nSFT_DATASET_ID=org/rows\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Relative paths of settings lie in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text="", *, overrides=(), environ=None, strict=False, base=BASE):
    Path("stage1.env").write_text(base + text, encoding="utf-8")
    return load_settings(1, env_dir=Path(), overrides=overrides, strict=strict, environ=environ or {})


def problems(text="", **options):
    with pytest.raises(Problems) as caught:
        load(text, **options)
    return caught.value.problems


# Defaults and types


def test_defaults_are_those_of_the_contract():
    """Every default of contract section 3, written out here once more."""
    expected = {
        "model_revision": None, "trust_remote_code": False, "dtype": "auto", "attn": "auto", "load_in_4bit": False,
        "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "chat_template": None,
        "use_lora": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0,
        "lora_target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "lora_rslora": False, "lora_dora": False, "lora_modules_to_save": (),
        "merge_dtype": None, "strict": False, "dataset_split": "train",
        "dataset_mix": (), "dataset_mix_total_size": -1, "eval_dataset": (), "val_ratio": 0.05, "max_seq_len": 2048,
        "overlong": "drop", "packing": False, "train_on_prompt": False, "shuffle": "mix",
        "deduplicate": False, "replay": 0.0, "num_proc": None,
        "use_upsampling": False, "upsample_rules": {}, "mask_cot": False, "template_options": {}, "train_turns": "all",
        "output_markers": ("Output:", "OUTPUT:", "Final:", "Answer:", "Result:", "Response:"),
        "output_learn_mode": "after_marker", "masked_loss": "none", "masked_loss_unit": "path_edge",
        "masked_loss_redraw": "epoch", "masked_loss_mode": "sample", "epochs": 1.0, "max_steps": -1,
        "per_device_train_bs": 2, "per_device_eval_bs": 2, "grad_accum": 8, "lr": 1e-4, "lr_scheduler": "cosine",
        "min_lr_ratio": 0.0, "warmup_ratio": 0.03, "warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.9,
        "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "optim": "adamw_torch_fused",
        "gradient_checkpointing": "auto", "micro_batch_tokens": None, "group_by_length": False,
        "neftune_noise_alpha": 0.0, "torch_compile": False,
        "dataloader_workers": 0, "seed": 3407, "logging_steps": 10, "eval_steps": 50, "save_steps": 100,
        "save_total_limit": 2, "early_stopping_patience": -1, "metric_for_best": "eval_loss", "gen_eval": "none",
        "general_eval": True,
        "gen_eval_dataset": (), "gen_eval_samples": 64, "gen_max_new_tokens": 512, "gen_batch_size": None,
        "num_generate_samples": 5, "forgetting_margin": 0.05, "gate": False, "json_schema": None,
        "report_language": "auto",
        "mlflow_experiment_name": "llm-training-stage1",
        "report_to": ("mlflow",), "run_name": None, "mirror": None,
        "extraction_fields": (
            "person_name", "person_age_at_published", "person_position_name", "person_belongs_company",
            "person_address", "person_violated_law", "occured_locations", "police_departments",
        ),
        "base_model": "org/model", "out_lora_dir": Path("out"), "dataset_id": "org/rows",
    }  # fmt: skip
    settings = load()
    assert {name: getattr(settings, name) for name in expected} == expected
    assert set(NAMES.values()) - set(expected) == {"mlflow_tracking_uri"}
    assert settings.mlflow_tracking_uri == f"sqlite:///{ROOT}/mlruns/mlflow.db"
    assert (settings.stage, settings.env_dir) == (1, Path())


def test_settings_cannot_be_changed():
    """Nothing downstream can quietly train with another value than the manifest records."""
    with pytest.raises(ValueError, match="frozen"):
        load().lr = 1.0


@pytest.mark.parametrize("text", ["1", "true", "True", "YES", "yes"])
def test_switches_on(text):
    """Booleans accept 1/true/yes in any case."""
    assert load(f"SFT_MASK_COT={text}").mask_cot is True


@pytest.mark.parametrize("text", ["0", "false", "FALSE", "no"])
def test_switches_off(text):
    """Booleans accept 0/false/no in any case."""
    assert load(f"SFT_USE_LORA={text}").use_lora is False


def test_texts_become_values():
    """Numbers, comma lists, JSON objects, auto and the three states of gradient checkpointing."""
    settings = load(
        "SFT_LR=2e-5\nSFT_EPOCHS=1.5\nSFT_MAX_STEPS=1500\nSFT_LORA_TARGET_MODULES= q_proj , v_proj,\n"
        """SFT_UPSAMPLE_RULES='{"text_to_toml": 3.0, "pack:hard": 2}'\n"""
        "SFT_GRADIENT_CHECKPOINTING=yes\nSFT_NUM_PROC=auto\nSFT_REPORT_TO=none\nSFT_MERGE_DTYPE=float32\n"
    )
    assert (settings.lr, settings.epochs, settings.max_steps) == (2e-5, 1.5, 1500)
    assert settings.lora_target_modules == ("q_proj", "v_proj")
    assert settings.upsample_rules == {"text_to_toml": 3.0, "pack:hard": 2.0}
    assert (settings.gradient_checkpointing, settings.num_proc) == ("1", None)
    assert (settings.report_to, settings.merge_dtype) == (("none",), "float32")


def values_of_enum(module, name):
    """The string members of an enum of transformers, read from its source: importing it takes seconds."""
    folder = Path(find_spec("transformers").submodule_search_locations[0])
    tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.value.value for node in body if isinstance(node, ast.Assign)}


def test_choices_are_those_of_transformers():
    """Every scheduler and optimizer name of the installed transformers."""
    fields = Settings.model_fields
    assert set(literals(fields["lr_scheduler"].annotation)) == values_of_enum("trainer_utils", "SchedulerType")
    assert set(literals(fields["optim"].annotation)) == values_of_enum("training_args", "OptimizerNames")


# Where values come from


def test_precedence_and_origins():
    """--set > process environment > stage1.env > default, each recorded."""
    text = "SFT_LR=1e-3\nSFT_LORA_R=4\nSFT_SEED=1\n"
    environ = {"SFT_LORA_R": "5", "SFT_SEED": "2", "PATH": "/bin"}
    settings = load(text, overrides=["SFT_SEED=3"], environ=environ)
    record = settings.record()
    assert record["SFT_LR"] == {"value": 1e-3, "origin": "stage1.env"}
    assert record["SFT_LORA_R"] == {"value": 5, "origin": "environment"}
    assert record["SFT_SEED"] == {"value": 3, "origin": "--set"}
    assert record["SFT_LORA_ALPHA"] == {"value": 32, "origin": "default"}
    assert list(record) == list(NAMES)
    assert json.loads(json.dumps(record)) == record


def test_empty_means_unset():
    """`KEY=` and a bare `KEY` in the file leave the default; an empty --set takes a value of the file back."""
    settings = load("SFT_LR=\nSFT_SEED\nSFT_MAX_STEPS=7\n", overrides=["SFT_MAX_STEPS="])
    assert (settings.lr, settings.seed, settings.max_steps) == (1e-4, 3407, -1)
    assert settings.origins["SFT_LR"] == settings.origins["SFT_SEED"] == "default"
    assert settings.origins["SFT_MAX_STEPS"] == "--set"


def test_strict_argument_is_an_origin():
    """--strict and SFT_STRICT=1 mean the same; the record says which it was."""
    assert load(strict=True).record()["SFT_STRICT"] == {"value": True, "origin": "--strict"}
    assert load("SFT_STRICT=1").record()["SFT_STRICT"] == {"value": True, "origin": "stage1.env"}


def test_dotenv_syntax():
    """BOM, comments after values, export, quotes, blank lines and multi-line JSON."""
    text = (
        '# 学習率\n\nexport SFT_LR=5e-5   # lower than before\nSFT_RUN_NAME="second # try"\nSFT_DATASET_MIX=\'[\n'
        '  {"id": "org/a", "weight": 1.0},\n  {"id": "org/b", "weight": 2.5, "split": "test", "limit": 10}\n]\'\n'
    )
    settings = load(text, base="\ufeff" + BASE)
    assert (settings.base_model, settings.lr, settings.run_name) == ("org/model", 5e-5, "second # try")
    assert settings.sources == (Source(id="org/a"), Source(id="org/b", weight=2.5, split="test", limit=10))


def test_mix_wins_over_id():
    """SFT_DATASET_ID is the only source where no mix is given, with its split."""
    assert load("SFT_DATASET_SPLIT=test").sources == (Source(id="org/rows", split="test"),)
    assert load("""SFT_DATASET_MIX='[{"id": "other"}]'""").sources == (Source(id="other"),)


def test_validation_rows_from_an_id_or_a_list():
    """SFT_EVAL_DATASET and SFT_GEN_EVAL_DATASET take an id, a path or a JSON list; unset is an empty tuple."""
    settings = load("""SFT_EVAL_DATASET=a.jsonl\nSFT_GEN_EVAL_DATASET='[{"id": "b", "limit": 3}]'""")
    assert settings.eval_sources == (Source(id="a.jsonl"),)
    assert settings.gen_eval_sources == (Source(id="b", limit=3),)
    assert load().eval_sources == load().gen_eval_sources == ()
    assert settings.record()["SFT_GEN_EVAL_DATASET"]["value"] == [
        {"id": "b", "weight": 1.0, "split": "train", "limit": 3, "repeat": 1.0}
    ]


def test_paths_are_expanded(here):
    """~ and $VAR in paths and ids, also from the same file and with a default; other settings keep their dollars."""
    text = (
        "ROOT=/content\nSFT_RUN_NAME=$ROOT/~\n"
        """SFT_DATASET_MIX='[{"id": "$SHELF/a.jsonl"}, {"id": "${NOWHERE:-data}/b.jsonl"}]'\n"""
    )
    base = "SFT_BASE_MODEL=~/model\nSFT_OUT_LORA_DIR=${ROOT}/lora\n"
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text("{}")
    settings = load(text, base=base, environ={"HOME": str(here), "SHELF": "/shelf"})
    assert settings.base_model == f"{here}/model"
    assert settings.out_lora_dir == Path("/content/lora")
    assert [source.id for source in settings.sources] == ["/shelf/a.jsonl", "data/b.jsonl"]
    assert settings.run_name == "$ROOT/~"


def test_names_of_other_programs_pass_through():
    """HF_TOKEN and the like are offered for the environment and never recorded or shown."""
    text = "HF_TOKEN=hf_secret\nCUDA_VISIBLE_DEVICES=0\nDPO_LR=1e-7\nMLFLOW_TRACKING_TOKEN=x\nMERGED_MODEL_DIR=m\n"
    settings = load(text)
    assert settings.passthrough == {
        "HF_TOKEN": "hf_secret", "CUDA_VISIBLE_DEVICES": "0", "DPO_LR": "1e-7", "MLFLOW_TRACKING_TOKEN": "x",
        "MERGED_MODEL_DIR": "m",
    }  # fmt: skip
    assert "hf_secret" not in json.dumps(settings.record()) + repr(settings)


def test_passthrough_does_not_replace_the_environment(monkeypatch):
    """What the shell exports wins over the env file."""
    monkeypatch.setenv("SETTINGS_TEST_A", "shell")
    monkeypatch.setenv("SETTINGS_TEST_B", "")
    monkeypatch.delenv("SETTINGS_TEST_B")
    load("SETTINGS_TEST_A=file\nSETTINGS_TEST_B=file\n").export_passthrough()
    assert (os.environ["SETTINGS_TEST_A"], os.environ["SETTINGS_TEST_B"]) == ("shell", "file")


def test_what_the_extra_gpu_brings_is_asked_for_by_name(monkeypatch):
    """Without bitsandbytes: 4-bit and 8-bit weights and its optimizers, each with the command that installs it."""
    for module in ("sft.settings.rules", "sft.settings.values"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    lines = ["SFT_LOAD_IN_4BIT=1", "SFT_LOAD_IN_8BIT=1", "SFT_OPTIM=paged_adamw_8bit", "SFT_OPTIM=lion_8bit"]
    for line in lines:
        (text,) = problems(line)
        assert line in text
        assert "pip install bitsandbytes" in text


def test_results_of_an_installed_package_stay_in_the_current_folder(here, monkeypatch):
    """In the repository MLflow's database is the repository's own."""
    assert load().mlflow_tracking_uri == f"sqlite:///{ROOT / 'mlruns' / 'mlflow.db'}"
    monkeypatch.setattr("sft.settings.schema.REPOSITORY", None)
    assert load().mlflow_tracking_uri == f"sqlite:///{here / 'mlruns' / 'mlflow.db'}"


def test_credentials_in_a_tracking_uri_are_not_recorded():
    """The value is used, the record hides user and password."""
    settings = load("MLFLOW_TRACKING_URI=https://me:pass@host/x")
    assert settings.mlflow_tracking_uri == "https://me:pass@host/x"
    assert settings.record()["MLFLOW_TRACKING_URI"]["value"] == "https://***@host/x"


# Mistakes, one by one: the whole problem, word for word


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("SFT_LR=fast", "SFT_LR=fast: is not a number; write one such as 0.1 or 1e-4"),
        ("SFT_LR=0", "SFT_LR=0: is out of range; give more than 0"),
        ("SFT_LR=nan", "SFT_LR=nan: is not a finite number; write one such as 0.1 or 1e-4"),
        ("SFT_LORA_R=8.5", "SFT_LORA_R=8.5: is not a whole number; write digits only"),
        ("SFT_LORA_R=0", "SFT_LORA_R=0: is out of range; give at least 1"),
        ("SFT_VAL_RATIO=1", "SFT_VAL_RATIO=1: is out of range; give less than 1"),
        ("SFT_SEED=4294967296", "SFT_SEED=4294967296: is out of range; give at most 4294967295"),
        ("SFT_PACKING=maybe", "SFT_PACKING=maybe: is neither yes nor no; write 1 or 0"),
        (
            "SFT_MAX_STEPS=0",
            "SFT_MAX_STEPS=0: is neither -1 nor a count; write -1 to leave it open, or a number from 1",
        ),
        ("SFT_OVERLONG=trunc", "SFT_OVERLONG=trunc: is not one of drop, truncate, error; did you mean truncate?"),
        (
            "SFT_LR_SCHEDULER=cosin",
            "SFT_LR_SCHEDULER=cosin: is not one of those listed in docs/settings.md; did you mean cosine?",
        ),
        (
            "SFT_MERGE_DTYPE=bf16",
            "SFT_MERGE_DTYPE=bf16: is not one of bfloat16, float16, float32; did you mean bfloat16?",
        ),
        (
            "SFT_CHAT_TEMPLATE=lama2",
            "SFT_CHAT_TEMPLATE=lama2: is not one of chatml, llama2, alpaca, mistral or the path of a .jinja file; "
            "did you mean llama2?",
        ),
        (
            "SFT_CHAT_TEMPLATE=my.jinja",
            "SFT_CHAT_TEMPLATE=my.jinja: is no file; correct the path of the .jinja file",
        ),
        (
            "SFT_REPORT_TO=mlflow,none",
            "SFT_REPORT_TO=mlflow,none: asks for none beside others; leave one of them out",
        ),
        (
            "SFT_OUTPUT_MARKERS=,",
            "SFT_OUTPUT_MARKERS=,: is an empty list; write names with commas between, or leave it out for the default",
        ),
        (
            "SFT_METRIC_FOR_BEST=eval_los",
            "SFT_METRIC_FOR_BEST=eval_los: is not one of those listed in docs/settings.md; did you mean eval_loss?",
        ),
        (
            "SFT_METRIC_FOR_BEST=gen_score",
            "SFT_METRIC_FOR_BEST=gen_score: is computed only with SFT_GEN_EVAL=structured; set that, or take eval_loss",
        ),
        (
            "SFT_USE_UPSAMPLING=1",
            "SFT_USE_UPSAMPLING=1: there are no rules; write SFT_UPSAMPLE_RULES='{\"text_to_toml\": 3.0}', "
            "or set SFT_USE_UPSAMPLING=0",
        ),
        (
            """SFT_UPSAMPLE_RULES='{"toml": -1}'""",
            'SFT_UPSAMPLE_RULES "toml"=-1: is out of range; give at least 0',
        ),
        ("SFT_EPOCHS=0", "SFT_EPOCHS=0: nothing would be trained; give more than 0, or SFT_MAX_STEPS"),
    ],
)
def test_one_mistake(line, problem):
    """NAME=value: what is wrong; remedy (where)."""
    assert problems(line) == [f"{problem} (stage1.env line 4)"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("SFT_LORA_RANK=8", "SFT_LORA_RANK=8: is not a setting; did you mean SFT_LORA_R?"),
        ("SFT_OUTPUT_DIR=x", "SFT_OUTPUT_DIR=x: is not a setting; did you mean SFT_OUT_LORA_DIR?"),
        ("SFT_DATASET_IDS=a,b", "SFT_DATASET_IDS=a,b: is not a setting; did you mean SFT_DATASET_MIX?"),
        (
            "SFT_PER_DEVICE_TRAIN_BATCH_SIZE=4",
            "SFT_PER_DEVICE_TRAIN_BATCH_SIZE=4: is not a setting; did you mean SFT_PER_DEVICE_TRAIN_BS?",
        ),
        ("STF_LR=1", "STF_LR=1: is not a setting; did you mean SFT_LR?"),
        ("SFTLR=1", "SFTLR=1: is not a setting; did you mean SFT_LR?"),
        ("LORA_R=1", "LORA_R=1: is not a setting; did you mean SFT_LORA_R?"),
        ("sft_lr=1", "sft_lr=1: is not a setting; did you mean SFT_LR?"),
        ("MLFLOW_TRACKING_URL=x", "MLFLOW_TRACKING_URL=x: is not a setting; did you mean MLFLOW_TRACKING_URI?"),
        ("SFT_ZZZ=1", "SFT_ZZZ=1: is not a setting; remove it, docs/settings.md lists them all"),
        ("SFT_HF_TOKEN=hf_x", "SFT_HF_TOKEN=***: is not a setting; remove it, docs/settings.md lists them all"),
    ],
)
def test_unknown_names_in_the_file(line, problem):
    """A name that is no setting but looks like one is a problem, with the name that was meant; secrets stay hidden."""
    assert problems(line) == [f"{problem} (stage1.env line 4)"]


def test_unknown_names_elsewhere():
    """The same in the environment and in --set, where anything but a setting is refused."""
    found = problems(environ={"SFT_LORA_RANK": "8"}, overrides=["LR=1", "HF_HOME=x", "SFT_LR"])
    assert found == [
        "SFT_LORA_RANK=8: is not a setting; did you mean SFT_LORA_R? (environment)",
        "--set SFT_LR: has no value; write --set NAME=VALUE",
        "HF_HOME=x: is not a setting; remove it, docs/settings.md lists them all (--set)",
        "LR=1: is not a setting; did you mean SFT_LR? (--set)",
    ]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ('{"weight": 1}', 'entry 2 "id": is missing; add it'),
        ('{"id": ""}', 'entry 2 "id"="": is empty; write it out, or leave it out'),
        ('{"id": 3}', 'entry 2 "id"=3: is not a text; put it in double quotes'),
        ('{"id": "b", "wieght": 1}', 'entry 2 "wieght": is an unknown key; did you mean weight?'),
        ('{"id": "b", "weight": 0}', 'entry 2 "weight"=0: is out of range; give more than 0'),
        ('{"id": "b", "weight": -1}', 'entry 2 "weight"=-1: is out of range; give more than 0'),
        ('{"id": "b", "weight": "1"}', 'entry 2 "weight"="1": is not a number; write it without quotes'),
        ('{"id": "b", "weight": true}', 'entry 2 "weight"=true: is not a number; write it without quotes'),
        (
            '{"id": "b", "weight": 1e999}',
            'entry 2 "weight"=Infinity: is not a finite number; write one such as 0.1 or 1e-4',
        ),
        ('{"id": "b", "limit": 0}', 'entry 2 "limit"=0: is out of range; give at least 1'),
        ('{"id": "b", "repeat": 0}', 'entry 2 "repeat"=0: is out of range; give more than 0'),
        (
            '{"id": "b", "columns": {"prompt": 1}}',
            'entry 2 "columns" "prompt"=1: is not a text; put it in double quotes',
        ),
        (
            '{"id": "b", "encoding": "utf9"}',
            'entry 2 "encoding"="utf9": is no text encoding; write utf-8, cp932, latin-1 or another one Python knows',
        ),
        ('"b"', 'entry 2="b": is no JSON object; write {"id": "..."}'),
    ],
)
def test_mistakes_in_a_source(entry, problem):
    """Each names the entry of the mix, its key and its value."""
    found = problems(f"""SFT_DATASET_MIX='[{{"id": "a"}}, {entry}]'""")
    assert found == [f"SFT_DATASET_MIX {problem} (stage1.env line 4)"]


def test_broken_json_points_at_the_position():
    """The kept text, the hint, the line of the env file and a caret under the place."""
    found = problems("""\nSFT_DATASET_MIX='[\n  {"id": "a"},\n  {"id" "b"}\n]'\n""")
    assert found == [
        "[WARNING] Failed to parse DATASET_MIX: Expecting ':' delimiter: line 3 column 9 (char 25); write "
        "SFT_DATASET_MIX as JSON, single quotes outside, double quotes inside (stage1.env line 7)\n"
        '      {"id" "b"}\n'
        "            ^"
    ]


@pytest.mark.parametrize(
    "value",
    [
        """"[{'id': 'a'}]\"""",
        """'{"id": "a"}'""",
        "'[]'",
        "'[1, NaN]'",
        """'[{"id": "a", "id": "b"}]'""",
        """'[{"id": "\\\\ud800"}]'""",
        "[",
        "'" + "[" * 100_000 + "'",
        "'[" + "1" * 5000 + "]'",
        """"[{"id": "a"}]\"""",
        """'[{"id": "it's"}]'""",
        """'[\n  {"id": "a"}\n]""",
    ],
)
def test_every_broken_mix_gets_the_kept_text(value):
    """Wrong quotes, no list, NaN, a key twice, half characters, endless nesting: one problem with the hint."""
    (problem,) = problems(f"SFT_DATASET_MIX={value}\n")
    assert problem.startswith("[WARNING] Failed to parse DATASET_MIX: ")
    assert "single quotes outside, double quotes inside (stage1.env line 4)" in problem


def test_all_mistakes_in_one_listing_in_the_order_of_the_lines():
    """Values, names, rules that join settings, unreadable lines and duplicates together; the file first."""
    text = (
        "SFT_GEN_EVAL=structured\nSFT_VAL_RATIO=0\nSFT_LR=x\nSFT_LR=1e-4\nthis is no setting\n"
        "SFT_LOAD_IN_4BIT=1\nSFT_LOAD_IN_8BIT=1\n"
    )
    assert problems(
        text, base="SFT_BASE_MODEL=org/model\n", overrides=["SFT_SEED=-1"], environ={"SFT_EPOCHS": "-1"}
    ) == [
        "SFT_GEN_EVAL=structured: there are no rows to generate answers for; set SFT_VAL_RATIO above 0, or "
        "SFT_EVAL_DATASET, or SFT_GEN_EVAL_DATASET (stage1.env line 2)",
        "SFT_LR: is written twice, on lines 4 and 5 of stage1.env; keep one of them",
        "stage1.env line 6: 'this is no setting' cannot be read; write NAME=value, with a value of several lines "
        "between single quotes",
        "SFT_LOAD_IN_8BIT=1: SFT_LOAD_IN_4BIT is on as well; keep one of them (stage1.env line 8)",
        "SFT_EPOCHS=-1: is out of range; give at least 0 (environment)",
        "SFT_SEED=-1: is out of range; give at least 0 (--set)",
        "SFT_DATASET_ID=: is not set, nor is SFT_DATASET_MIX; name the data set to train on in one of them (not set)",
        "SFT_OUT_LORA_DIR=: is not set; write SFT_OUT_LORA_DIR=<path of the results, without _stageN> in stage1.env",
    ]


# Files


def test_missing_env_file():
    """One problem; that base model and the rest are missing too goes without saying."""
    with pytest.raises(Problems) as caught:
        load_settings(7, env_dir=Path("nowhere"), environ={})
    assert caught.value.problems == [
        "Stage env file not found: nowhere/stage7.env; create it, or name its folder with --env-dir"
    ]


def test_empty_env_file():
    """The three things every stage needs."""
    assert problems(base="") == [
        "SFT_BASE_MODEL=: is not set; write SFT_BASE_MODEL=<hub id or model folder> in stage1.env",
        "SFT_DATASET_ID=: is not set, nor is SFT_DATASET_MIX; name the data set to train on in one of them (not set)",
        "SFT_OUT_LORA_DIR=: is not set; write SFT_OUT_LORA_DIR=<path of the results, without _stageN> in stage1.env",
    ]


def test_other_encodings_and_folders_are_named(here):
    """UTF-16 and Shift JIS files and a folder in place of the file: a problem that names it."""
    path = here / "stage1.env"
    for text in (BASE.encode("utf-16"), f"{BASE}# 学習".encode("cp932")):
        path.write_bytes(text)
        with pytest.raises(Problems, match=r"stage1\.env: is not UTF-8 \(byte \d+\); save it again as UTF-8"):
            load_settings(1, env_dir=here, environ={})
    path.unlink()
    path.mkdir()
    with pytest.raises(Problems, match=r"stage1\.env: cannot be read \(Is a directory\); make it a readable file"):
        load_settings(1, env_dir=here, environ={})


def test_a_forgotten_quote_is_one_problem():
    """The unreadable lines after it and the settings it swallows are not reported as well."""
    text = "SFT_OUT_LORA_DIR='out\nSFT_DATASET_ID=org/rows\n"
    assert problems(text, base="SFT_BASE_MODEL=org/model\n") == [
        "stage1.env line 2: 'SFT_OUT_LORA_DIR' cannot be read; write NAME=value, with a value of several lines between "
        "single quotes"
    ]


def test_a_quote_that_swallows_a_setting():
    """Two forgotten quotes that happen to match hide a setting: found, though python-dotenv reads it happily."""
    found = problems("SFT_RUN_NAME='a\nSFT_LR=1e-3\nSFT_NOTE='\n")
    assert (
        found[0]
        == "SFT_RUN_NAME: its quote swallows the line of SFT_LR; close it where the value ends (stage1.env line 4)"
    )


def test_paths_that_cannot_work(here):
    """Output below a file, a path that names no folder, an unset variable; a base model that is no model."""
    (here / "file").write_text("")
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    out = "SFT_OUT_LORA_DIR"
    for value, problem in {
        "file": "file is a file; choose a path where folders can be made",
        "file/out": f"{here}/file is a file; choose a path where folders can be made",
        "..": "names no folder; end it with a name, such as outputs/my_model",
        "$NOWHERE/out": "$NOWHERE is not set; set it, or write the path out",
    }.items():
        assert problems(overrides=[f"{out}={value}"]) == [f"{out}={value}: {problem} (--set)"]
    base = "SFT_BASE_MODEL"
    for value, problem in {
        "adapter": "is an adapter, no model; name the folder or hub id of a base model",
        ".": "is no model folder: config.json is missing; name the folder or hub id of a base model",
        "file": "is a file; name the folder of a model, or a hub id",
        "/no/such": "there is no such folder; correct the path, or give a hub id such as org/model",
    }.items():
        assert problems(overrides=[f"{base}={value}"]) == [f"{base}={value}: {problem} (--set)"]


# Rules that join settings


def test_contradictions():
    """What cannot work together is refused; the same settings with the cause removed are accepted."""
    for text, start in {
        "SFT_LOAD_IN_4BIT=1\nSFT_USE_LORA=0": "SFT_LOAD_IN_4BIT=1: quantised weights cannot be trained themselves",
        "SFT_USE_LORA=0\nSFT_DTYPE=float16": "SFT_DTYPE=float16: weights trained themselves overflow in float16; take",
        "SFT_EARLY_STOPPING_PATIENCE=3\nSFT_VAL_RATIO=0": "SFT_EARLY_STOPPING_PATIENCE=3: early stopping needs",
        "SFT_LR_SCHEDULER=greedy\nSFT_VAL_RATIO=0": "SFT_LR_SCHEDULER=greedy: greedy goes by the loss on validation",
        "SFT_MIN_LR_RATIO=0.1\nSFT_LR_SCHEDULER=linear": "SFT_MIN_LR_RATIO=0.1: SFT_LR_SCHEDULER=linear has no lowest",
        "SFT_GROUP_BY_LENGTH=1\nSFT_SHUFFLE=none": "SFT_GROUP_BY_LENGTH=1: SFT_SHUFFLE=none keeps an order",
    }.items():
        (problem,) = problems(text)
        assert problem.startswith(start)
        assert load(text.split("\n")[0])
    assert load("SFT_GEN_EVAL=structured\nSFT_VAL_RATIO=0\nSFT_GEN_EVAL_DATASET=rows.jsonl")
    assert load("SFT_EPOCHS=0\nSFT_MAX_STEPS=5").max_steps == 5
    assert load("SFT_GEN_EVAL=extraction\nSFT_METRIC_FOR_BEST=gen_field_exact_match_rate/person_name")


def test_metric_directions():
    """Loss, perplexity and false positives: lower; every other metric we log: higher; unknown ones are refused."""
    assert {name: metric_direction(name) for name in (
        "loss", "eval_loss", "perplexity", "eval_perplexity", "gen_fp_rate_on_negative", "gen_score",
        "gen_score/text_to_toml", "eval_gen_parse_rate", "gen_offender_presence_recall",
        "gen_field_exact_match_rate/person_name",
    )} == {
        "loss": False, "eval_loss": False, "perplexity": False, "eval_perplexity": False,
        "gen_fp_rate_on_negative": False, "gen_score": True, "gen_score/text_to_toml": True,
        "eval_gen_parse_rate": True, "gen_offender_presence_recall": True,
        "gen_field_exact_match_rate/person_name": True,
    }  # fmt: skip
    for unknown in ("accuracy", "perplexity/x", "loss/", "", "eval_"):
        with pytest.raises(ValueError, match="is not a metric that is logged"):
            metric_direction(unknown)


def test_result_neutral_names_are_settings():
    """A renamed setting would silently become one whose change refuses a resume."""
    assert set(NAMES) >= RESULT_NEUTRAL
    assert "SFT_LR" not in RESULT_NEUTRAL


def test_closest():
    """Spelling without case; a beginning beats a likeness; nothing for the unlike."""
    assert closest("BFLOAT_16", ("float32", "bfloat16")) == "bfloat16"
    assert closest("adam", ("adalomo", "adamw_torch")) == "adamw_torch"
    assert closest("zzz", ("float32",)) == ""


# Around


def test_settings_page_is_current():
    """docs/settings.md is what `python -m sft.settings.page` prints."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page()


def test_every_setting_has_one_sentence():
    """A sentence ends in a full stop and has no other sentence after it."""
    for name, attribute in NAMES.items():
        sentence = Settings.model_fields[attribute].description or ""
        assert sentence.endswith("."), name
        assert ". " not in sentence, name


def test_the_example_file_loads():
    """.env.example works as a stage file as it stands, its commented mix included."""
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert load(text, base="").lr == 1e-4
    uncommented = text.replace("# SFT_DATASET_MIX", "SFT_DATASET_MIX").replace("#   {", "  {").replace("# ]'", "]'")
    assert [source.weight for source in load(uncommented, base="").sources] == [1.0, 2.0]


def test_loading_is_light():
    """A mistake is answered in under half a second of CPU time, without importing a heavy library."""
    program = (
        "import resource, sys\nfrom pathlib import Path\nfrom sft.errors import Problems\n"
        "from sft.settings import load_settings\n"
        "try:\n    load_settings(1, env_dir=Path('nowhere'), environ={'SFT_LR': 'x'})\n"
        "except Problems as error:\n    print(len(error.problems))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'mlflow', 'trl', 'peft', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))\nusage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(usage.ru_utime + usage.ru_stime)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    count, heavy, seconds = answer.stdout.splitlines()
    assert (count, heavy) == ("2", "[]")
    assert float(seconds) < 0.5


# Anything at all


NASTY = st.sampled_from(
    [*NAMES, "SFT_", "'", '"', "=", "#", "\n", "\r\n", "[", "{", "}", "]", '{"id": "a"}', "\\", "$A", "${", "~", "\0",
     "export ", ",", "-1", "1e999", "nan", "true", "学習", "\ud7ff", " ", "\t", "1" * 400, "/" * 300, "a" * 300]
)  # fmt: skip


@effort(max_examples=150, deadline=None)
@examples(st.lists(st.one_of(NASTY, st.text(max_size=8)), max_size=25), st.lists(st.text(max_size=12), max_size=2))
def test_any_env_file_is_settings_or_problems(tmp_path_factory, parts, overrides):
    """Whatever is in the file or in --set, the answer is settings that can be recorded or a list of problems."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "stage1.env").write_bytes((BASE + "".join(parts)).encode("utf-8", "surrogatepass"))
    try:
        settings = load_settings(1, env_dir=folder, overrides=overrides, environ={"A": "a"})
    except Problems as caught:
        assert caught.problems
        assert all(problem.encode() for problem in caught.problems)
    else:
        json.dumps(settings.record(), allow_nan=False).encode()


@effort(max_examples=150, deadline=None)
@examples(st.sampled_from(list(NAMES)), st.one_of(st.text(max_size=30), NASTY, st.from_regex(r"[-+]?\d*\.?\d*(e\d+)?")))
def test_any_value_is_settings_or_problems(name, value):
    """Every setting survives every text."""
    try:
        load(overrides=[f"{name}={value}"])
    except Problems as caught:
        assert all(name in problem or "SFT_" in problem for problem in caught.problems)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["id", "weight", "limit", "repeat", "columns", "split", "x"]), inner, max_size=4
    ),
    max_leaves=8,
)  # fmt: skip


@effort(max_examples=100, deadline=None)
@examples(JSON)
def test_any_json_as_a_mix_is_settings_or_problems(mix):
    """Whatever JSON a mix is, its entries are sources or named as problems."""
    try:
        settings = load(environ={"SFT_DATASET_MIX": json.dumps(mix)})
    except Problems as caught:
        assert all("DATASET_MIX" in problem for problem in caught.problems)
    else:
        assert len(settings.sources) == len(mix)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", 'is no JSON object; write {"enable_thinking": false}'),
        ("{enable_thinking: false}", "JSON"),
        ('{"no name": 1}', '"no name" cannot be the name of an option'),
        ('{"tools": []}', '"tools" is not yours to choose: it is filled in for every row; leave it out'),
        ('{"self": 1}', '"self" is not yours to choose'),
    ],
)
def test_template_options_are_an_object_of_options(text, words):
    """What the program itself hands to templates cannot be overridden; anything else a template may read."""
    (problem,) = problems(f"SFT_TEMPLATE_OPTIONS='{text}'\n")
    assert "TEMPLATE_OPTIONS" in problem
    assert words in problem
    options = load('SFT_TEMPLATE_OPTIONS=\'{"enable_thinking": false, "effort": "low"}\'\n').template_options
    assert options == {"enable_thinking": False, "effort": "low"}

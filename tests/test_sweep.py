"""`--check` is the run: every setting through wrong, missing and impossible values, asked of both.

The same exit code, the same words, one JSON document on stdout, and after a refusal nothing on the disk.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from safetensors.torch import load_file, save_file

from sft.errors import hide_secrets
from sft.settings import Settings, load_settings
from sft.settings.mistakes import literals
from sft.settings.schema import NAMES
from sft.settings.values import Optimizer
from sft.stages.stage import Stage
from sft.storage import seals
from tests.ladders import add_checkpoint
from tests.tiny import CHATML, run_train, write_model, write_rows, write_stage

# Settings whose type takes any text: names that people give, and those whose wrong values stand further below.
FREE = {
    "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI", "SFT_RUN_NAME", "SFT_MODEL_REVISION",
    "SFT_ATTN", "SFT_CHAT_TEMPLATE", "SFT_DATASET_SPLIT", "SFT_METRIC_FOR_BEST", "SFT_GEN_EVAL", "SFT_JSON_SCHEMA",
}  # fmt: skip
BEGINS = ("[ERROR]", "[WARNING] Failed to parse")


def parts_of(annotation: Any) -> Iterator[Any]:
    """A type, and what stands beside it in Annotated and unions, all the way down."""
    yield annotation
    for part in get_args(annotation):
        yield from parts_of(part)


def wrong_texts(name: str) -> list[str]:
    """Texts of another type than the setting's, beyond its bounds, or not among its choices."""
    field = Settings.model_fields[NAMES[name]]
    parts = [part for given in (field.annotation, *field.metadata) for part in parts_of(given)]
    texts = [f"{choice}x" for choice in literals(field.annotation)[:1]]
    if bool in parts:
        texts += ["perhaps", "2", "on"]
    if int in parts or float in parts:
        texts += ["many", "nan", "1e999", "1,5", "0x10", "--1", "-7"]
    if int in parts:
        texts += ["1.5"]
    for kind, beyond in (("ge", -1), ("gt", 0), ("lt", 0), ("le", 1)):
        texts += [str(getattr(part, kind) + beyond) for part in parts if getattr(part, kind, None) is not None]
    parsers = {getattr(getattr(part, "func", None), "__name__", "") for part in parts}
    texts += ["{", "[]", "3", '{"a": NaN}', '[{"id": ""}]'] if parsers & {"parse_mix", "parse_rules"} else []
    texts += ["{", '{"a b": 1}', '{"messages": 1}', "[1]"] if "parse_template_options" in parsers else []
    texts += ["[", "[1]", '[{"id": "a", "wieght": 2}]'] if "parse_id_or_mix" in parsers else []
    texts += [","] if "parse_names" in parsers else []
    texts += ["$SFT_NOT_SET/x"] if "expand" in parsers else []
    texts += ["hf://me", "s3://bucket/x"] if "check_mirror" in parsers else []
    return texts


def listed(stderr: str) -> str:
    """The problems as they stand on the screen, without what was said before them."""
    lines = stderr.splitlines()
    first = next((k for k, line in enumerate(lines) if line.startswith(BEGINS)), len(lines))
    return "\n".join(lines[first:])


class Place:
    """A folder with a model, rows and a stage; what --check and a run make of its settings."""

    def __init__(self, folder: Path, capsys: Any) -> None:
        self.folder, self.capsys = folder, capsys
        self.outputs = folder / "outputs"
        self.common: dict[str, Any] = {
            "SFT_BASE_MODEL": folder / "base", "SFT_DATASET_ID": folder / "rows.jsonl", "SFT_LOGGING_STEPS": 10,
            "SFT_OUT_LORA_DIR": self.outputs / "out", "SFT_MAX_STEPS": 1, "SFT_GRAD_ACCUM": 1, "SFT_EVAL_STEPS": 10,
        }  # fmt: skip

    def both(self, **settings: Any) -> tuple[int, str]:
        """The exit code and the words, the same of both."""
        write_stage(self.folder, 1, self.common | settings)
        self.capsys.readouterr()
        code = run_train("--stage", 1, "--env-dir", self.folder, "--check", "--json")
        checked = self.capsys.readouterr()
        problems = json.loads(checked.out)["problems"]
        there = self.outputs.exists()
        ran = run_train("--stage", 1, "--env-dir", self.folder)
        said = listed(self.capsys.readouterr().err)
        assert (code, listed(checked.err)) == (ran, said)
        marked = [text if text.startswith("[") else f"[ERROR] {text}" for text in problems]
        count = f"{len(marked)} problem{'s' if len(marked) > 1 else ''} to solve; nothing was written"
        assert code in (0, 2)
        assert said == ("\n".join([*map(hide_secrets, marked), count]) if code else "")
        if code and not there:
            assert not self.outputs.exists(), sorted(self.outputs.rglob("*"))
        return code, said

    def refused(self, **settings: Any) -> str:
        code, said = self.both(**settings)
        assert code == 2, settings
        return said


@pytest.fixture
def place(tmp_path: Path, capsys: Any, model: Path) -> Place:
    shutil.copytree(model, tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 12)
    return Place(tmp_path, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.mark.parametrize("name", sorted(NAMES.keys() - FREE))
def test_texts_that_no_setting_may_have(name: str, tmp_path: Path, capsys: Any):
    """Found by the settings alone, so that no model is needed; each line names the setting."""
    place = Place(tmp_path, capsys)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    texts = wrong_texts(name)
    assert texts
    for text in texts:
        assert name.removeprefix("SFT_") in place.refused(**{name: text}), text


Change = Callable[[Path], dict[str, Any]]


def template(text: str, **settings: Any) -> Change:
    """A chat template of one's own that fails."""

    def change(folder: Path) -> dict[str, Any]:
        (folder / "own.jinja").write_text(text)
        return {"SFT_CHAT_TEMPLATE": folder / "own.jinja"} | settings

    return change


def base(name: str, content: bytes | None, **settings: Any) -> Change:
    """A file of the base model that is not there or holds something else."""

    def change(folder: Path) -> dict[str, Any]:
        (folder / "base" / name).unlink(missing_ok=True)
        if content is not None:
            (folder / "base" / name).write_bytes(content)
        return settings

    return change


def config(**values: Any) -> Change:
    """Entries of config.json that say something else; None takes them out."""

    def change(folder: Path) -> dict[str, Any]:
        path = folder / "base" / "config.json"
        record = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
        return {}

    return change


def cut(name: str) -> Change:
    def change(folder: Path) -> dict[str, Any]:
        path = folder / "base" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return {}

    return change


def tensors(change_them: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def change(folder: Path) -> dict[str, Any]:
        path = folder / "base" / "model.safetensors"
        save_file(change_them(load_file(path)), path, metadata={"format": "pt"})
        return {}

    return change


def rows(setting: str, content: bytes, name: str = "wrong.jsonl", **settings: Any) -> Change:
    """A data file that holds this."""

    def change(folder: Path) -> dict[str, Any]:
        (folder / name.partition(":")[0]).write_bytes(content)
        return {setting: folder / name} | settings

    return change


def mixed(*sources: dict[str, Any], **settings: Any) -> Change:
    """A mix of the rows with these keys beside their id."""

    def change(folder: Path) -> dict[str, Any]:
        mix = [{"id": str(folder / "rows.jsonl")} | source for source in sources]
        return {"SFT_DATASET_MIX": json.dumps(mix)} | settings

    return change


def measure(text: str, **settings: Any) -> Change:
    """A measure of one's own, of this text."""

    def change(folder: Path) -> dict[str, Any]:
        (folder / "own.py").write_text(text)
        return GEN | {"SFT_GEN_EVAL": f"{folder / 'own.py'}:score"} | settings

    return change


def plain(**settings: Any) -> Change:
    return lambda folder: settings


def below(folder_setting: str, tail: str, **settings: Any) -> Change:
    return lambda folder: {folder_setting: f"{folder}/{tail}"} | settings


LOOP = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NO_PROMPT = "{% if add_generation_prompt and 'JSON' in messages[0]['content'] %}{{ 1 / 0 }}{% endif %}"
WRONG_ROWS = {
    "empty": b"", "no-json": b"{{{\n", "no-columns": b'{"a": 1}\n', "binary": b"\x80\x81\x00", "list": b"[1, 2]\n",
    "ambiguous": b'{"text": "a", "answer": "b"}\n',
    "no-roles": b'{"messages": [{"content": "a"}]}\n', "no-turns": b'{"messages": []}\n', "null": b"null\n",
    "numbers": b'{"messages": 3}\n',
}  # fmt: skip
ASKED = WRONG_ROWS | {"no-rows": b"\n"}
LONG = b'{"prompt": "a", "completion": "' + b"b " * 300 + b'"}\n'
GEN = {"SFT_GEN_EVAL": "structured", "SFT_GEN_EVAL_SAMPLES": 1, "SFT_GEN_MAX_NEW_TOKENS": 2}
REFUSED: dict[str, Change] = {
    "model-missing": plain(SFT_BASE_MODEL="./nowhere/model"),
    "model-on-no-hub": plain(SFT_BASE_MODEL="org/never-there"),
    "model-and-data-on-no-hub": plain(SFT_BASE_MODEL="org/never-there", SFT_DATASET_ID="org/neither"),
    "model-on-no-hub-and-data-missing": lambda folder: {
        "SFT_BASE_MODEL": "org/never-there",
        "SFT_DATASET_ID": folder / "nowhere.jsonl",
    },
    "revision-on-no-hub": plain(SFT_BASE_MODEL="org/never-there", SFT_MODEL_REVISION="v2"),
    "model-is-a-file": below("SFT_BASE_MODEL", "rows.jsonl"),
    "config-missing": base("config.json", None),
    "config-empty": base("config.json", b""),
    "config-damaged": base("config.json", b"{"),
    "config-list": base("config.json", b"[]"),
    "config-null": base("config.json", b"null"),
    "config-binary": base("config.json", b"\x80\x81"),
    "config-of-nothing": base("config.json", b"{}"),
    "architecture-unknown": config(model_type="flurb"),
    "architecture-of-images": config(model_type="vit"),
    "architecture-with-code": config(
        auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, model_type="own"
    ),
    "layers-in-words": config(num_hidden_layers="two"),
    "heads-none": config(num_attention_heads=0),
    "heads-that-do-not-divide": config(num_attention_heads=3, num_key_value_heads=2),
    "width-negative": config(hidden_size=-4),
    "activation-unknown": config(hidden_act="flurb"),
    "quantised-gptq": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "rope-unknown": config(rope_parameters={"rope_type": "flurb", "rope_theta": 1.0}),
    "weights-missing": base("model.safetensors", None),
    "weights-empty": base("model.safetensors", b""),
    "weights-cut": cut("model.safetensors"),
    "weights-html": base("model.safetensors", b"<html>not found</html>"),
    "weights-narrow": tensors(lambda those: {name: t[:8].clone() for name, t in those.items()}),
    "weights-of-another": tensors(lambda those: {f"other.{name}": t for name, t in those.items()}),
    "weights-without-a-layer": tensors(lambda those: {n: t for n, t in those.items() if "layers.1." not in n}),
    "weights-with-a-layer-more": config(num_hidden_layers=1, layer_types=None, max_window_layers=None),
    "weights-with-biases": tensors(
        lambda those: those | {f"{name[:-6]}bias": t[:, 0].clone() for name, t in those.items() if "q_proj" in name}
    ),
    "index-damaged": base("model.safetensors.index.json", b"{"),
    "shard-missing": base("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}'),
    "tokenizer-missing": base("tokenizer.json", None),
    "tokenizer-damaged": base("tokenizer.json", b"{"),
    "tokenizer-empty": base("tokenizer.json", b""),
    "tokenizer-config-damaged": base("tokenizer_config.json", b"{"),
    "template-none": base("chat_template.jinja", None),
    "template-binary": base("chat_template.jinja", b"\x80\x81"),
    "positions": plain(SFT_MAX_SEQ_LEN=2),
    "overlong": plain(SFT_MAX_SEQ_LEN=8, SFT_OVERLONG="error"),
    "template-missing": plain(SFT_CHAT_TEMPLATE="./nowhere.jinja"),
    "template-folder": below("SFT_CHAT_TEMPLATE", "base"),
    "template-of-bytes": rows("SFT_CHAT_TEMPLATE", b"\x80", name="own.jinja"),
    "template-empty": template(""),
    "template-constant": template("hello"),
    "template-syntax": template("{% for %}"),
    "template-open": template("{{"),
    "template-tag": template("{% flurb %}"),
    "template-filter": template("{{ messages | flurb }}"),
    "template-include": template("{% include 'x' %}"),
    "template-undefined": template("{{ nothing.at.all }}"),
    "template-call": template("{{ nothing() }}"),
    "template-attribute": template("{{ messages.a.b }}"),
    "template-overflow": template("{% for x in range(10**9) %}{{ x }}{% endfor %}"),
    "template-big-power": template("{{ 2.0 ** 100000 }}"),
    "template-type": template("{{ messages + 1 }}"),
    "template-value": template("{{ 'a'.index('b') }}"),
    "template-key": template("{{ {}['a']['b'] }}"),
    "template-zero": template("{{ 1 / 0 }}"),
    "template-recursion": template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "template-deep": template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    "template-raises": template("{{ raise_exception('no: ' + messages[0]['role']) }}"),
    "template-security": template("{{ messages.append(1) }}" + LOOP),
    "template-unsafe": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template-format": template("{{ '%d' | format('a') }}"),
    "template-encode": template("{{ 'é'.encode('ascii') }}"),
    "template-surrogate": template("{{ '\\ud800' }}" + LOOP),
    "template-stop": template("{{ {}.values().__iter__().__next__() }}"),
    "template-date": template("{{ strftime_now(3) }}"),
    "template-of-prompts": template(NO_PROMPT + CHATML, **GEN),
    "template-without-end": template(LOOP),
    "options-unknown": plain(SFT_TEMPLATE_OPTIONS='{"flurb": 1}'),
    "options-of-another-type": template("{{ 1 + deep }}" + CHATML, SFT_TEMPLATE_OPTIONS='{"deep": "a"}'),
    "targets-nothing": plain(SFT_LORA_TARGET_MODULES="flurb"),
    "targets-head": plain(SFT_LORA_TARGET_MODULES="lm_head"),
    "targets-norm": plain(SFT_LORA_TARGET_MODULES="q_proj,input_layernorm"),
    "targets-linear-and-more": plain(SFT_LORA_TARGET_MODULES="all-linear,q_proj"),
    "targets-of-experts": plain(SFT_LORA_TARGET_MODULES="experts"),
    "saved-nothing": plain(SFT_LORA_MODULES_TO_SAVE="flurb"),
    "saved-block": plain(SFT_LORA_MODULES_TO_SAVE="mlp"),
    "saved-target": plain(SFT_LORA_MODULES_TO_SAVE="q_proj"),
    "saved-quantised": plain(SFT_LORA_MODULES_TO_SAVE="q_proj", SFT_LORA_TARGET_MODULES="v_proj", SFT_LOAD_IN_8BIT=1),
    "saved-whole": plain(SFT_LORA_MODULES_TO_SAVE="lm_head", SFT_USE_LORA=0),
    "float16-whole": plain(SFT_DTYPE="float16", SFT_USE_LORA=0),
    "4bit-whole": plain(SFT_LOAD_IN_4BIT=1, SFT_USE_LORA=0),
    "8bit-whole": plain(SFT_LOAD_IN_8BIT=1, SFT_USE_LORA=0),
    "4bit-and-8bit": plain(SFT_LOAD_IN_4BIT=1, SFT_LOAD_IN_8BIT=1),
    "attention-flash2": plain(SFT_ATTN="flash_attention_2"),
    "attention-flash3": plain(SFT_ATTN="flash_attention_3"),
    "attention-flash4": plain(SFT_ATTN="flash_attention_4"),
    "attention-kernel": plain(SFT_ATTN="org/kernel"),
    "attention-unknown": plain(SFT_ATTN="flurb"),
    "tensorboard": plain(SFT_REPORT_TO="tensorboard"),
    "wandb": plain(SFT_REPORT_TO="wandb"),
    "report-to-nobody": plain(SFT_REPORT_TO="flurb"),
    "none-and-mlflow": plain(SFT_REPORT_TO="none,mlflow"),
    "out-is-a-file": below("SFT_OUT_LORA_DIR", "rows.jsonl"),
    "out-below-a-file": below("SFT_OUT_LORA_DIR", "rows.jsonl/out"),
    "out-root": plain(SFT_OUT_LORA_DIR="/"),
    "data-missing": below("SFT_DATASET_ID", "nowhere.jsonl"),
    "data-on-no-hub": plain(SFT_DATASET_ID="org/never-there"),
    "data-folder": below("SFT_DATASET_ID", "none"),
    "data-folder-of-a-model": below("SFT_DATASET_ID", "base"),
    "data-pattern": below("SFT_DATASET_ID", "*.parquet"),
    "data-kind-unknown": rows("SFT_DATASET_ID", b"a", name="rows.flurb"),
    "data-parquet": rows("SFT_DATASET_ID", b"PAR1", name="rows.parquet"),
    "data-csv": rows("SFT_DATASET_ID", b"a,b\n1\n", name="rows.csv"),
    "split-missing": plain(SFT_DATASET_SPLIT="flurb"),
    "split-slice": plain(SFT_DATASET_SPLIT="train[:x]"),
    "nothing-set": plain(SFT_DATASET_ID=""),
    "mix-missing-strict": mixed({}, {"id": "./no.jsonl"}, SFT_STRICT=1),
    "mix-missing-all": mixed({"id": "./no.jsonl"}, {"id": "./nor.jsonl"}),
    "mix-columns": mixed({"columns": {"flurb": "messages"}}),
    "mix-encoding": mixed({"encoding": "utf-16"}),
    "mix-encoding-unknown": mixed({"encoding": "flurb"}),
    "validation-missing": below("SFT_EVAL_DATASET", "nowhere.jsonl"),
    "metric-of-nothing": plain(SFT_METRIC_FOR_BEST="accuracy"),
    "metric-not-generated": plain(SFT_METRIC_FOR_BEST="gen_parse_rate"),
    "metric-not-measured": plain(SFT_METRIC_FOR_BEST="gen_score/text_to_flurb", **GEN),
    "plateau-of-one-row": rows("SFT_DATASET_ID", b'{"prompt": "a", "completion": "b"}\n', SFT_LR_SCHEDULER="greedy"),
    "loss-without-rows": plain(SFT_METRIC_FOR_BEST="eval_loss", SFT_VAL_RATIO=0),
    "patience-without-rows": plain(SFT_EARLY_STOPPING_PATIENCE=2, SFT_VAL_RATIO=0),
    "plateau-without-rows": plain(SFT_LR_SCHEDULER="reduce_lr_on_plateau", SFT_VAL_RATIO=0),
    "floor-without-cosine": plain(SFT_LR_SCHEDULER="linear", SFT_MIN_LR_RATIO=0.1),
    "questions-missing": below("SFT_GEN_EVAL_DATASET", "nowhere.jsonl", **GEN),
    "questions-on-no-hub": plain(SFT_GEN_EVAL_DATASET="org/never-there", **GEN),
    "questions-none": plain(SFT_VAL_RATIO=0, **GEN),
    "upsampling-without-rules": plain(SFT_USE_UPSAMPLING=1),
    "upsampling-to-nothing": plain(SFT_USE_UPSAMPLING=1, SFT_UPSAMPLE_RULES='{"text_to_json": 0}'),
    "replay-of-nothing": plain(SFT_REPLAY=0.05),
    "replay-alone": plain(SFT_REPLAY=1),
    "evaluation-unknown": plain(SFT_GEN_EVAL="structure"),
    "measure-missing": plain(SFT_GEN_EVAL="./nowhere.py:score"),
    "measure-without-function": measure("def other(answers, rows): return 1"),
    "measure-is-no-function": measure("score = 3"),
    "measure-of-bad-syntax": measure("def score(:"),
    "measure-that-exits": measure("import sys; sys.exit(3)"),
    "measure-of-a-missing-package": measure("import no_such_package"),
    "measure-is-no-python": rows("SFT_GEN_EVAL", b"score", name="own.txt:score"),
    "measure-not-chosen-by": measure("def score(answers, rows): return 1", SFT_METRIC_FOR_BEST="gen_other"),
    "measure-of-text-chosen-by": measure("def score(answers, rows): return 'good'", SFT_METRIC_FOR_BEST="gen_score"),
    "measure-lower-score": measure("def score(answers, rows): return 1\nscore.lower_is_better = 'score'"),
    "schema-missing": plain(SFT_JSON_SCHEMA="./nowhere.json", **GEN),
    "schema-of-nothing": rows("SFT_JSON_SCHEMA", b'{"type": "object"}', name="own.json"),
    **{
        f"schema-{kind}": rows("SFT_JSON_SCHEMA", content, name="own.json", **GEN)
        for kind, content in {"empty": b"", "list": b"[1]", "number": b"3", "type": b'{"type": "flurb"}'}.items()
    },
    "schema-rate-without-schema": plain(SFT_METRIC_FOR_BEST="gen_schema_rate", **GEN),
    "gate-of-nothing": plain(SFT_GATE=1),
    "gate-of-samples": plain(SFT_GATE=1, **GEN | {"SFT_GEN_EVAL": "samples"}),
    "order-and-groups": plain(SFT_SHUFFLE="none", SFT_GROUP_BY_LENGTH=1),
    "groups-by-source": plain(SFT_SHUFFLE="sources", SFT_GROUP_BY_LENGTH=1),
    "no-epochs": plain(SFT_EPOCHS=0, SFT_MAX_STEPS=-1),
    **{f"data-{kind}": rows("SFT_DATASET_ID", content) for kind, content in WRONG_ROWS.items()},
    **{f"validation-{kind}": rows("SFT_EVAL_DATASET", content) for kind, content in ASKED.items()},
    **{f"questions-{kind}": rows("SFT_GEN_EVAL_DATASET", content, **GEN) for kind, content in ASKED.items()},
    "validation-over-long": rows("SFT_EVAL_DATASET", LONG),
    "questions-plain": rows("SFT_GEN_EVAL_DATASET", b'{"text": "a b"}\n', **GEN),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_can_come_to_nothing(case: str, place: Place):
    """Refused before anything is written."""
    place.refused(**REFUSED[case](place.folder))


def test_a_disk_too_small_for_the_stage(place: Place, monkeypatch: Any):
    """What it will write is counted for each stage, in the same words; a small disk alone is no problem."""
    monkeypatch.setattr("sft.storage.atomic.free_bytes", lambda path: 10_000)
    said = place.refused()
    assert f"SFT_OUT_LORA_DIR={place.outputs}/out: stage 1 will write up to " in said
    monkeypatch.undo()
    monkeypatch.setattr("sft.planning.machine.shutil.disk_usage", lambda path: SimpleNamespace(free=2**29))
    place.both(SFT_MAX_STEPS=1)


def test_a_checkpoint_of_another_engine(place: Place, capsys: Any):
    """State that DeepSpeed has split is for DeepSpeed, known before data and model are loaded."""
    write_stage(place.folder, 1, place.common)
    with Stage.open(load_settings(1, env_dir=place.folder)) as stage:
        stage.begin()
        checkpoint = add_checkpoint(stage.folder, 1, sealed=False)
        (checkpoint / "global_step1").mkdir()
        for name in ("latest", "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            (checkpoint / name).write_bytes(b"")
        seals.seal(checkpoint)
    assert "was saved under DeepSpeed ZeRO-2 with 1 processes, this run is one process" in place.refused()


def test_a_damaged_checkpoint_stays_where_it_is_when_the_stage_is_refused(place: Place, monkeypatch: Any):
    """That nothing was written is true of its folder as well."""
    write_stage(place.folder, 1, place.common)
    with Stage.open(load_settings(1, env_dir=place.folder)) as stage:
        stage.begin()
        add_checkpoint(stage.folder, 1, sealed=False)
    before = sorted(stage.folder.rglob("*"))
    monkeypatch.setattr("sft.storage.atomic.free_bytes", lambda path: 10_000)
    assert "will write up to" in place.refused()
    assert sorted(stage.folder.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_takes_a_step_or_is_refused(name: str, place: Place):
    """Each name, with the packages there are: one step, or one line that names the package."""
    code, said = place.both(SFT_OPTIM=name)
    assert code == 0 or f"SFT_OPTIM={name}: " in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"])
def test_every_way_to_compute_attention_takes_a_step_or_is_refused(name: str, place: Place):
    """Each name that transformers takes everywhere: one step, or one line that names the setting."""
    code, said = place.both(SFT_ATTN=name)
    assert code == 0 or f"SFT_ATTN={name}: " in said

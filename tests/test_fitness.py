"""Models that don't fit a stage are refused with the settings, in the same words by --check and by a run."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from sft.errors import Problems
from sft.models.fitness import require_known_tokens
from tests.architectures import tiny_config
from tests.ladders import make_settings
from tests.tiny import run_train, tokenizer, write_model, write_rows, write_stage


def refused(folder: Path, capsys: Any, **settings: Any) -> str:
    """What --check and a run say on stderr, both with exit code 2."""
    rows = write_rows(folder / "rows.jsonl", 12)
    common = {"SFT_BASE_MODEL": folder / "base", "SFT_OUT_LORA_DIR": folder / "out", "SFT_DATASET_ID": rows}
    write_stage(folder, 1, common | settings)
    said = []
    for options in (["--check"], []):
        capsys.readouterr()
        assert run_train("--stage", 1, "--env-dir", folder, *options) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("[ERROR]")])
    assert said[0] == said[1]
    assert len(said[0]) == 1
    return said[0][0]


def test_a_folder_without_tokenizer_files(tmp_path: Path, capsys: Any):
    """transformers makes an empty tokenizer of nothing, and every row becomes one token."""
    write_model(tmp_path / "base")
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    assert "has no tokenizer files" in refused(tmp_path, capsys, SFT_CHAT_TEMPLATE="chatml")


def test_a_token_beyond_the_embedding(tmp_path: Path, capsys: Any):
    """Added to the tokenizer, never to the model, and in a row."""
    write_model(tmp_path / "base")
    words = tokenizer()
    words.add_tokens(["color"], special_tokens=True)
    words.save_pretrained(tmp_path / "base")
    assert f"ids beyond the model's embedding of {len(tokenizer()):,} rows, and row 1" in refused(tmp_path, capsys)


def test_a_token_beyond_the_embedding_is_found_in_any_row(tmp_path: Path):
    """Rows are read in blocks; the number is that of the row as it is trained, shuffled or not."""
    words, settings = tokenizer(), make_settings(tmp_path)
    words.add_tokens(["<new>"])
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [], [3, len(words) - 1, 2]] + [[7]] * 2500})
    order = [*range(3, 2400), 1, 2, 0, *range(2400, 2503)]
    config = tiny_config("qwen3", vocab_size=len(words) - 1)
    require_known_tokens(config, settings, words, rows.select([0, 1]), rows.select([]))
    with pytest.raises(Problems, match=rf"and row 2399 holds one \({len(words) - 1}\)"):
        require_known_tokens(config, settings, words, rows.select([0, 1]), rows.select(order))


def test_rows_are_not_read_where_the_tokenizer_has_no_such_token(tmp_path: Path):
    """A million rows cost nothing then."""
    config = tiny_config("qwen3", vocab_size=len(tokenizer()))
    unreadable: Any = object()
    require_known_tokens(config, make_settings(tmp_path), tokenizer(), unreadable)


def test_a_question_with_a_token_beyond_the_embedding(tmp_path: Path, capsys: Any):
    """It would end the first evaluation in an IndexError."""
    write_model(tmp_path / "base")
    words = tokenizer()
    words.add_tokens(["<new>"])
    words.save_pretrained(tmp_path / "base")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "red <new>", "completion": "blue"}))
    said = refused(tmp_path, capsys, SFT_GEN_EVAL="samples", SFT_GEN_EVAL_DATASET=questions)
    assert f"and row 1 of {questions} holds one ({len(words) - 1})" in said


def test_rows_longer_than_learned_positions(tmp_path: Path, capsys: Any):
    """GPT-2 has learned 128 of them."""
    words = tokenizer()
    config = GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    said = refused(tmp_path, capsys, SFT_LORA_TARGET_MODULES="c_attn")
    assert "SFT_MAX_SEQ_LEN=256: GPT2LMHeadModel has learned 128 positions and no more" in said


def test_a_model_for_images(tmp_path: Path, capsys: Any):
    """Plain words instead of transformers' list of classes."""
    tokenizer().save_pretrained(tmp_path / "base")
    AutoConfig.for_model("qwen2_5_vl").save_pretrained(tmp_path / "base")
    assert "qwen2_5_vl is a model for images, sound or video besides text" in refused(tmp_path, capsys)


def test_an_attention_the_architecture_does_not_have(tmp_path: Path, capsys: Any):
    """Mamba 2 has no sdpa; its rows train under SFT_ATTN=auto."""
    tokenizer().save_pretrained(tmp_path / "base")
    tiny_config("mamba2", vocab_size=len(tokenizer())).save_pretrained(tmp_path / "base")
    said = refused(tmp_path, capsys, SFT_ATTN="sdpa", SFT_LORA_TARGET_MODULES="in_proj")
    assert "SFT_ATTN=sdpa: Mamba2ForCausalLM does not support" in said
    assert said.endswith("SFT_ATTN=auto takes what the model has")


@pytest.mark.parametrize("targets", ["q_proj,v_porj", "q_proj,lm_head"])
def test_targets_that_fit_nothing(targets: str, tmp_path: Path, capsys: Any):
    """The same words from both."""
    write_model(tmp_path / "base")
    assert f"SFT_LORA_TARGET_MODULES={targets}: " in refused(tmp_path, capsys, SFT_LORA_TARGET_MODULES=targets)


def test_a_model_that_reads_in_both_directions(tmp_path: Path, capsys: Any):
    """BERT as a causal model: transformers only warns, and the loss falls to nothing."""
    words = tokenizer()
    words.save_pretrained(tmp_path / "base")
    AutoConfig.for_model("bert", vocab_size=len(words)).save_pretrained(tmp_path / "base")
    assert "bert reads text in both directions" in refused(tmp_path, capsys, SFT_LORA_TARGET_MODULES="query")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "its files lack model.layers.2."),
        ({"intermediate_size": 48}, "its weights have other sizes than its config.json says"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "could not be loaded (Loading a GPTQ"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration(edit: Any, said: str, tmp_path: Path, capsys: Any):
    """transformers makes up what is missing: a layer of random numbers must not be trained on."""
    path = write_model(tmp_path / "base") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    assert said in refused(tmp_path, capsys)


@pytest.mark.parametrize("kind", ["BertTokenizer", "T5Tokenizer"])
def test_a_tokenizer_class_that_does_not_fit(kind: str, tmp_path: Path, capsys: Any):
    """What the tokenizers library raises has no type: it is a problem of the folder all the same."""
    path = write_model(tmp_path / "base") / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    assert "the tokenizer could not be loaded" in refused(tmp_path, capsys)


def test_flex_attention_without_a_gpu(tmp_path: Path, capsys: Any):
    """It has no backward pass on a CPU."""
    write_model(tmp_path / "base")
    assert "SFT_ATTN=flex_attention: can't be trained without a GPU" in refused(
        tmp_path, capsys, SFT_ATTN="flex_attention"
    )

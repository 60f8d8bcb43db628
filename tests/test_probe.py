"""Verification by logits: right merges pass, wrong ones fail with figures, and looking changes nothing."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from sft.errors import RunFailed
from sft.merging.merge import merge, record_verification
from sft.merging.probe import (
    PROMPTS,
    compare,
    divergence,
    precision,
    probe_ids,
    probe_logits,
    shows_adapter,
    store_probe,
    verdict,
    verify,
)
from sft.stages.paths import PROBE

CONFIG = Qwen3Config(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, vocab_size=128, initializer_range=0.2, tie_word_embeddings=True,
)  # fmt: skip


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % 128 for letter in text]}


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Path]:
    """(base folder, stage folder with adapter and probe); the adapter moves the model far."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    adapted.save_pretrained(tmp_path / "stage")
    store_probe(tmp_path / "stage", adapted, tokenizer)
    return tmp_path / "base", tmp_path / "stage"


def test_the_merged_model_passes_and_its_figures_are_kept(trained, tmp_path):
    """Adapter on base against merged weights: equal up to float32 rounding, written into merge.json."""
    base, stage = trained
    merge(base, [stage], tmp_path / "merged")
    figures = verify(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), stage / PROBE)
    assert figures["kl"] < 1e-9
    assert figures["max_abs_diff"] < 1e-4
    assert figures["adapter_kl"] > 0.1
    record_verification(tmp_path / "merged", figures)
    recorded = (tmp_path / "merged" / "merge.json").read_text()
    assert re.search(rf'"kl": {re.escape(repr(figures["kl"]))}', recorded)


def test_a_base_without_the_adapter_fails_with_the_figures(trained):
    """What others have shipped as merged: the base itself. The message has the KL and the adapter's own effect."""
    base, stage = trained
    with pytest.raises(RunFailed, match=r"KL 0\.\d+ \(at most 1e-06 is rounding\).*the adapter itself moved the model"):
        verify(AutoModelForCausalLM.from_pretrained(base), stage / PROBE)


def test_bfloat16_weights_get_the_room_that_rounding_needs(trained, tmp_path):
    """The same merge rounded to bfloat16 passes by the coarser format's rule, and fails without the adapter."""
    base, stage = trained
    merge(base, [stage], tmp_path / "merged", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert precision(merged) == "bfloat16"
    assert 1e-6 < verify(merged, stage / PROBE)["kl"] < 5e-2
    with pytest.raises(RunFailed, match=r"does not answer as base \+ adapter did"):
        verify(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), stage / PROBE)


def test_rounded_weights_loaded_in_float32_keep_their_room(trained, tmp_path):
    """A bfloat16 folder trained in float32 on a CPU: what rounding took is still gone, and is no failure."""
    base, stage = trained
    merge(base, [stage], tmp_path / "merged", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert precision(merged) == "float32"
    assert 1e-6 < verify(merged, stage / PROBE)["kl"] < 5e-2


def small_effect(base: Path, folder: Path, size: float, dtype: torch.dtype) -> Path:
    """A stage on `base` in a number format, whose adapter's B is random times `size`; its probe is stored."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * size
    adapted.save_pretrained(folder)
    store_probe(folder, adapted, tokenizer)
    return folder


@pytest.mark.parametrize("size", [0.1, 0.03, 0.01])
def test_in_bfloat16_a_base_without_an_ordinary_adapter_fails_too(trained, tmp_path, size):
    """Rounding would explain as much, but the answers are nearer to those without the adapter (trust M7)."""
    base, _ = trained
    stage = small_effect(base, tmp_path / "small", size, torch.bfloat16)
    with pytest.raises(RunFailed, match=r"it may have been left out|at most"):
        verify(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), stage / PROBE)
    merge(base, [stage], tmp_path / "merged", dtype="bfloat16")
    figures = verify(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), stage / PROBE)
    assert shows_adapter(figures) == ("drowns" not in verdict(figures))


def test_an_effect_below_rounding_passes_and_is_said(trained, tmp_path):
    """An adapter a hundredth of a rounding step strong: the right merge passes, with words about what isn't shown."""
    base, _ = trained
    stage = small_effect(base, tmp_path / "small", 1e-5, torch.float32)
    merge(base, [stage], tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    figures = verify(merged, stage / PROBE)
    assert not shows_adapter(figures)
    assert "drowns in rounding" in verdict(figures)


def test_another_adapter_fails_where_rounding_can_not_explain_it(trained, tmp_path):
    """Twice the update in bfloat16: within the room for rounding, but not nearer to what was trained."""
    base, _ = trained
    stage = small_effect(base, tmp_path / "small", 0.06, torch.bfloat16)
    twice = tmp_path / "twice"
    shutil.copytree(stage, twice)
    config = json.loads((twice / "adapter_config.json").read_text())
    (twice / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    merge(base, [twice], tmp_path / "merged", dtype="bfloat16")
    with pytest.raises(RunFailed, match="does not answer as base"):
        verify(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), stage / PROBE)


def test_equal_runs_leave_equal_probes(trained, tmp_path):
    """Byte by byte (trust L9)."""
    base, _ = trained
    probes = {(small_effect(base, tmp_path / str(k), 0.1, torch.float32) / PROBE).read_bytes() for k in range(4)}
    assert len(probes) == 1


def test_looking_disturbs_neither_mode_nor_random_state(trained):
    """Training goes on as if nobody had looked, with dropout on and the same random numbers."""
    model = AutoModelForCausalLM.from_pretrained(trained[0]).train()
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    logits = probe_logits(model, probe_ids(tokenizer))
    assert logits.shape == (len(PROMPTS), 2, 128)
    assert model.training
    assert torch.equal(torch.rand(2), expected[0])
    assert random.random() == expected[1]


def test_figures_by_hand():
    """KL of (1/2, 1/2) against (3/4, 1/4) is ln 2 - ln 3 / 2, the largest difference is ln 3."""
    even, skewed = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0986122886681098, 0.0]]])
    assert divergence(even, skewed) == pytest.approx(0.143841036)
    assert divergence(even, even) == 0.0
    assert compare(even, skewed)["max_abs_diff"] == pytest.approx(1.0986123)


def test_nan_logits_fail(trained):
    """A model that answers NaN is not a verified one."""
    model = AutoModelForCausalLM.from_pretrained(trained[0])
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunFailed, match="KL nan"):
        verify(model, trained[1] / PROBE)

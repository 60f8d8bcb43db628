"""Joined rows in every kind of architecture: what leaks is noticed, and the loss is that of rows alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.evaluation.answers import generate_answers
from sft.models.attention import NAME
from sft.models.isolation import expected_isolation, keep_rows_apart
from sft.training.batches import join_rows
from tests.architectures import CONFIGS, tiny_config, tiny_model, token_losses
from tests.tiny import metric_lines, run_train, tokenizer, write_rows, write_stage

# Linear attention, convolutions, state spaces; gpt_oss makes its masks without looking at positions.
LEAKING = {"qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "granitemoehybrid", "mamba2", "gpt_oss"}
ON_OUR_ATTENTION = {"qwen3", "qwen3_moe", "mistral", "gemma3_text"}


def items(lengths: tuple[int, ...] = (6, 1, 11, 4)) -> list[list[dict[str, Any]]]:
    """Rows of random tokens, all trained but the first of each."""
    random = torch.Generator().manual_seed(3)
    rows = []
    for position, length in enumerate(lengths):
        ids = torch.randint(3, 64, (length,), generator=random).numpy()
        labels = ids.copy()
        labels[0] = -100
        rows.append([{"position": position, "epoch": 0, "input_ids": ids, "labels": labels}])
    return rows


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_batch_of_four_rows_has_the_losses_of_four_of_one(kind: str, make_settings: Any):
    """To 1e-5, and the gradient of every weight to 1e-4 of its largest, whatever the layers do with joined rows."""
    model = tiny_model(kind)
    found = keep_rows_apart(model, make_settings())
    assert found.kept_apart is (kind not in LEAKING)
    assert found.lengths is (kind in ON_OUR_ATTENTION)
    assert (model.config._attn_implementation == NAME) is found.lengths
    assert found.difference is not None
    assert (found.difference > 1e-2) is (kind in LEAKING)
    together = token_losses(model, join_rows(items()), found)
    together.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.cat([token_losses(model, join_rows([item]), found) for item in items()])
    alone.sum().backward()
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_small_random_model_of_the_same_layers_says_what_the_loaded_one_will(kind: str, make_settings: Any):
    """What --check shows, and what decides where the weights are split over processes."""
    expected = expected_isolation(tiny_config(kind), make_settings())
    found = keep_rows_apart(tiny_model(kind), make_settings())
    assert (expected.kept_apart, expected.lengths) == (found.kept_apart, found.lengths)


def test_the_probe_leaves_the_model_as_it_was(make_settings: Any):
    """Weights, modes, gradients, windows and random state."""
    model = tiny_model("gemma3_text").train()
    windows = [layer.self_attn.sliding_window for layer in model.model.layers]
    state = torch.get_rng_state()
    keep_rows_apart(model, make_settings())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == windows == [4, None]
    assert model.config.sliding_window == 4
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", CONFIGS)
def test_prompts_of_unequal_length_are_answered_as_one_by_one(kind: str):
    """What pads a short prompt on the left reaches neither states nor convolutions."""
    words = tokenizer()
    model = tiny_model(kind, vocab_size=len(words), max_position_embeddings=512)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    said = "red blue green small large name color size".split()
    prompts = [
        [{"role": "user", "content": " ".join((said * 3)[row : row + n])}] for row, n in enumerate((3, 18, 1, 9))
    ]
    alone, together = (generate_answers(model, words, prompts, max_new_tokens=6, batch_size=size) for size in (1, 4))
    assert together == alone


class Shifting(torch.nn.Module):
    """Adds to each token a little of a neighbour, whichever row that is in."""

    def __init__(self, inner: torch.nn.Module, step: int, share: float) -> None:
        super().__init__()
        self.inner, self.step, self.share = inner, step, share

    def forward(self, states: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        neighbours = states.roll(self.step, dims=1)
        neighbours[:, 0 if self.step > 0 else -1] = 0
        return self.inner(states + self.share * neighbours, *args, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("step", "share"), [(1, 1.0), (1, 0.01), (-1, 0.01)])
def test_a_module_that_mixes_neighbours_is_noticed(step: int, share: float, dtype: torch.dtype, make_settings: Any):
    """A token that sees the one before, or after it, by a hundredth: below what bfloat16 rounds, seen in gradients."""
    model = tiny_model("qwen3").to(dtype)
    assert keep_rows_apart(model, make_settings()).kept_apart
    model.model.layers[1].mlp = Shifting(model.model.layers[1].mlp, step, share)
    model.set_attn_implementation("sdpa")
    assert not keep_rows_apart(model, make_settings()).kept_apart


def test_rows_one_by_one_are_as_many_passes_as_the_rank_with_most_has():
    """Where weights are split, a rank with fewer rows goes through the model without any."""
    from sft.models.isolation import Isolation

    batch = {
        name: value for name, value in join_rows(items((2, 3))).items() if name not in ("rows", "epochs", "num_items")
    }
    passes = Isolation(1.0, kept_apart=False).passes(batch, at_least=4)
    assert [each["input_ids"].shape[1] for each in passes] == [2, 3, 2, 2]
    assert [int((each["labels"] != -100).sum()) for each in passes] == [1, 2, 0, 0]
    assert "position_ids" not in passes[0]


def write_hybrid(folder: Path) -> Path:
    words = tokenizer()
    special = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None}
    tiny_model("lfm2", vocab_size=len(words), max_position_embeddings=512, **special).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_stage_of_a_hybrid_model_trains_alike_however_its_rows_are_divided(tmp_path: Path, capsys: Any):
    """4 x 1, 1 x 4 and packed have the same losses; --check and the run say why rows go one by one."""
    base, rows = write_hybrid(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 24)
    losses, evaluated = {}, {}
    for name, size, accumulation in (("joined", 4, 1), ("single", 1, 4)):
        out = tmp_path / name
        common = {
            "SFT_BASE_MODEL": base,
            "SFT_OUT_LORA_DIR": out,
            "SFT_DATASET_ID": rows,
            "SFT_LORA_TARGET_MODULES": "q_proj,in_proj",
        }
        size_of = {"SFT_PER_DEVICE_TRAIN_BS": size, "SFT_GRAD_ACCUM": accumulation, "SFT_PER_DEVICE_EVAL_BS": size}
        write_stage(tmp_path, 1, common | size_of | {"SFT_MAX_STEPS": 3})
        capsys.readouterr()
        assert run_train("--stage", 1, "--env-dir", tmp_path, "--check", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["isolation"]["kept_apart"] is False
        assert document["isolation"]["difference"] > 0.1
        assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
        assert "Rows go one by one: layers of this model mix joined rows" in capsys.readouterr().out
        losses[name] = metric_lines(tmp_path / f"{name}_stage1", "loss")
        evaluated[name] = metric_lines(tmp_path / f"{name}_stage1", "eval_loss")
    assert losses["joined"] == pytest.approx(losses["single"], abs=1e-5)
    assert evaluated["joined"] == pytest.approx(evaluated["single"], abs=1e-5)

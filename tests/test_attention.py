"""Row-wise attention: what joined rows give under it, against padded batches under transformers' own attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from sft.models.attention import NAME, RowsUnknown, attend, causal_row, row_lengths
from sft.models.isolation import keep_rows_apart
from sft.training.batches import join_rows

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LENGTHS = (5, 1, 9, 3)


def llama() -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5))


def mistral(window: int | None) -> Any:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SIZES, initializer_range=0.5, sliding_window=window))


def gpt2() -> Any:
    torch.manual_seed(1)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes))


def rows() -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.randint(0, 50, (length,)) for length in LENGTHS]


def joined(model: Any) -> torch.Tensor:
    """Logits of the rows joined into one sequence, (19, 50)."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return model(input_ids=torch.cat(rows())[None], position_ids=positions, use_cache=False).logits[0]


def padded(model: Any) -> torch.Tensor:
    """Logits of the same tokens in a padded batch under sdpa, in the same order."""
    ids = torch.nn.utils.rnn.pad_sequence(rows(), batch_first=True)
    seen = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits[seen]


def test_a_row_ends_where_positions_restart():
    """Rows of 3, 1 and 2 tokens; a single row is whole, also when its positions do not start at 0."""
    assert row_lengths(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]
    assert row_lengths(torch.tensor([[7, 8, 9]])) == [3]


@pytest.mark.parametrize("build", [llama, lambda: mistral(None), lambda: mistral(4), gpt2])
def test_logits_and_gradients_are_those_of_the_padded_batch(build: Callable[[], Any], make_settings: Any):
    """Grouped heads, no window and one shorter than a row, learnt positions: differences below 1e-4 of the largest."""
    reference, model = build(), build()
    assert keep_rows_apart(model, make_settings()).lengths
    assert model.config._attn_implementation == NAME
    weights = torch.randn(sum(LENGTHS), 50, generator=torch.Generator().manual_seed(3))
    expected, found = padded(reference), joined(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        largest = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=2e-4 * largest, msg=name)


def test_no_row_sees_another():
    """Another first row leaves the logits of the rows after it bit-identical."""
    model = llama()
    model.set_attn_implementation(NAME)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    ids = torch.cat(rows())[None]
    changed = ids.clone()
    changed[0, : LENGTHS[0]] = 7
    first, second = (
        model(input_ids=each, position_ids=positions, use_cache=False).logits[0] for each in (ids, changed)
    )
    assert torch.equal(first[LENGTHS[0] :], second[LENGTHS[0] :])
    assert not torch.equal(first[: LENGTHS[0]], second[: LENGTHS[0]])


def test_no_mask_is_made_for_joined_rows(monkeypatch: pytest.MonkeyPatch):
    """The T x T mask is what costs; only a window or padding still asks for one."""
    made = []
    monkeypatch.setattr("sft.models.attention.sdpa_mask", lambda **keywords: made.append(keywords["q_length"]))
    model = llama()
    model.set_attn_implementation(NAME)
    joined(model)
    assert made == []
    padded(model)
    assert made == [max(LENGTHS)]


def test_nothing_is_asked_of_the_positions_where_the_batch_knows_its_rows(
    make_settings: Any, monkeypatch: pytest.MonkeyPatch
):
    """Lengths come with the micro-batch: each layer would wait for the device to find them again."""
    model = llama()
    found = keep_rows_apart(model, make_settings())

    def fail(positions: torch.Tensor) -> list[int]:
        raise AssertionError("found anew in a layer")

    monkeypatch.setattr("sft.models.attention.row_lengths", fail)
    batch = [
        {"position": n, "epoch": 0, "input_ids": row.numpy(), "labels": row.numpy()} for n, row in enumerate(rows())
    ]
    known = join_rows([batch])
    names = ("input_ids", "position_ids", "row_lengths", "row_ends")
    (inputs,) = found.passes({name: known[name] for name in names})
    assert model(**inputs, use_cache=False).logits.shape[1] == sum(LENGTHS)


def test_on_a_gpu_rows_go_our_way_as_well(make_settings: Any, monkeypatch: pytest.MonkeyPatch):
    """Not sdpa's under a mask of all tokens by all tokens."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    model = llama()
    assert keep_rows_apart(model, make_settings()).lengths
    assert model.config._attn_implementation == NAME


def test_no_mask_is_made_for_windows(monkeypatch: pytest.MonkeyPatch):
    """A window shorter than a row: blocks of it on a CPU, an argument of the kernel on a GPU."""
    made = []
    monkeypatch.setattr("sft.models.attention.sdpa_mask", lambda **keywords: made.append(keywords["q_length"]))
    model = mistral(4)
    model.set_attn_implementation(NAME)
    joined(model)
    assert made == []


@pytest.mark.parametrize(("capability", "repeated"), [((7, 5), True), ((8, 0), False)])
def test_kernels_before_ampere_get_a_key_for_every_head(
    capability: tuple[int, int], repeated: bool, monkeypatch: pytest.MonkeyPatch
):
    """They know no grouped heads: sdpa would keep all scores instead."""
    asked: list[tuple[int, bool]] = []

    def product(query: Any, key: Any, value: Any, **keywords: Any) -> Any:
        asked.append((key.shape[1], keywords["enable_gqa"]))
        return query

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("sft.models.attention.scaled_dot_product_attention", product)
    query, key = (torch.zeros(1, heads, 6, 8).as_subclass(OnGpu) for heads in (4, 2))
    causal_row(query, key, key, window=6)
    assert asked == [(4, False) if repeated else (2, True)]


def test_left_padded_generation_is_that_of_sdpa():
    """Batched greedy answers to prompts of 5, 1, 9 and 3 tokens."""
    batch = torch.full((4, max(LENGTHS)), 0)
    seen = torch.zeros_like(batch)
    for number, row in enumerate(rows()):
        batch[number, -len(row) :] = row
        seen[number, -len(row) :] = 1
    model = llama()
    answers = []
    for name in ("sdpa", NAME):
        model.set_attn_implementation(name)
        answers.append(model.generate(batch, attention_mask=seen, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*answers)


def test_a_model_that_hides_positions_keeps_its_attention(make_settings: Any, monkeypatch: pytest.MonkeyPatch):
    """Without positions rows cannot be told apart: an error in the attention, sdpa for the model."""
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RowsUnknown):
        attend(torch.nn.Module(), states, states, states, None)
    model = llama()
    kept = ("hidden_states", "attention_mask", "position_embeddings")
    for layer in model.model.layers:
        attention = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda *a, forward=attention, **k: forward(*a, **{n: k[n] for n in kept})
        )
    assert not keep_rows_apart(model, make_settings()).lengths
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("setting", [{"attn": "sdpa"}, {"attn": "eager"}, {"torch_compile": True}])
def test_what_the_person_chose_stands(setting: dict[str, Any], make_settings: Any):
    """Only SFT_ATTN=auto without compilation is ours to decide."""
    model = llama()
    assert not keep_rows_apart(model, make_settings(**setting)).lengths
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_configuration_does_not_name_it(tmp_path: Path, make_settings: Any):
    """Anybody's transformers loads best_model/config.json."""
    model = llama()
    assert keep_rows_apart(model, make_settings()).lengths
    model.config.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()

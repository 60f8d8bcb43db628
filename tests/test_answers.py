"""Answers in batches: what reading prompts in groups and writing into a roomy cache must not change."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)  # fmt: skip

from sft.distributed import ranks
from sft.evaluation.answers import generate_answers, read_prompts
from sft.evaluation.at_once import answers_at_once
from sft.evaluation.roomy import RoomyLayer, zeros
from sft.models.model import keep_adapters_exact
from tests.tiny import tokenizer

WORDS = tokenizer()
NEW_TOKENS = 12
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8,
    "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None, "pad_token_id": WORDS.pad_token_id,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.5}
GROUPED = {
    "llama": LlamaConfig(**SIZES),
    "mixture of experts": Qwen3MoeConfig(**SIZES, **EXPERTS),
    "keys and values of different sizes": DeepseekV3Config(**SIZES | LATENT),
    "learned positions": GPT2Config(vocab_size=len(WORDS), bos_token_id=None, eos_token_id=None, **GPT2),
}
LEFT_ALONE = {
    "window": MistralConfig(**SIZES, sliding_window=16),
    "window in one layer": Gemma3TextConfig(
        **SIZES, sliding_window=16, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=False
    ),
    "recurrent": MambaConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, initializer_range=0.5, tie_word_embeddings=False
    ),
}


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    return model


def prompts(lengths: tuple[int, ...] = (3, 40, 1, 25, 3, 6, 80, 2)) -> list[list[dict[str, str]]]:
    said = "red blue green small large name color size".split()
    return [
        [{"role": "user", "content": " ".join(said[(row + word) % 8] for word in range(length))}]
        for row, length in enumerate(lengths)
    ]


def answers(model: Any, size: int) -> list[str]:
    found = generate_answers(model, WORDS, prompts(), max_new_tokens=NEW_TOKENS, batch_size=size)
    return [answer.text for answer in found]


def one_by_one(model: PreTrainedModel) -> list[str]:
    """transformers' own generate, a prompt at a time, without any of our cache."""
    found = []
    for prompt in prompts():
        text = WORDS.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = WORDS(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ends = {"eos_token_id": WORDS.eos_token_id, "pad_token_id": WORDS.pad_token_id}
        with torch.no_grad():
            made = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, **ends)
        found.append(WORDS.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("name", [*GROUPED, *LEFT_ALONE])
def test_batches_of_any_size_answer_as_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch):
    """Prompts of 1 to 80 words, so that a batch holds several groups; architectures with other caches too."""
    model = model_of((GROUPED | LEFT_ALONE)[name])
    used: list[Any] = []
    monkeypatch.setattr(
        "sft.evaluation.answers.read_prompts", lambda *a, **k: (used.append(c := read_prompts(*a, **k)), c)[1]
    )
    expected = one_by_one(model)
    assert len(set(expected)) > 4
    for size in (1, 3, 8):
        assert answers(model, size) == expected, size
    assert used
    assert all((cache is not None) == (name in GROUPED) for cache in used)


def test_an_adapter_takes_part():
    """PEFT's wrapper: answers of the adapted model, other than those of its base."""
    model = model_of(GROUPED["llama"])
    plain = answers(model, 8)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for weight in (p for name, p in adapted.named_parameters() if "lora_" in name):
            weight.mul_(20)
    assert answers(adapted, 8) == one_by_one(adapted) != plain


def test_reading_in_groups_computes_less_padding():
    """Positions computed before the first new token: no more than a third above the prompts' own, where padding to the
    longest makes it several times as many."""
    model = model_of(GROUPED["llama"])
    computed: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answers(model, 8)
    texts = [WORDS.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts()]
    own, longest = sum(map(len, texts)), max(map(len, texts))
    # Every decoding step computes one position of each row; a prompt's last position gives the first new token.
    read = sum(computed) - len(texts) * (NEW_TOKENS - 1)
    assert own <= read <= 4 / 3 * own
    assert len(texts) * longest > 2 * read


def test_the_cache_stays_where_it_is():
    """Keys and values of a layer are views of one allocation, however many tokens follow."""
    layer = RoomyLayer(2, 6)
    states = torch.randn(2, 1, 3, 4)
    keys, _ = layer.update(states, states)
    more, _ = layer.update(states[:, :, :1], states[:, :, :1])
    assert more.data_ptr() == keys.data_ptr()
    assert torch.equal(more, torch.cat([states, states[:, :, :1]], dim=2))
    assert layer.get_seq_length() == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_room_that_no_row_writes_is_not_taken():
    """A column of each of 64 rows takes a page each per head, not the 32 MiB that there is room for."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    torch.zeros(64, 2, 1, 64)
    before = resident()
    room = zeros((64, 2, 1024, 64), like=torch.zeros(1))
    room[:, :, 500] = 1
    assert resident() - before < 8 * 2**20
    assert room.sum() == 64 * 2 * 64


def test_a_mixture_that_returns_router_logits_answers_prompts_of_unequal_length():
    """A base whose config.json asks for router logits: the answers of prompts one by one, as without them."""
    model = model_of(GROUPED["mixture of experts"])
    alone = answers(model, 1)
    model.config.output_router_logits = True
    assert answers(model, 4) == alone


def test_an_answer_that_the_limit_ended_says_so():
    """Nothing ends an answer of this model, so all are cut off; where every token ends one, none is."""
    model = model_of(GROUPED["llama"])
    found = generate_answers(model, WORDS, prompts(), max_new_tokens=4, batch_size=4)
    model.generation_config.eos_token_id = list(range(len(WORDS)))
    ended = generate_answers(model, WORDS, prompts(), max_new_tokens=4, batch_size=4)
    at_the_limit = generate_answers(model, WORDS, prompts(), max_new_tokens=1, batch_size=4)
    assert [all(answer.cut for answer in found), *(any(a.cut for a in some) for some in (ended, at_the_limit))] == [
        True,
        False,
        False,
    ]


def casts_of_a_token(model: Any) -> int:
    """Changes of number format in the last of several decoding steps."""
    counts: list[int] = []
    with Casts() as casts:
        hook = model.get_base_model().register_forward_pre_hook(lambda *_: counts.append(casts.count))
        answers(model, 8)
    hook.remove()
    return counts[-1] - counts[-2]


class Casts(TorchDispatchMode):
    """Counts conversions to another number format."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_factors_of_an_adapter_are_cast_once_an_evaluation(monkeypatch: pytest.MonkeyPatch):
    """In bfloat16 with a float32 adapter: two casts fewer for each of four projections and token, and afterwards the
    very weights as before."""
    model = model_of(GROUPED["llama"]).to(torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    keep_adapters_exact(adapted)
    factors = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    before = {name: p.data for name, p in factors.items()}
    fewer = casts_of_a_token(adapted)
    assert all(p.dtype == torch.float32 and p.data_ptr() == before[name].data_ptr() for name, p in factors.items())
    monkeypatch.setattr("sft.evaluation.answers.lora_layers", lambda model: [])
    assert casts_of_a_token(adapted) - fewer == 2 * len(factors) // 2


def test_a_gpu_takes_as_many_answers_as_fit(monkeypatch: pytest.MonkeyPatch):
    """SFT_GEN_BATCH_SIZE=auto: 8 on a CPU; on a GPU seven tenths of what is free, through keys and values of prompt and
    answer and the layer that reads a prompt, by hand; no more than there are questions, and one where there is room for
    none."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
    )
    at = {"longest": 900, "new": 100, "count": 64}
    model: Any = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert answers_at_once(model, **at) == 8
    one = 1000 * 6 * 2 * 16 * 2 * 2 + 4 * 900 * 128 * 2
    model.device = torch.device("cuda")
    # Of two ranks one has room for three.
    monkeypatch.setattr(ranks, "largest", lambda number, device: max(number, -3))
    for name, taken in (("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, taken=taken: taken)
    for free, expected in ((int(20.5 * one / 0.7) - 30, 20), (10**12, 64), (one, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**13))
        assert answers_at_once(model, **at) == expected
        assert answers_at_once(model, **at, processes=2) == min(expected, 3)

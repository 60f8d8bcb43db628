"""The key-value cache of the generation evaluation: its size by hand, and the longest prompt there is."""

import datasets
import pytest
import torch
from transformers import DynamicCache, Gemma2Config, GPT2Config, LlamaConfig

from sft.evaluation.at_once import AnswerBatch, cache_bytes
from sft.planning.kv_cache import largest_answers, longest_prompt
from tests.ladders import make_settings

ANSWERS = AnswerBatch(rows=8, tokens=1000)
# Two turns, the last answer from token 6 on, a newline after it that is not trained; one turn; nothing trained.
LABELS = [
    [-100, -100, 5, 5, -100, -100, 7, 7, -100],
    [-100, -100, -100, 7, 7],
    [-100, -100, -100, -100],
]


def rows(labels):
    return datasets.Dataset.from_dict({"labels": labels, "length": [len(row) for row in labels]})


def test_the_formula_by_hand():
    """8 answers of 1,000 tokens, 6 layers, 2 key-value heads of 16 numbers, keys and values."""
    config = LlamaConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    assert cache_bytes(config, ANSWERS, torch.bfloat16) == 8 * 1000 * 6 * 2 * 16 * 2 * 2
    assert cache_bytes(config, ANSWERS, torch.float32) == 2 * 8 * 1000 * 6 * 2 * 16 * 2 * 2
    gpt = GPT2Config(n_embd=64, n_layer=3, n_head=4)
    assert cache_bytes(gpt, ANSWERS, torch.float32) == 8 * 1000 * 3 * 4 * 16 * 2 * 4


def test_a_window_bounds_its_layers():
    """Gemma 2: every other layer sees 256 tokens only."""
    config = Gemma2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        sliding_window=256,
    )  # fmt: skip
    assert cache_bytes(config, ANSWERS, torch.bfloat16) == 8 * (2 * 1000 + 2 * 256) * 2 * 16 * 2 * 2


def test_it_is_what_transformers_keeps():
    """Against the tensors of a cache filled with as many tokens."""
    config = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    cache = DynamicCache(config=config)
    for layer in range(3):
        keys = torch.zeros(2, 2, 7, 16)
        cache.update(keys, keys.clone(), layer)
    held = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
    assert cache_bytes(config, AnswerBatch(rows=2, tokens=7), torch.float32) == held


def test_prompts_end_where_the_last_answer_begins(tmp_path):
    """Token 6, 3 and, where nothing is trained, the whole row of 4."""
    settings = make_settings(tmp_path)
    assert [longest_prompt(rows([labels]), settings) for labels in LABELS] == [6, 3, 4]
    assert longest_prompt(rows(LABELS), settings) == 6


def test_where_prompts_are_trained_the_whole_row_counts(tmp_path):
    """With SFT_TRAIN_ON_PROMPT=1 labels do not tell where an answer begins: all 9 tokens."""
    assert longest_prompt(rows(LABELS), make_settings(tmp_path, train_on_prompt=1)) == 9


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"gen_eval": "samples", "gen_max_new_tokens": 100}, AnswerBatch(8, 106)),
        ({"gen_eval": "samples", "gen_max_new_tokens": 100, "gen_eval_samples": 3}, AnswerBatch(3, 106)),
        (
            {"gen_eval": "samples", "gen_eval_dataset": "q.jsonl", "max_seq_len": 50, "gen_batch_size": 2},
            AnswerBatch(2, 562),
        ),
    ],
)
def test_the_largest_batch_of_answers(tmp_path, values, expected):
    """None without a generation evaluation; questions of a data set of their own are as long as rows may be."""
    assert largest_answers(rows(LABELS), make_settings(tmp_path, **values)) == expected
    assert largest_answers(rows([]), make_settings(tmp_path, gen_eval="samples")) is None

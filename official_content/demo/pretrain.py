"""Pre-train the demo model: a tiny Qwen3 with its own byte-level BPE tokenizer, on synthetic documents without chat.

Usage: python official_content/demo/pretrain.py OUTPUT_DIR [--steps 3000] [--threads 2]
The model in official_content/demo/model was made by this script with its defaults.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from records import draw_document, draw_task
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# A separator token stands before every message, not a newline: this tokenizer would join the newline with what follows.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
SEQUENCE_LENGTH = 256


def train_tokenizer(seed: int, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Words, single digits and runs of punctuation with white space are kept apart, so that a word is the same tokens
    wherever it stands: copying from one format into another is then copying of tokens."""
    random = Random(seed)
    texts = [draw_document(random) for _ in range(20_000)]
    texts += [m["content"] for _ in range(500) for m in draw_task(random, "text", "json")["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}_]+|\p{N}|[^\p{L}\p{N}_]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_sep|>"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = 2048
    return fast


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int) -> Iterator[torch.Tensor]:
    """Endless batches (rows, SEQUENCE_LENGTH + 1) of documents, each ended by the end-of-turn token: the base model
    knows how to stop, not how to chat."""
    random = Random(seed)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    while True:
        need = rows * (SEQUENCE_LENGTH + 1)
        while len(stream) < need:
            encoded = tokenizer([draw_document(random) for _ in range(256)], add_special_tokens=False)["input_ids"]
            stream += [token for ids in encoded for token in (*ids, end)]
        yield torch.tensor(stream[:need]).view(rows, SEQUENCE_LENGTH + 1)
        stream = stream[need:]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=144,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=36,
            intermediate_size=448,
            max_position_embeddings=2048,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: Qwen3ForCausalLM, stream: Iterator[torch.Tensor], *, steps: int, learning_rate: float, output: Path
) -> None:
    """AdamW, short warm-up, linear decay to zero; prints a line every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, (steps - s) / steps))
    started, tokens = time.monotonic(), 0
    model.train()
    for step in range(1, steps + 1):
        ids = next(stream)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        tokens += ids[:, 1:].numel()
        if step % 50 == 0 or step == steps:
            rate = tokens / (time.monotonic() - started)
            print(
                f"step {step}/{steps}  loss {loss.item():.4f}  {tokens / 1e6:.2f} M tokens  {rate:,.0f} tokens/s",
                flush=True,
            )
        if step % 500 == 0:
            model.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=32, help="sequences of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="go on from this folder's weights and tokenizer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = options.start
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start) if start else train_tokenizer(options.seed)
    tokenizer.save_pretrained(options.output)
    model = Qwen3ForCausalLM.from_pretrained(start) if start else build_model(tokenizer, options.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    stream = batches(tokenizer, options.seed + 1, options.rows)
    train(model, stream, steps=options.steps, learning_rate=options.lr, output=options.output)
    model.save_pretrained(options.output)


if __name__ == "__main__":
    main()

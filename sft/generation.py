"""Answers of a model: batched, greedy, left-padded, on every rank together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import getstate, setstate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from sft.prefill import read_prompts

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever runs inside, Python's, numpy's and torch's random states are afterwards as they were before: resume
    stays exact with evaluation on or off."""
    states = getstate(), np.random.get_state(), torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device_states is not None:
            torch.cuda.set_rng_state_all(device_states)


@contextmanager
def answering(model: torch.nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode with its key-value cache on, and back as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the model's, and the usual end-of-turn words it has."""
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    ends.add(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[word] for word in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if word in vocabulary}
    return sorted(token for token in ends if token is not None)


def prompt_texts(prompts: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)) for p in prompts]


def answer_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, max_new_tokens: int, together: bool
) -> list[str]:
    """Greedy answers to rendered prompts, one batch. `together`: ranks share parameters, so all call the model equally
    often, which prompts read in groups would break, and make the same number of decoding steps (`synced_gpus`)."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    order = batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
    asked = {name: batch[name][order].to(model.device) for name in ("input_ids", "attention_mask")}
    greedy = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "use_cache": True,
        "synced_gpus": together,
        "eos_token_id": end_tokens(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    cache = None if together else read_prompts(model, **asked, **greedy)
    ids = model.generate(**asked, **greedy, past_key_values=cache)
    answers = ids[order.argsort(), asked["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def is_split(model: torch.nn.Module) -> bool:
    """Whether each rank holds only a part of the weights: ZeRO-3 marks them with `ds_id`, FSDP2 has a `device_mesh`."""
    return any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in model.parameters())


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Positions in batches of `size`, longest first: little padding, and running out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int,
    expected_lengths: Sequence[int] | None = None,
    accelerator: Accelerator | PartialState | None = None,
    interrupted: Callable[[], None] = lambda: None,
) -> list[str]:
    """One greedy answer per prompt, in the order of `prompts`, the same on every rank.

    Work is dealt to the ranks batch by batch; ranks that have none left answer the first prompt once more, so that
    all of them call the model equally often where each holds a part of it (ZeRO-3 and FSDP hang otherwise).

    Args:
        prompts: message lists without the answer.
        max_new_tokens: limit per answer, in tokens.
        expected_lengths: of prompt and answer together, any unit: rows that end together are batched together.
        interrupted: called before each batch; may raise to stop.
    """
    texts = prompt_texts(prompts, tokenizer)
    batches = batches_by_length(expected_lengths or [len(text) for text in texts], batch_size)
    ranks = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    together = ranks > 1 and is_split(model)
    found: list[tuple[int, str]] = []
    rounds = -(-len(batches) // ranks)
    show = tqdm(range(rounds), desc="generating", leave=False, disable=True if rank or rounds < 2 else None)
    with preserved_random_state(), answering(model):
        for turn in show:
            interrupted()
            idle = turn * ranks + rank >= len(batches)
            if idle and not together:
                continue
            mine = [0] if idle else batches[turn * ranks + rank]
            asked = [texts[position] for position in mine]
            answers = answer_batch(model, tokenizer, asked, max_new_tokens=max_new_tokens, together=together)
            found += [] if idle else zip(mine, answers, strict=True)
    if ranks > 1:
        found = gather_object(found)
    return [answer for _, answer in sorted(found)]

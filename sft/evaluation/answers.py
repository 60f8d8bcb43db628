"""Answers of a model: batched, greedy, on every rank together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from sft.evaluation.at_once import USUAL, answers_at_once
from sft.evaluation.decoding import Decoder
from sft.evaluation.reading import Kept, bare, left_padded, read_prompts
from sft.evaluation.shared import Prompt, pass_cost, with_beginnings
from sft.models.model import answering, factors_cast, lora_layers, preserved_random_state

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the model's, and the usual end-of-turn words it has."""
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    ends.add(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[word] for word in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if word in vocabulary}
    return sorted(token for token in ends if token is not None)


class Answer(NamedTuple):
    """What a model said, and whether the limit of new tokens ended it."""

    text: str
    cut: bool = False


def prompt_texts(prompts: Sequence[str | list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts that are messages as text; text is taken as it is."""
    return [
        p if isinstance(p, str) else str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True))
        for p in prompts
    ]


def answer_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    together: bool,
    kept: Kept,
) -> list[Answer]:
    """Greedy answers, one batch. `together`: ranks share parameters, so all call the model equally often, which
    prompts read in groups would break, and make the same number of decoding steps (`synced_gpus`)."""
    read = None if together else read_prompts(bare(model), prompts, room=max_new_tokens, kept=kept)
    order = read.order if read else range(len(prompts))
    rows = [prompts[number].ids for number in order]
    ids, mask = left_padded(rows, pad=tokenizer.pad_token_id, device=model.device)
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
    if read:
        greedy["custom_generate"] = Decoder(read, room=max_new_tokens, pad=tokenizer.pad_token_id).decode
    elif hasattr(model.config.get_text_config(), "output_router_logits"):
        greedy["output_router_logits"] = False  # see forward_settings
    made = model.generate(input_ids=ids, attention_mask=mask, **greedy)
    answers = made[torch.tensor(order).argsort().to(made.device), ids.shape[1] :]
    ended = torch.isin(answers, torch.tensor(greedy["eos_token_id"], device=answers.device)).any(dim=1)
    cut = (~ended).tolist() if answers.shape[1] >= max_new_tokens else [False] * len(prompts)
    return list(map(Answer, tokenizer.batch_decode(answers, skip_special_tokens=True), cut))


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
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int | None,
    expected_lengths: Sequence[int] | None = None,
    accelerator: Accelerator | PartialState | None = None,
    interrupted: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """One greedy answer per prompt, in the order of `prompts`, the same on every rank.

    Work is dealt to the ranks batch by batch; ranks that have none left answer the first prompt once more, so that
    all of them call the model equally often where each holds a part of it (ZeRO-3 and FSDP hang otherwise).

    Args:
        prompts: message lists without the answer, or what they are rendered to.
        max_new_tokens: limit per answer, in tokens.
        batch_size: answers made at once; None takes what the device has room for.
        expected_lengths: of prompt and answer together, any unit: rows that end together are batched together.
        interrupted: called before each batch; may raise to stop.
    """
    ids = tokenizer(prompt_texts(prompts, tokenizer), add_special_tokens=False)["input_ids"] if prompts else []
    longest = max(map(len, ids), default=0)
    ranks = accelerator.num_processes if accelerator else 1
    if batch_size is None:
        batch_size = answers_at_once(model, longest=longest, new=max_new_tokens, count=len(ids), processes=ranks)
    batches = batches_by_length(expected_lengths or [len(each) for each in ids], batch_size)
    rank = accelerator.process_index if accelerator else 0
    together = ranks > 1 and is_split(model)
    mine = batches[rank::ranks]
    # Beginnings that prompts share may take an eighth of the memory of a usual batch's keys and values.
    cost, room = pass_cost(model.device.type), max(batch_size, USUAL) * (longest + max_new_tokens) // 8
    asked = iter(with_beginnings([ids[i] for batch in mine for i in batch], cost=cost, room=room))
    kept: Kept = {}
    found: list[tuple[int, Answer]] = []
    rounds = -(-len(batches) // ranks)
    show = tqdm(range(rounds), desc="generating", leave=False, disable=True if rank or rounds < 2 else None)
    layers = [] if is_split(model) else lora_layers(model)
    with preserved_random_state(), answering(model), factors_cast(layers, model.get_input_embeddings().weight.dtype):
        for turn in show:
            interrupted()
            batch = mine[turn] if turn < len(mine) else []
            if batch or together:
                read = [next(asked) for _ in batch] or [Prompt(ids[0])]
                limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "together": together}
                found += zip(batch, answer_prompts(model, tokenizer, read, kept=kept, **limits), strict=False)
    return [answer for _, answer in sorted(gather_object(found) if ranks > 1 else found)]

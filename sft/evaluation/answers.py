"""Answers of a model: batched, greedy, left-padded, on every rank together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sft.evaluation.at_once import answers_at_once
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


def answer_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, max_new_tokens: int, together: bool
) -> list[Answer]:
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
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        # Where the model's settings ask for them, a mixture weighs its experts' loads by a mask that is longer than
        # the one token it is handed behind a cache.
        greedy["output_router_logits"] = False
    cache = None if together else read_prompts(model, **asked, **greedy)
    ids = model.generate(**asked, **greedy, past_key_values=cache)
    answers = ids[order.argsort(), asked["input_ids"].shape[1] :]
    ended = torch.isin(answers, torch.tensor(greedy["eos_token_id"], device=answers.device)).any(dim=1)
    cut = (~ended).tolist() if answers.shape[1] >= max_new_tokens else [False] * len(texts)
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
    texts = prompt_texts(prompts, tokenizer)
    ranks = accelerator.num_processes if accelerator else 1
    if batch_size is None:
        longest = len(tokenizer(max(texts, key=len), add_special_tokens=False)["input_ids"]) if texts else 0
        batch_size = answers_at_once(model, longest=longest, new=max_new_tokens, count=len(texts), processes=ranks)
    batches = batches_by_length(expected_lengths or [len(text) for text in texts], batch_size)
    rank = accelerator.process_index if accelerator else 0
    together = ranks > 1 and is_split(model)
    found: list[tuple[int, Answer]] = []
    rounds = -(-len(batches) // ranks)
    show = tqdm(range(rounds), desc="generating", leave=False, disable=True if rank or rounds < 2 else None)
    layers = [] if is_split(model) else lora_layers(model)
    with preserved_random_state(), answering(model), factors_cast(layers, model.get_input_embeddings().weight.dtype):
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


# The shortest prompt of a group, as a share of its longest: at most a quarter of what is computed is padding.
_SIMILAR = 0.75


class RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, columns, size) of one layer, allocated once; `keys` and `values` are the used part.

    Between groups `turn_to` moves the used part: rows, and columns from the first of them on.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = rows, columns
        self.rooms: tuple[torch.Tensor, ...] = ()
        self.rows, self.first = slice(0, rows), 0

    def turn_to(self, rows: slice, first: int, end: int) -> None:
        self.rows, self.first = rows, first
        if self.rooms:
            self.keys, self.values = (room[rows, :, first:end] for room in self.rooms)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, columns = self.shape
            # Zeros, as what is left of a short prompt is masked but still multiplied.
            self.rooms = tuple(
                states.new_zeros(rows, states.shape[1], columns, states.shape[3])
                for states in (key_states, value_states)
            )
        start = self.first + self.get_seq_length()
        end = start + key_states.shape[2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[self.rows, :, start:end] = states
        self.turn_to(self.rows, self.first, end)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values


def similar_lengths(lengths: Sequence[int]) -> list[slice]:
    """Groups of neighbours for lengths in falling order."""
    groups, start = [], 0
    for position in range(1, len(lengths) + 1):
        if position == len(lengths) or lengths[position] < _SIMILAR * lengths[start]:
            groups.append(slice(start, position))
            start = position
    return groups


def read_prompts(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, **generate: Any
) -> DynamicCache | None:
    """The cache of all prompts but their last token, which `generate` reads when it is handed the cache.

    Args:
        input_ids, attention_mask: (rows, tokens), padded on the left, the longest prompt first.
        generate: further arguments of the model's `generate`.

    Returns:
        None where a layer of the model keeps something else than all keys and values of its own (a window, a recurrent
        state, those of another layer), or the model's settings ask for another cache.
    """
    cache = DynamicCache(config=model.config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain or model.generation_config.cache_implementation is not None:
        return None
    count, width = input_ids.shape
    layers = [RoomyLayer(count, width + max_new_tokens) for _ in cache.layers]
    cache.layers = list(layers)
    lengths = attention_mask.sum(dim=1).tolist()
    for rows in similar_lengths(lengths):
        first = width - lengths[rows.start]
        for layer in layers:
            layer.turn_to(rows, first, first)
        model.generate(
            input_ids=input_ids[rows, first:],
            attention_mask=attention_mask[rows, first:],
            past_key_values=cache,
            **generate | {"max_new_tokens": 1, "min_new_tokens": 0},
        )
        if any(layer.get_seq_length() != width - first for layer in layers):
            return None
    for layer in layers:
        layer.turn_to(slice(0, count), 0, width - 1)
    return cache

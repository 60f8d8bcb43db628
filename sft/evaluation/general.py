"""General abilities: short questions of our own that a model should answer after a stage as it did before.

150 questions in English and Japanese (knowledge, arithmetic, reading, instructions, formats), each with one right and
three wrong answers. A model answers with the choice it finds most likely per byte behind its own chat template, so
nothing is generated and nothing has to be parsed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import DynamicCache

from sft.evaluation.answers import is_split, prompt_texts
from sft.evaluation.reading import Kept, bare, columns_held, keeps_all, read_prompts
from sft.evaluation.shared import pass_cost, with_beginnings
from sft.models.model import answering, preserved_random_state
from sft.scoring.forgetting import TaskScores

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from transformers import PreTrainedTokenizerBase

METRIC = "general_accuracy"
CHANCE = 0.25  # four choices each
_FILE = Path(__file__).with_name("general_questions.tsv")
# Questions in a batch: 16 with four choices of 10 tokens over 150,000 words are 0.4 GB of logits in float32.
_AT_ONCE = 16


@dataclass(frozen=True)
class Question:
    """`choices`: the right one first."""

    kind: str
    language: str
    text: str
    choices: tuple[str, ...]


def general_questions() -> list[Question]:
    """All of them, in the order of the file."""
    with _FILE.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [
        Question(kind, language, text, tuple(choice.replace("\\n", "\n") for choice in choices))
        for kind, language, text, *choices in rows
    ]


def answer_general(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    accelerator: Accelerator | PartialState | None = None,
    interrupted: Callable[[], None] = lambda: None,
) -> list[bool]:
    """Which questions the model gets right, in their order, the same on every rank.

    Ranks share the questions, except where each holds a part of the weights: there all of them compute everything.
    """
    ranks = accelerator.num_processes if accelerator and not is_split(model) else 1
    rank = accelerator.process_index if accelerator and ranks > 1 else 0
    prompts = prompt_texts([[{"role": "user", "content": each.text}] for each in questions], tokenizer)
    mine = range(rank, len(questions), ranks)
    asked = [(prompts[number], questions[number].choices) for number in mine]
    with preserved_random_state(), answering(model):
        scores = _likelihoods(model, tokenizer, asked, interrupted)
    found = [(number, all(each[0] > other for other in each[1:])) for number, each in zip(mine, scores, strict=True)]
    return [right for _, right in sorted(gather_object(found) if ranks > 1 else found)]


def _likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, Sequence[str]]],
    interrupted: Callable[[], None],
) -> list[list[float]]:
    """Log-likelihood per byte of each choice behind its prompt, for every (prompt, choices)."""

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [encoded(prompt) for prompt, _ in asked]
    choices = [[encoded(choice) for choice in found] for _, found in asked]
    kept: Kept = {}
    totals = partial(_behind_prompts, kept=kept) if _keeps_all(model) else _one_by_one
    order = sorted(range(len(asked)), key=lambda number: len(prompts[number]))
    found: list[list[float]] = [[] for _ in asked]
    for start in range(0, len(order), _AT_ONCE):
        interrupted()
        batch = order[start : start + _AT_ONCE]
        sums = totals(model, [prompts[number] for number in batch], [choices[number] for number in batch])
        for number, each in zip(batch, sums, strict=True):
            found[number] = [s / len(text.encode()) for s, text in zip(each, asked[number][1], strict=True)]
    return found


def _keeps_all(model: Any) -> bool:
    """Whether a prompt can be read once for all its choices."""
    return keeps_all(bare(model))


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded on the right: what is causal never sees it, attention or recurrent state."""
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[line, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _behind_prompts(
    model: Any, prompts: list[list[int]], choices: list[list[list[int]]], kept: Kept | None = None
) -> list[list[float]]:
    """Log-likelihoods of the choices: the prompts first, then all choices behind their cached keys and values. What
    prompts begin with alike (a template's system prompt) is read once for all batches that have `kept` in common."""
    cost = pass_cost(model.device.type)
    asked = with_beginnings(prompts, cost=cost, room=sum(map(len, prompts)))
    read = read_prompts(model, asked, room=0, kept={} if kept is None else kept)
    if read is None:
        return _one_by_one(model, prompts, choices)
    repeats, rows = len(choices[0]), [choice for number in read.order for choice in choices[number]]
    first = read.logits.float().log_softmax(dim=-1)
    totals = first.repeat_interleave(repeats, dim=0)[range(len(rows)), [row[0] for row in rows]]
    if any(len(row) > 1 for row in rows):
        cache = DynamicCache(config=model.config)
        for number, layer in enumerate(read.cache.rooms):
            keys, values = (room.repeat_interleave(repeats, dim=0) for room in layer.rooms)
            cache.update(keys, values, number)
        ids, own = _padded(rows, model.device)
        mask = columns_held(read.lengths, width=read.width, columns=read.width, device=ids.device).long()
        ends = torch.tensor(read.lengths, device=ids.device).repeat_interleave(repeats)
        positions = ends[:, None] + torch.arange(ids.shape[1] - 1, device=ids.device)
        seen = torch.cat([mask.repeat_interleave(repeats, dim=0), own[:, :-1]], dim=1)
        behind = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        logits = model(input_ids=ids[:, :-1], **behind).logits.float().log_softmax(dim=-1)
        totals = totals + (logits.gather(2, ids[:, 1:, None])[:, :, 0] * own[:, 1:]).sum(dim=1)
    found = dict(zip(read.order, totals.reshape(len(prompts), repeats).tolist(), strict=True))
    return [found[number] for number in range(len(prompts))]


def _one_by_one(model: Any, prompts: list[list[int]], choices: list[list[list[int]]]) -> list[list[float]]:
    """The same where a layer keeps something else (a window, a state): every choice with its prompt before it."""
    found = []
    for prompt, each in zip(prompts, choices, strict=True):
        ids, _ = _padded([[*prompt, *choice] for choice in each], model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
        chosen = logits.gather(2, ids[:, len(prompt) :, None])[:, :, 0]
        found.append([chosen[line, : len(choice)].sum().item() for line, choice in enumerate(each)])
    return found


def general_metrics(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, float]:
    """general_accuracy, and the same per kind and per language (general_accuracy/reading, general_accuracy/ja)."""
    parts: dict[str, list[bool]] = {"": []}
    for question, answered in zip(questions, right, strict=True):
        for part in ("", question.kind, question.language):
            parts.setdefault(part, []).append(answered)
    return {f"{METRIC}/{part}" if part else METRIC: sum(each) / len(each) for part, each in parts.items()}


def ask_general(
    model: Any, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator | PartialState
) -> tuple[TaskScores, list[float | None]]:
    """Accuracy over all (""), by kind and by language; and 1.0 or 0.0 for every question, in order."""
    questions = general_questions()
    right = answer_general(model, tokenizer, questions, accelerator=accelerator)
    metrics = general_metrics(questions, right)
    return {name.removeprefix(METRIC).removeprefix("/"): v for name, v in metrics.items()}, [float(r) for r in right]


def is_chance(accuracy: float, count: int) -> bool:
    """Whether guessing alone would reach the accuracy on `count` questions one time in forty or oftener (one-sided
    97.5 % bound, normal approximation): such a model has no general abilities that a stage could cost it."""
    return accuracy <= CHANCE + 1.96 * math.sqrt(CHANCE * (1 - CHANCE) / count)

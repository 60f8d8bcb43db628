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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from sft.evaluation.answers import is_split, prompt_texts
from sft.models.model import answering, preserved_random_state
from sft.scoring.forgetting import TaskScores

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from transformers import PreTrainedTokenizerBase

METRIC = "general_accuracy"
CHANCE = 0.25  # four choices each
_FILE = Path(__file__).with_name("general_questions.tsv")
# Logits of a batch: 16 sequences of 60 tokens over 150,000 words are 0.6 GB in float32.
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
    choices = [(number, place) for number in mine for place in range(len(questions[number].choices))]
    texts = [(prompts[number], questions[number].choices[place]) for number, place in choices]
    with preserved_random_state(), answering(model):
        scores = dict(zip(choices, _likelihoods(model, tokenizer, texts, interrupted), strict=True))
    found = [
        (number, all(scores[number, 0] > scores[number, place] for place in range(1, len(questions[number].choices))))
        for number in mine
    ]
    return [right for _, right in sorted(gather_object(found) if ranks > 1 else found)]


def _likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    interrupted: Callable[[], None],
) -> list[float]:
    """Log-likelihood per byte of each (prompt, choice)'s choice. Padding stands on the right: what is causal never
    sees it, attention or recurrent state."""
    encoded = [[tokenizer(part, add_special_tokens=False)["input_ids"] for part in pair] for pair in texts]
    lengths = [len(prompt) + len(choice) for prompt, choice in encoded]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    found = [0.0] * len(texts)
    for start in range(0, len(order), _AT_ONCE):
        interrupted()
        batch = order[start : start + _AT_ONCE]
        width = max(lengths[number] for number in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for line, number in enumerate(batch):
            ids[line, : lengths[number]] = torch.tensor([*encoded[number][0], *encoded[number][1]])
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        for line, number in enumerate(batch):
            prompt, choice = encoded[number]
            own = logits[line, len(prompt) - 1 : lengths[number] - 1].float().log_softmax(dim=-1)
            total = own.gather(1, torch.tensor(choice, device=own.device)[:, None]).sum().item()
            found[number] = total / len(texts[number][1].encode())
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

"""Generation evaluation: answers to validation rows, scored, shown and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm

from sft.data.labels.template import NO_TEMPLATE, TEMPLATE_ERRORS, Chat, chats_of, said, template_of
from sft.distributed import ranks
from sft.errors import Problems
from sft.evaluation.answers import Answer, generate_answers
from sft.scoring import own
from sft.scoring.score import score
from sft.settings.schema import NAMES
from sft.stages import paths
from sft.storage import atomic, json_files

_JUDGED_BY = ("SFT_GEN_EVAL", "SFT_GEN_MAX_NEW_TOKENS", "SFT_EXTRACTION_FIELDS", "SFT_OUTPUT_MARKERS")

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from sft.data.sources.turns import Message
    from sft.settings import Settings
    from sft.stages.manifest import Manifest


def questions(val: datasets.Dataset, settings: Settings) -> list[dict[str, Any]]:
    """The validation rows to answer, drawn by seed: {"task", "prompt" (messages), "reference"}, and "extras" where the
    row has tools or the like. Plain text and calls of tools are no answers to compare with."""
    usable = [i for i, messages in enumerate(val["messages"]) if is_answered(messages)]
    count = min(settings.gen_eval_samples, len(usable))
    drawn = np.sort(np.random.default_rng(settings.seed).permutation(usable)[:count]).tolist() if count else []
    return [_question(val[i]) for i in drawn]


def is_answered(messages: Sequence[Message]) -> bool:
    """Whether a row has a question and, as its last turn, an answer in words."""
    return len(messages) > 1 and messages[-1]["role"] == "assistant" and bool(messages[-1]["content"].strip())


def _question(row: dict[str, Any]) -> dict[str, Any]:
    *asked, answer = row["messages"]
    prompt = [{"role": message["role"], "content": message["content"]} for message in asked]
    extras = {"extras": row["extras"]} if row.get("extras") else {}
    return {"task": row["task_key"], "prompt": prompt, "reference": answer["content"], **extras}


def prompts_of(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[str]:
    """The questions as a server renders them, tools and SFT_TEMPLATE_OPTIONS included.

    Raises:
        Problems: the template refuses one.
    """
    template = template_of(tokenizer, options)
    if template is None:
        raise Problems([NO_TEMPLATE])
    texts = []
    chats = chats_of([row["prompt"] for row in rows], [row.get("extras") for row in rows])
    for row, chat in zip(rows, chats, strict=True):
        try:
            texts += template.render([Chat(template.fitted(chat.messages), chat.tools)], prompt=True)
        except TEMPLATE_ERRORS as error:
            asked = row["prompt"][-1]["content"][:60]
            raise Problems([f"SFT_GEN_EVAL: the template refuses a question ({said(error)}): {asked}"]) from error
    return texts


class GenerationEvaluation:
    """Answers and scores a stage's questions during training, and those of earlier stages afterwards."""

    def __init__(
        self, settings: Settings, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
    ) -> None:
        self.settings, self.folder, self.tokenizer, self.rows = settings, folder, tokenizer, rows
        self.kind = settings.gen_eval

    def of_stage(self, manifest: Manifest) -> GenerationEvaluation:
        """The same for an earlier stage's questions: answered as long and judged as that stage's manifest says, or what
        stands in its column could not be compared. How a prompt is rendered stays a matter of today's template."""
        recorded = manifest.values()
        judged_by = {name: recorded[name] for name in _JUDGED_BY if name in recorded}
        changed = {NAMES[name]: tuple(v) if isinstance(v, list) else v for name, v in judged_by.items()}
        changed["json_schema"] = None  # it is no part of the matrix
        return GenerationEvaluation(self.settings.model_copy(update=changed), self.folder, self.tokenizer, self.rows)

    def answer(
        self,
        model: Any,
        rows: Sequence[dict[str, Any]],
        *,
        accelerator: Accelerator | PartialState | None = None,
        interrupted: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """One greedy answer per row."""
        return generate_answers(
            model,
            self.tokenizer,
            prompts_of(rows, self.tokenizer, self.settings.template_options),
            max_new_tokens=self.settings.gen_max_new_tokens,
            batch_size=self.settings.gen_batch_size,
            # Rows whose references are long get long answers: batched together, none waits for another.
            expected_lengths=[len(row["reference"]) * 4 + len(str(row["prompt"])) for row in rows],
            accelerator=accelerator,
            interrupted=interrupted,
        )

    def score(self, rows: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> tuple[list[dict], dict[str, float]]:
        """Each row with its answer, score and faults, and the metrics over all."""
        answered = [row | {"answer": each.text, "cut": each.cut} for row, each in zip(rows, answers, strict=True)]
        if own.parts_of(self.kind):  # a function may see time or chance: all ranks take what it tells the main process
            main = PartialState().is_main_process
            scores, metrics = ranks.from_main(self._scored(answered) if main else None)
        else:
            scores, metrics = self._scored(answered)
        return [row | found for row, found in zip(answered, scores, strict=True)], metrics

    def _scored(self, answered: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        return score(
            self.kind,
            answered,
            fields=self.settings.extraction_fields,
            markers=self.settings.output_markers,
            schema=self.settings.json_schema,
            complain=tqdm.write,
        )

    def run(
        self,
        model: Any,
        accelerator: Accelerator,
        *,
        step: int,
        interrupted: Callable[[], None],
        record: Callable[[list[dict[str, Any]]], None] = lambda samples: None,
    ) -> dict[str, float]:
        """One evaluation: metrics, with gen_metrics_step<step>.json and gen_samples_step<step>.jsonl written; the
        main process hands the samples to `record`."""
        answers = self.answer(model, self.rows, accelerator=accelerator, interrupted=interrupted)
        samples, metrics = self.score(self.rows, answers)
        if accelerator.is_main_process:
            json_files.write_json(self.folder / f"{paths.GEN_METRICS}{step}.json", metrics | {"gen_global_step": step})
            keep_samples(self.folder / f"{paths.GEN_SAMPLES}{step}.jsonl", samples)
            record(samples)
        return metrics


def keep_samples(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """A line per answer, with what was asked and how it was judged."""
    atomic.write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


def show_samples(samples: Sequence[dict[str, Any]], count: int, title: str) -> None:
    """Prints the first `count` answers beside what was asked, shortened."""
    if not samples or count == 0:
        return
    tqdm.write(f"\n{title}")
    for sample in samples[:count]:
        asked = sample["prompt"][-1]["content"].strip().replace("\n", " ⏎ ")
        score = sample.get("score")
        tqdm.write(f"  asked    {asked[:150]}")
        tqdm.write(f"  answered {sample['answer'].strip().replace(chr(10), ' ⏎ ')[:150] or '(nothing)'}")
        tqdm.write(f"  wanted   {sample['reference'].strip().replace(chr(10), ' ⏎ ')[:150]}")
        faults = f"   ({', '.join(sample['faults'])})" if sample.get("faults") else ""
        if sample.get("schema_error"):
            tqdm.write(f"  schema   {sample['schema_error']}")
        tqdm.write(f"  score    {score:.2f}{faults}\n" if score is not None else "")


def write_questions(folder: Path, rows: list[dict[str, Any]], kind: str) -> None:
    """gen_rows.jsonl: what later stages ask their own models, to see what was forgotten."""
    atomic.write_text(
        folder / paths.QUESTIONS, "".join(json.dumps(row | {"kind": kind}, ensure_ascii=False) + "\n" for row in rows)
    )

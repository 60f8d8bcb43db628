"""Filling the forgetting matrix: the base model and every stage's model on every stage's validation rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from sft.distributed import ranks
from sft.distributed.launch import launched
from sft.distributed.ranks import say
from sft.evaluation.general import ask_general, general_questions, is_chance
from sft.evaluation.generation_evaluation import GenerationEvaluation, keep_samples
from sft.models.model import load_model
from sft.scoring.forgetting import GENERAL, Matrix, TaskScores, drops, stage_number
from sft.stages import paths
from sft.stages.manifest import Manifest, is_intact, read_manifest, with_digest
from sft.stages.variants import siblings
from sft.storage import json_files

if TYPE_CHECKING:
    from sft.stages.stage import Stage

METRIC = "gen_score"


def task_scores(metrics: dict[str, float], rows: Sequence[dict[str, Any]]) -> TaskScores:
    """gen_score overall (key "") and per task key of the rows that were asked."""
    keys = {row["task"] for row in rows if row.get("task")}
    scores = {key: metrics[f"{METRIC}/{key}"] for key in sorted(keys) if f"{METRIC}/{key}" in metrics}
    return scores | ({"": metrics[METRIC]} if METRIC in metrics else {})


def earlier_stages(stage: Stage) -> dict[int, Path]:
    """The folders of all complete stages before this one, by number. Those before a fully trained stage are no parents
    any more (its weights hold what they learnt), but their questions and models are still there to compare."""
    folders = {number: paths.stage_folder(stage.settings.out_lora_dir, number) for number in range(1, stage.number)}
    return {number: folder for number, folder in folders.items() if _status(folder, number) == "complete"}


def _status(folder: Path, number: int) -> str | None:
    try:
        manifest = read_manifest(folder, number)
    except json_files.DamagedFile:
        return None
    return manifest.status if manifest else None


def earlier_models(stage: Stage) -> dict[str, str]:
    """The base and each earlier stage's model by name, and the folder or hub id that holds it, where there is one.

    A fully trained stage holds its model itself; another one's is what the next stage started from. The one just before
    this stage is its own step 0, so it is not here.
    """
    models = {"base": stage.settings.base_model}
    for number, folder in list(earlier_stages(stage).items())[:-1]:
        merged = paths.merged_base(paths.stage_folder(stage.settings.out_lora_dir, number + 1))
        holds_model = not (folder / paths.ADAPTER_CONFIG).is_file()
        if (found := folder if holds_model else merged).joinpath(paths.MODEL_CONFIG).is_file():
            models[f"stage {number}"] = str(found)
    return models if stage.parents else {}


def score_earlier(stage: Stage, evaluation: GenerationEvaluation) -> Matrix:
    """Scores on this stage's rows of every model before the one this stage starts from, loaded one after the other.

    A resumed stage has them in its folder already. Several processes share the rows; each loads the whole model, so
    this is left out where the weights are split because they may not fit (ZeRO-3, FSDP).
    """
    path = stage.folder / paths.EARLIER_SCORES
    state = PartialState()
    known = Matrix.read(
        ranks.from_main(_found_before(stage, path.name).get("scores") if state.is_main_process else None)
    )
    earlier = known or Matrix()
    for name, source in earlier_models(stage).items() if known is None and not launched().splits_weights else ():
        say(f"Scoring {name} on the rows of stage {stage.number} ...")
        model = load_model(source, stage.settings)
        answers = evaluation.answer(model, evaluation.rows, accelerator=state)
        samples, metrics = evaluation.score(evaluation.rows, answers)
        earlier.put(name, f"stage {stage.number}", task_scores(metrics, evaluation.rows), question_scores(samples))
        if state.is_main_process and name != "base":
            keep_samples(stage.folder / f"{paths.SAMPLES_BY_STAGE}{stage_number(name)}.jsonl", samples)
        del model
        gc.collect()
        torch.cuda.empty_cache()  # the next model is of another size; without a GPU it does nothing
    if state.is_main_process:
        json_files.write_json(path, with_digest({"scores": earlier.record()}))
    return earlier


def question_scores(samples: Sequence[dict[str, Any]]) -> list[float | None]:
    return [sample.get("score") for sample in samples]


def _known(path: Path) -> dict[str, Any]:
    """What a file of scores holds; {} where it is absent or damaged."""
    try:
        record = json_files.read_json(path)
        return record if is_intact(record) else {}
    except (FileNotFoundError, json_files.DamagedFile, TypeError):
        return {}


def _found_before(stage: Stage, name: str) -> dict[str, Any]:
    """What an earlier start of the stage found, or another of its variants that asked the same; {} without any."""
    if known := _known(stage.folder / name):
        return known
    asked = stage.folder / paths.QUESTIONS
    for folder in siblings(stage):
        if not (folder / name).is_file():
            continue
        same = name == paths.GENERAL or asked.read_bytes() == (folder / paths.QUESTIONS).read_bytes()
        if same and (known := _known(folder / name)):
            return known
    return {}


def general_before(stage: Stage, model: Any, tokenizer: Any) -> None:
    """Asks the model this stage starts from the general questions, where no earlier stage has, and keeps the scores.

    Call it before the first step, when the adapter does nothing yet.
    """
    asked = _previous(earlier_stages(stage)).cell(_before(stage), GENERAL) is not None
    if not asked and tokenizer.chat_template:
        found = ranks.from_main(_found_before(stage, paths.GENERAL) if PartialState().is_main_process else None)
        if not found:
            say(f"Asking {len(general_questions())} general questions before training ...")
        scores, right = (found["scores"], found["right"]) if found else ask_general(model, tokenizer, PartialState())
        if PartialState().is_main_process:
            json_files.write_json(stage.folder / paths.GENERAL, with_digest({"scores": scores, "right": right}))


def general_after(stage: Stage, model: Any, tokenizer: Any, accelerator: Any) -> Matrix:
    """The general questions before and after the stage; nothing where the model it started from only guesses."""
    previous, name, found = _previous(earlier_stages(stage)), _before(stage), Matrix()
    before = previous.table.get(name, {}).get(GENERAL)
    answered = previous.questions.get(name, {}).get(GENERAL, [])
    if before is None:
        known = _known(stage.folder / paths.GENERAL)
        before, answered = known.get("scores"), known.get("right", [])
    if before is None:
        return found
    if is_chance(before[""], len(general_questions())):
        say(f"General questions left out: {name} has {before['']:.0%} right, which guessing gets as well")
        return found
    after, right = ask_general(model, tokenizer, accelerator)
    say(f"General questions: {before['']:.3f} right before this stage, {after['']:.3f} after it")
    found.put(name, GENERAL, before, answered)
    found.put(f"stage {stage.number}", GENERAL, after, right)
    return found


def _before(stage: Stage) -> str:
    return f"stage {stage.parents[-1].stage}" if stage.parents else "base"


def ladder_scores(
    stage: Stage,
    evaluation: GenerationEvaluation | None,
    earlier: Matrix | None,
    *,
    general: Matrix,
    model: Any,
    accelerator: Any,
    step: int,
) -> dict[str, Any] | None:
    """The manifest's `forgetting` record: what earlier stages found, plus this stage's rows and this stage's model.

    `step`: the last one, at which the stage's own rows were asked already.
    """
    stages = earlier_stages(stage)
    matrix = _previous(stages)
    matrix.margin = stage.settings.forgetting_margin
    matrix.update(earlier or Matrix())
    here = f"stage {stage.number}"
    if evaluation:
        for name, at in ((_before(stage), 0), (here, step)):
            samples = json_files.read_records(stage.folder / f"{paths.GEN_SAMPLES}{at}.jsonl")
            matrix.put(name, here, task_scores(_metrics_at(stage, at), evaluation.rows), question_scores(samples))
    matrix.update(general)
    for number, folder in stages.items():
        if evaluation and (rows := json_files.read_records(folder / paths.QUESTIONS)):
            say(f"Scoring stage {stage.number} on the rows of stage {number} ...")
            then = evaluation.of_stage(read_manifest(folder, number) or Manifest())
            samples, metrics = then.score(rows, then.answer(model, rows, accelerator=accelerator))
            matrix.put(here, f"stage {number}", task_scores(metrics, rows), question_scores(samples))
            if PartialState().is_main_process:
                keep_samples(stage.folder / f"{paths.SAMPLES_OF_STAGE}{number}.jsonl", samples)
    if not any(scores for tasks in matrix.table.values() for scores in tasks.values()):
        return None
    for drop in drops(matrix):
        say(f"[WARNING] Forgetting: {drop.sentence()}")
    return matrix.record()


def _metrics_at(stage: Stage, step: int) -> dict[str, float]:
    """The evaluation of a step, from metrics.jsonl: checkpoints vouch for its lines."""
    records = json_files.read_records(stage.folder / paths.METRICS)
    found = [record for record in records if record.get("step") == step and METRIC in record]
    return found[-1] if found else {}


def _previous(stages: dict[int, Path]) -> Matrix:
    """What the last stage that has a matrix recorded."""
    manifests = (read_manifest(folder, number) for number, folder in reversed(stages.items()))
    return next((found for each in manifests if each and (found := Matrix.read(each.forgetting))), Matrix())

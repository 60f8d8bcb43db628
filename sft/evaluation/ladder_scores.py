"""Filling the forgetting matrix: the base model and every stage's model on every stage's validation rows."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from sft.distributed import ranks
from sft.distributed.launch import launched
from sft.evaluation.generation_evaluation import GenerationEvaluation
from sft.models.model import load_model
from sft.scoring.forgetting import drops, stage_number
from sft.scoring.metrics import FORGETTING_MARGIN
from sft.stages import paths
from sft.stages.manifest import is_intact, read_manifest, with_digest
from sft.storage import json_files

if TYPE_CHECKING:
    from sft.stages.stage import Stage

METRIC = "gen_score"
TaskScores = dict[str, float]


@dataclass
class Earlier:
    """Task scores of earlier models: {model: {tasks: {task key: score, "": overall}}}."""

    scores: dict[str, dict[str, TaskScores]] = field(default_factory=dict)


def say(text: str) -> None:
    if PartialState().is_main_process:
        tqdm.write(text)


def task_scores(metrics: dict[str, float]) -> TaskScores:
    """gen_score overall (key "") and per task key."""
    prefix = f"{METRIC}/"
    scores = {name.removeprefix(prefix): v for name, v in metrics.items() if name.startswith(prefix) and "_to_" in name}
    return scores | ({"": metrics[METRIC]} if METRIC in metrics else {})


def earlier_models(stage: Stage) -> dict[str, str]:
    """The base and each earlier stage's model by name, and the folder or hub id that holds it, where there is one.

    Stage K's model is what stage K+1 started from. The one just before this stage is its own step 0, so it is not here.
    """
    models = {"base": stage.settings.base_model}
    for parent in stage.parents[:-1]:
        merged = paths.merged_base(paths.stage_folder(stage.settings.out_lora_dir, parent.stage + 1))
        if (merged / paths.MODEL_CONFIG).is_file():
            models[f"stage {parent.stage}"] = str(merged)
    return models if stage.parents else {}


def score_earlier(stage: Stage, evaluation: GenerationEvaluation) -> Earlier:
    """Scores on this stage's rows of every model before the one this stage starts from, loaded one after the other.

    A resumed stage has them in its folder already. Several processes share the rows; each loads the whole model, so
    this is left out where the weights are split because they may not fit (ZeRO-3, FSDP).
    """
    path = stage.folder / paths.EARLIER_SCORES
    state = PartialState()
    known = ranks.from_main(_known_scores(path) if state.is_main_process else None)
    if known is not None:
        return Earlier(known)
    earlier = Earlier()
    tasks = f"stage {stage.number}"
    for name, source in earlier_models(stage).items() if not launched().splits_weights else ():
        say(f"Scoring {name} on the rows of stage {stage.number} ...")
        model = load_model(source, stage.settings)
        answers = evaluation.answer(model, evaluation.rows, accelerator=state)
        _, metrics = evaluation.score(evaluation.rows, answers)
        earlier.scores[name] = {tasks: task_scores(metrics)}
        del model
        gc.collect()
        torch.cuda.empty_cache()  # the next model is of another size; without a GPU it does nothing
    if state.is_main_process:
        json_files.write_json(path, with_digest({"scores": earlier.scores}))
    return earlier


def _known_scores(path: Path) -> dict[str, dict[str, TaskScores]] | None:
    """What an earlier start of the stage found; None where it is absent or damaged."""
    try:
        record = json_files.read_json(path)
        return record["scores"] if is_intact(record) else None
    except (FileNotFoundError, json_files.DamagedFile, KeyError, TypeError):
        return None


def ladder_scores(
    stage: Stage, evaluation: GenerationEvaluation, earlier: Earlier, *, model: Any, accelerator: Any, step: int
) -> dict[str, Any] | None:
    """The manifest's `forgetting` record: what earlier stages found, plus this stage's rows and this stage's model.

    `step`: the last one, at which the stage's own rows were asked already.
    """
    table: dict[str, dict[str, TaskScores]] = _previous_table(stage)
    for name, tasks in earlier.scores.items():
        table.setdefault(name, {}).update(tasks)
    here, before = f"stage {stage.number}", f"stage {stage.parents[-1].stage}" if stage.parents else "base"
    table.setdefault(before, {})[here] = task_scores(_metrics_at(stage, 0))
    table.setdefault(here, {})[here] = task_scores(_metrics_at(stage, step))
    for parent in stage.parents:
        rows = json_files.read_records(parent.folder / paths.QUESTIONS)
        if rows:
            say(f"Scoring stage {stage.number} on the rows of stage {parent.stage} ...")
            answers = evaluation.answer(model, rows, accelerator=accelerator)
            _, metrics = evaluation.score(rows, answers)
            table[here][f"stage {parent.stage}"] = task_scores(metrics)
    scored = any(scores for tasks in table.values() for scores in tasks.values())
    return _record(table, stage.settings.forgetting_margin) if scored else None


def _metrics_at(stage: Stage, step: int) -> dict[str, float]:
    """The evaluation of a step, from metrics.jsonl: checkpoints vouch for its lines."""
    records = json_files.read_records(stage.folder / paths.METRICS)
    found = [record for record in records if record.get("step") == step and "eval_loss" in record]
    return found[-1] if found else {}


def _previous_table(stage: Stage) -> dict[str, dict[str, TaskScores]]:
    """What the last stage that has a matrix recorded."""
    for parent in reversed(stage.parents):
        matrix = (read_manifest(parent.folder, parent.stage) or {}).get("forgetting")
        if matrix:
            return {
                model: {
                    tasks: matrix["by_task"].get(model, {}).get(tasks, {}) | {"": score}
                    for tasks, score in zip(matrix["tasks"], row, strict=True)
                    if score is not None
                }
                for model, row in zip(matrix["models"], matrix["scores"], strict=True)
            }
    return {}


def _record(table: dict[str, dict[str, TaskScores]], margin: float = FORGETTING_MARGIN) -> dict[str, Any]:
    models = sorted(table, key=stage_number)
    tasks = sorted({name for scores in table.values() for name in scores}, key=stage_number)
    matrix = {
        "metric": METRIC,
        "margin": margin,
        "models": models,
        "tasks": tasks,
        "scores": [[table[model].get(name, {}).get("") for name in tasks] for model in models],
        "by_task": {
            model: {name: {key: s for key, s in scores.items() if key} for name, scores in table[model].items()}
            for model in models
        },
    }
    for drop in drops(matrix, margin):
        say(f"[WARNING] Forgetting: {drop.sentence()}")
    return matrix

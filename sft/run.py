"""The named steps of one stage, called by train.py in this order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from accelerate import PartialState

from sft.data.masked_loss.edge_mask import EdgeMask
from sft.data.mixture import prepare_mix
from sft.distributed import ranks
from sft.distributed.launch import launched
from sft.distributed.ranks import say
from sft.distributed.signals import STOP, Stopped
from sft.evaluation.chosen_by import asked_rows, require_comparison, require_metric, require_prompts
from sft.evaluation.general import METRIC
from sft.evaluation.generation_evaluation import GenerationEvaluation, write_questions
from sft.evaluation.held_out import earlier_questions, write_held_out
from sft.evaluation.ladder_scores import general_after, general_before, ladder_scores, score_earlier
from sft.heap import return_freed_memory
from sft.merging.parents import keep_probe, verify_merged
from sft.models.experts import products
from sft.models.fitness import require_known_tokens
from sft.models.model import load_config, trained_modules
from sft.models.targets import target_notes
from sft.planning.need import checkpointing_needed, chosen_pass_tokens, largest_batch, raise_shortage
from sft.reporting.recording import RunRecord
from sft.scoring.forgetting import GENERAL, Matrix
from sft.scoring.gates import judge
from sft.stages import paths
from sft.stages.taught import taught_before
from sft.storage import json_files
from sft.training.arguments import training_arguments
from sft.training.batches import TrainingRows, packs_of
from sft.training.progress import AtSave, AtStart, Metrics, Readable
from sft.training.results import parameter_counts, training_config, write_result
from sft.training.trainer import StagedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft.data.mixture import Mix
    from sft.reporting.tracker import Tracker
    from sft.settings import Settings
    from sft.stages.safety_copy import SafetyCopy
    from sft.stages.stage import Stage
    from sft.training.trainer import Measure

transformers.utils.logging.disable_progress_bar()


def prepare_rows(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Mix:
    """The rows of the stage; the main process makes the labels, the others find them cached."""
    say("Reading, labelling and auditing rows ...")
    with ranks.main_first("the main process to read the data"):
        taught = taught_before(settings)
        mix = prepare_mix(settings, tokenizer, say=say, earlier=earlier_questions(settings), taught=taught)
    require_known_tokens(load_config(settings), settings, tokenizer, mix.train, mix.val)
    for warning in mix.warnings:
        say(warning)
    say(f"Rows: {mix.rows_in_words()}")
    for remark in mix.remarks():
        say(remark)
    require_metric(settings, mix, say)
    require_prompts(settings, mix, tokenizer)
    require_comparison(settings, mix, tokenizer)
    return mix


def rows_facts(mix: Mix) -> dict[str, Any]:
    """What the manifest says of the rows."""
    return {
        "sources": mix.sources,
        "train_rows": len(mix.train),
        "val_rows": len(mix.val),
        "dropped": dict(mix.dropped),
        "upsampling": mix.upsampling,
        "replay": mix.replay,
        "tokens": mix.tokens,
    }


def evaluation(stage: Stage, tokenizer: PreTrainedTokenizerBase, mix: Mix) -> GenerationEvaluation | None:
    """The generation evaluation of the stage, None when SFT_GEN_EVAL=none or there is nothing to ask."""
    settings = stage.settings
    rows = asked_rows(settings, mix)
    if not rows:
        return None
    if PartialState().is_main_process:
        write_questions(stage.folder, rows, settings.gen_eval)
    return GenerationEvaluation(settings, stage.folder, tokenizer, rows)


def score_earlier_models(stage: Stage, evaluation: GenerationEvaluation | None) -> Matrix | None:
    """How the base model and earlier stages' models do on this stage's rows, before it is trained."""
    return score_earlier(stage, evaluation) if evaluation else None


def build_edge_mask(mix: Mix, settings: Settings) -> EdgeMask | None:
    if settings.masked_loss == "none":
        return None
    edges = mix.train["unit_edges"]
    return EdgeMask.build(edges, range(len(edges)), seed=settings.seed, redraw=settings.masked_loss_redraw)


def checkpoints_gradients(settings: Settings, model: PreTrainedModel, mix: Mix) -> bool:
    """SFT_GRADIENT_CHECKPOINTING; auto turns it on where a step would not fit without it, on all ranks alike."""
    if settings.gradient_checkpointing != "auto":
        return settings.gradient_checkpointing == "1"
    # Under ZeRO-3 a parameter is empty and its share of the numbers lies aside.
    held = sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in model.parameters())
    batch = largest_batch(mix.train, settings, settings.micro_batch_tokens or 0)
    needed = checkpointing_needed(model.config, settings, batch, held=held)
    return ranks.from_main(needed)


def rows_to_train(mix: Mix, settings: Settings, edge_mask: EdgeMask | None) -> TrainingRows:
    """The rows as the trainer takes them: packed and masked as the settings say."""
    packs, mode = packs_of(mix.train, settings), settings.masked_loss_mode
    return TrainingRows(mix.train, packs=packs, edge_mask=edge_mask, mode=mode, names=mix.names)


def tokens_of_a_pass(stage: Stage, model: PreTrainedModel, mix: Mix, checkpointing: bool) -> int:
    """SFT_MICRO_BATCH_TOKENS as a number, that of the checkpoint where it is to be the same."""
    return chosen_pass_tokens(
        model.config, stage.settings, mix.train, checkpointing=checkpointing, checkpoint=stage.checkpoint
    )


def measure_answers(evaluation: GenerationEvaluation, record: RunRecord) -> Measure:
    """The generation evaluation as the trainer calls it."""

    def measure(model: Any, accelerator: Any, state: Any, interrupted: Callable[[], None]) -> dict[str, float]:
        step = state.global_step
        if step == 0:
            say(f"Answering {len(evaluation.rows)} questions before training ...")
        keep = partial(record.samples, step=step, steps=state.max_steps)
        return evaluation.run(model, accelerator, step=step, interrupted=interrupted, record=keep)

    return measure


def build_trainer(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mix: Mix,
    evaluation: GenerationEvaluation | None,
    tracker: Tracker | None,
    copy: SafetyCopy | None = None,
) -> StagedTrainer:
    """The trainer with its data, adapter and records; says what will be trained."""
    settings, record = stage.settings, RunRecord(stage, tracker)
    edge_mask = build_edge_mask(mix, settings)
    if edge_mask is not None:
        stage.update(masked_loss=edge_mask.report(settings.epochs))
    for note in target_notes(model, settings):
        say(note)
    checkpointing = checkpoints_gradients(settings, model, mix)
    if checkpointing and model.device.type == "cpu":
        return_freed_memory(sparingly=True)
    trainer = StagedTrainer(
        model,
        args=training_arguments(
            settings,
            stage.folder,
            checkpointing=checkpointing,
            evaluated=len(mix.val) > 0 or evaluation is not None,
            resumed=stage.checkpoint is not None,
        ),
        settings=settings,
        tokenizer=tokenizer,
        rows=rows_to_train(mix, settings, edge_mask),
        val_rows=TrainingRows(mix.val, names=mix.names),
        measure=measure_answers(evaluation, record) if evaluation else None,
        pass_tokens=tokens_of_a_pass(stage, model, mix, checkpointing),
    )
    trainer.add_callback(Metrics(record.metrics))
    trainer.add_callback(Readable())
    if copy:
        trainer.add_callback(AtSave(copy.send))
    if launched().splits_weights and stage.checkpoint is None:
        trainer.add_callback(AtStart(lambda model: verify_merged(stage, model)))  # its adapter does nothing yet
    if settings.general_eval and stage.checkpoint is None:
        trainer.add_callback(AtStart(lambda model: general_before(stage, model, tokenizer)))
    announce(trainer)
    return trainer


def announce(trainer: StagedTrainer) -> None:
    """What will be trained, how experts are multiplied, and how slowly where they are a kind we don't know."""
    if not trainer.isolation.kept_apart:
        say(trainer.isolation.sentence())
    for reason in trainer.unrouted:
        say(f"[WARNING] adapters on experts take PEFT's slower way, through all experts for every batch: {reason}")
    if how := products(trainer.model):
        say(how)
    trained, total = parameter_counts(trainer.model)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in trained_modules(trainer.model).items())
    say(f"Training {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %): {kinds}")


def train(stage: Stage, trainer: StagedTrainer) -> None:
    """Trains, from the checkpoint where there is one; a stop signal ends it after the step it arrived in."""
    STOP.deferred = True
    say("Starting training...")
    try:
        trainer.train(resume_from_checkpoint=str(stage.checkpoint) if stage.checkpoint else None)
    except Stopped:
        trainer.save_after_stop()
    except (RuntimeError, MemoryError) as error:
        config = trainer.accelerator.unwrap_model(trainer.model).config
        how: dict[str, Any] = {"checkpointing": bool(trainer.args.gradient_checkpointing)}
        how["tokens"] = trainer.passes.tokens
        raise_shortage(error, config, stage.settings, trainer.train_dataset.rows, **how)
        raise
    finally:
        STOP.deferred = False
    # A signal after the last step had nothing to cut short in there.
    if trainer.rhythm.stopped or ranks.stop_agreed():
        raise Stopped(STOP.number or 15)
    say("Training completed successfully!")


def say_best(folder: Path) -> None:
    """Where the best model is and how good, if there is one, and whether it is more than chance that it is not the
    last."""
    from sft.reporting.scores import best_against_last

    notices: list[str] = []
    best = json_files.read_object(folder / paths.BEST_MODEL / paths.BEST_RECORD, notices)
    if best:
        say(f"Best model saved to {folder / paths.BEST_MODEL} (step {best['step']})")
        if best["best_perplexity"] is not None:
            say(f"Best perplexity: {best['best_perplexity']:.4f}")
        if found := best_against_last(folder, best):
            say(f"Best model against the last evaluation's: {found.sentence()}")


def finish(
    stage: Stage,
    trainer: StagedTrainer,
    mix: Mix,
    evaluation: GenerationEvaluation | None,
    earlier: Matrix | None,
    tracker: Tracker | None,
) -> None:
    """Writes the result, scores it on all stages' rows, completes the manifest and writes the report."""
    from sft.reporting.report import close_stage, write_report

    settings = stage.settings
    model, accelerator, state = trainer.model, trainer.accelerator, trainer.state
    bare = accelerator.unwrap_model(model)
    config = training_config(settings, trainer.args, bare)
    write_result(stage.folder, trainer.save_model, config, main=accelerator.is_main_process)
    say("Model and configuration saved successfully!")
    say_best(stage.folder)
    keep_probe(stage, bare, trainer.processing_class)
    asked = (stage, model, trainer.processing_class, accelerator)
    general = general_after(*asked) if settings.general_eval else Matrix()
    if scores := general.table.get(f"stage {stage.number}"):
        trainer.log({f"{METRIC}/{part}" if part else METRIC: score for part, score in scores[GENERAL].items()})
    forgetting = ladder_scores(
        stage, evaluation, earlier, general=general, model=model, accelerator=accelerator, step=state.global_step
    )
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    write_held_out(stage.folder, mix.held.tolist())
    last: dict[str, Any] = {}
    for record in json_files.read_records(stage.folder / paths.METRICS):
        last |= {name: value for name, value in record.items() if name not in ("step", "time")}

    stage.complete(
        steps=state.global_step,
        metrics=last | {"epoch": state.epoch},
        forgetting=forgetting,
        gate=judge(Matrix.read(forgetting), stage.number).record() if forgetting or settings.gate else None,
        mlflow_run_id=tracker.wait_for_run(5.0) if tracker else None,
        report=lambda manifest: write_report(stage.folder, settings.report_language, manifest=manifest),
    )
    close_stage(stage, tracker)

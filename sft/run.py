"""The named steps of one stage, called by train.py in this order."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sft.quiet import silence_torch

silence_torch()

import torch  # noqa: E402 - the lines above keep deepspeed quiet, which accelerate imports
import transformers  # noqa: E402
from accelerate import PartialState  # noqa: E402

from sft import files, ranks  # noqa: E402
from sft.bundle import parameter_counts, write_result  # noqa: E402
from sft.callbacks import AtStart, stop_agreed  # noqa: E402
from sft.data.frequency import EdgeMask  # noqa: E402
from sft.data.mixture import prepare as prepare_mix  # noqa: E402
from sft.errors import RunFailed  # noqa: E402
from sft.evaluation import GenerationEvaluation, questions, show_samples, write_questions  # noqa: E402
from sft.forgetting_scores import Earlier, ladder_scores, score_earlier  # noqa: E402
from sft.merge import merge, record_verification  # noqa: E402
from sft.model import compute_dtype, load_model, load_tokenizer, trained_modules  # noqa: E402
from sft.probe import FILE as PROBE  # noqa: E402
from sft.probe import store_probe, verify  # noqa: E402
from sft.settings import launched  # noqa: E402
from sft.signals import STOP, Stopped  # noqa: E402
from sft.tracking import Tracker  # noqa: E402
from sft.trainer import StagedTrainer, training_arguments  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft.data.mixture import Mix
    from sft.settings import Settings
    from sft.stages import Stage

transformers.utils.logging.disable_progress_bar()

__all__ = [
    "build_trainer",
    "evaluation",
    "finish",
    "load_tokenizer",
    "load_verified",
    "merge_parents",
    "prepare",
    "score_earlier_models",
    "tracked",
    "train",
]


def say(text: str) -> None:
    """One line on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)


def prepare(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Mix:
    """The rows of the stage; the main process makes the labels, the others find them cached."""
    with ranks.main_first("the main process to read the data"):
        mix = prepare_mix(settings, tokenizer, say=say)
    for warning in mix.warnings:
        say(warning)
    sources = ", ".join(f"{Path(source['id']).name} {source['drawn']}" for source in mix.sources)
    say(f"Rows: {len(mix.train):,} to train ({sources}), {len(mix.val):,} to validate")
    if mix.dropped:
        say("Dropped: " + ", ".join(f"{count} {reason}" for reason, count in mix.dropped.items()))
    return mix


def evaluation(stage: Stage, tokenizer: PreTrainedTokenizerBase, mix: Mix) -> GenerationEvaluation | None:
    """The generation evaluation of the stage, None when SFT_GEN_EVAL=none or there is nothing to ask."""
    settings = stage.settings
    rows = questions(mix.val, settings) if settings.gen_eval != "none" and len(mix.val) else []
    if not rows:
        return None
    if PartialState().is_main_process:
        write_questions(stage.folder, rows, settings.gen_eval)
    return GenerationEvaluation(settings, stage.folder, tokenizer, rows)


def merge_parents(stage: Stage) -> str:
    """What the stage's adapter goes on: the base model, or the published merge of all earlier adapters.

    The main process merges, all others wait for the folder.
    """
    if not stage.adapters:
        return stage.start_model
    if PartialState().is_main_process and not stage.merged_base_is_current():
        say("Merging earlier adapters into the base model (needs memory and disk space for a moment) ...")
        record = merge(
            stage.start_model,
            [parent.folder for parent in stage.adapters],
            stage.merged_base,
            dtype=stage.settings.merge_dtype,
            revision=stage.settings.model_revision,
            trust_remote_code=stage.settings.trust_remote_code,
        )
        for warning in record.warnings:
            say(f"[WARNING] {warning}")
        say(f"Merged {len(stage.adapters)} adapters in {record.seconds:.1f} s: {stage.merged_base}")
        stage.update(merge=merge_facts(stage))
    wait_for_merge(stage)
    return str(stage.merged_base)


def load_verified(stage: Stage, base: str) -> PreTrainedModel:
    """The model the stage trains on; a merged one must answer the probe prompts as its last adapter did.

    Raises:
        RunFailed: it does not.
    """
    splitting = zero3_configuration(stage.settings)  # from_pretrained looks for it
    model = load_model(base, stage.settings)
    del splitting
    if not launched().splits_weights:
        verify_merged(stage, model)
    return model


def zero3_configuration(settings: Settings) -> Any:
    """Under ZeRO-3 what makes transformers split the weights while they are loaded, as long as it is kept."""
    if launched().sharding != "zero3":
        return None
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision({torch.bfloat16: "bf16", torch.float16: "fp16"}.get(compute_dtype(settings), "no"))
    plugin.set_deepspeed_weakref()
    return plugin


def verify_merged(stage: Stage, model: PreTrainedModel) -> None:
    """Compares the merged base with the probe of its last adapter, where there is one, and keeps the figures."""
    probe = stage.adapters[-1].folder / PROBE if stage.adapters else None
    if probe is None or not probe.exists():
        return
    figures = verify(model, probe)
    if PartialState().is_main_process:
        record_verification(stage.merged_base, figures)
        stage.update(merge=merge_facts(stage))
    say(
        f"Merged base verified: KL {figures['kl']:.1e}, largest logit difference {figures['max_abs_diff']:.1e} "
        f"(the last adapter moved the model by KL {figures['adapter_kl']:.1e})"
    )


def keep_probe(stage: Stage, trainer: StagedTrainer) -> None:
    """Stores the trained model's logits on the probe prompts; all ranks call it, the main process keeps it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with TemporaryDirectory() as elsewhere:
        folder = stage.folder if trainer.args.should_save else Path(elsewhere)
        store_probe(folder, model, trainer.processing_class)


def merge_facts(stage: Stage) -> dict[str, Any]:
    """The manifest's `merge` record, from merge.json."""
    record = files.read_json(stage.merged_base / "merge.json")
    names = ("max_abs_diff", "kl", "seconds", "peak_rss_bytes", "rounding_loss")
    return {name: record.get(name) for name in names}


def wait_for_merge(stage: Stage) -> None:
    """Ranks other than the main one wait until the merged base is there.

    Raises:
        RunFailed: the merge did not end in time, or this node does not see the output folder.
    """
    record = stage.merged_base / "merge.json"
    main = PartialState().is_main_process
    made = ranks.from_main(record.read_text(encoding="utf-8") if main else None, "the merge of earlier adapters")
    if not ranks.sees(record, made):
        raise RunFailed(
            f"{stage.merged_base} was merged by the main process, but {socket.gethostname()} does not see it: "
            "SFT_OUT_LORA_DIR must be on storage that all nodes share."
        )


def score_earlier_models(stage: Stage, evaluation: GenerationEvaluation | None) -> Earlier | None:
    """How the base model and earlier stages' models do on this stage's rows, before it is trained."""
    return score_earlier(stage, evaluation) if evaluation else None


@contextmanager
def tracked(stage: Stage, mix: Mix) -> Iterator[Tracker | None]:
    """The stage's MLflow run around training, on the main process alone. Ended by what ended the block."""
    settings = stage.settings
    tracker = start_tracking(stage, mix) if PartialState().is_main_process and "mlflow" in settings.report_to else None
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        if tracker:
            tracker.close(status)
        if status == "KILLED" and STOP.agreed:
            ranks.leave()


def start_tracking(stage: Stage, mix: Mix) -> Tracker:
    """The stage's MLflow run with its parameters and tags."""
    settings = stage.settings
    tracker = Tracker(settings, stage.folder, run_id=stage.manifest.get("mlflow_run_id"), say=say)
    values = {name: record["value"] for name, record in settings.record().items()}
    tracker.log_parameters(values | {"train_rows": len(mix.train), "val_rows": len(mix.val)})
    ladder = str(settings.out_lora_dir)
    tracker.log_tags(
        {
            "ladder": ladder,
            "stage": str(stage.number),
            "parents": ", ".join(f"stage {parent.stage} {parent.adapter_sha256[:12]}" for parent in stage.parents),
        }
    )
    tracker.log_sources(stage.manifest["sources"])
    return tracker


def build_edge_mask(mix: Mix, settings: Settings) -> EdgeMask | None:
    if settings.masked_loss == "none":
        return None
    edges = mix.train["unit_edges"]
    return EdgeMask.build(edges, range(len(edges)), seed=settings.seed, redraw=settings.masked_loss_redraw)


def checkpoints_gradients(settings: Settings) -> bool:
    """SFT_GRADIENT_CHECKPOINTING; auto turns it on where there is a GPU, whose memory it saves."""
    if settings.gradient_checkpointing != "auto":
        return settings.gradient_checkpointing == "1"
    return torch.cuda.is_available()


def build_trainer(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mix: Mix,
    evaluation: GenerationEvaluation | None,
    tracker: Tracker | None,
) -> StagedTrainer:
    """The trainer with its data, adapter and records; says what will be trained."""
    settings = stage.settings
    edge_mask = build_edge_mask(mix, settings)
    if edge_mask is not None:
        stage.update(masked_loss=edge_mask.report(settings.epochs))
    arguments = training_arguments(
        settings, stage.folder, checkpointing=checkpoints_gradients(settings), validated=len(mix.val) > 0
    )

    def record_metrics(record: dict[str, Any]) -> None:
        files.append_line(stage.folder / "metrics.jsonl", files.json_text(record, indent=None))
        if tracker:
            tracker.log_metrics(record)

    trainer = StagedTrainer(
        model,
        stage=stage,
        args=arguments,
        tokenizer=tokenizer,
        train=mix.train,
        val=mix.val,
        edge_mask=edge_mask,
        generation=evaluation,
        on_metrics=record_metrics,
    )
    if launched().splits_weights and stage.checkpoint is None:
        trainer.add_callback(AtStart(lambda model: verify_merged(stage, model)))  # its adapter does nothing yet
    if evaluation:
        evaluation.on_samples = SampleRecord(stage, trainer, tracker).take
    trained, total = parameter_counts(trainer.model)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in trained_modules(trainer.model).items())
    say(f"Training {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %): {kinds}")
    return trainer


class SampleRecord:
    """Shows the first answers before training and after it, and keeps all of them in MLflow's table."""

    def __init__(self, stage: Stage, trainer: StagedTrainer, tracker: Tracker | None) -> None:
        self.stage, self.trainer, self.tracker = stage, trainer, tracker

    def take(self, samples: list[dict[str, Any]], step: int) -> None:
        state = self.trainer.state
        if step == 0 or step >= state.max_steps:
            when = "before training" if step == 0 else "after training"
            count = self.stage.settings.num_generate_samples
            show_samples(samples, count, f"Sample answers of stage {self.stage.number} {when}")
        if self.tracker:
            rows = [
                {"step": step, "task": s["task"], "asked": s["prompt"][-1]["content"]}
                | {name: s.get(name) for name in ("answer", "reference", "score")}
                for s in samples
            ]
            self.tracker.log_table(rows, "gen_samples.json")


def train(stage: Stage, trainer: StagedTrainer) -> None:
    """Trains, from the checkpoint where there is one; a stop signal ends it after the step it arrived in."""
    checkpoint = stage.checkpoint
    if checkpoint:
        trainer.rhythm.restore(checkpoint)
    STOP.deferred = True
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Stopped:
        trainer.save_after_stop()
    finally:
        STOP.deferred = False
    # A signal after the last step had nothing to cut short in there.
    if trainer.rhythm.stopped or stop_agreed(trainer):
        raise Stopped(STOP.number or 15)


def finish(stage: Stage, trainer: StagedTrainer, mix: Mix, earlier: Earlier | None, tracker: Tracker | None) -> None:
    """Writes the result, scores it on all stages' rows, completes the manifest and writes the report."""
    from sft.summary import close_stage

    write_result(trainer, stage.folder)
    keep_probe(stage, trainer)
    forgetting = ladder_scores(stage, trainer, earlier) if earlier else None
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        return
    last: dict[str, Any] = {}
    for record in files.read_records(stage.folder / "metrics.jsonl"):
        last |= {name: value for name, value in record.items() if name not in ("step", "time")}
    stage.complete(
        sources=mix.sources,
        train_rows=len(mix.train),
        val_rows=len(mix.val),
        dropped=dict(mix.dropped),
        upsampling=mix.upsampling,
        tokens=mix.tokens,
        steps=trainer.state.global_step,
        metrics=last | {"epoch": trainer.state.epoch},
        forgetting=forgetting,
        mlflow_run_id=tracker.wait_for_run(5.0) if tracker else None,
    )
    close_stage(stage, tracker)

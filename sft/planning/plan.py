"""What is known of a stage before it is trained, found out step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sft.distributed.launch import launched
from sft.errors import Problems, hide_secrets
from sft.planning.document import Document, Lineage, Steps, Tokens
from sft.settings import Settings
from sft.settings.rules import warmup_remark
from sft.settings.values import SourceRecord
from sft.stages.launch_checks import resume_problems
from sft.stages.paths import stage_folder
from sft.stages.safety_copy import restorable
from sft.stages.stage import Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from sft.data.masked_loss.edge_mask import EdgeMask
    from sft.data.mixture import Mix
    from sft.planning.elsewhere import Elsewhere, Machine
    from sft.planning.machine import Finding
    from sft.planning.need import Need
    from sft.planning.step_time import Forecast

Result = TypeVar("Result")
LINTED = 2_000  # answers: about two seconds
_MASK_KEYS = ("units", "distinct_units", "mean_count", "masked_share")


@dataclass(frozen=True)
class Rows:
    """The rows of a stage as the model would see them."""

    tokenizer: PreTrainedTokenizerBase
    mix: Mix
    edge_mask: EdgeMask | None = None


@dataclass
class Plan:
    """What is known of a stage: the document, and what people are shown besides."""

    settings: Settings
    document: Document
    notes: list[str] = field(default_factory=list)
    machine: list[Finding] = field(default_factory=list)
    coming: list[int] = field(default_factory=list)
    rows: Rows | None = None
    need: Need | None = None
    forecast: Forecast | None = None
    on: Machine | None = None
    elsewhere: Elsewhere | None = None

    def attempt(self, step: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result | None:
        """The result of a step; None when it found problems, which are then listed with the others."""
        try:
            return step(*arguments, **keywords)
        except Problems as found:
            self.document.add_problems(found.problems)
            return None


def plan_stage(
    settings: Settings,
    *,
    fresh: bool = False,
    ladder: Sequence[Settings] = (),
    held: Collection[int] = (),
    on: Machine | None = None,
) -> Plan:
    """Everything about one stage. Stages of `ladder` before it count as trained by the time it starts; `held` are the
    contents they will be validated on; `on` is a machine to plan for instead of this one."""
    plan = Plan(settings, Document(settings.stage, settings=settings.record()), on=on)
    try:
        find_out(plan, fresh=fresh, ladder=ladder, held=held)
    except Exception as error:  # a document is promised whatever is wrong, also with a library
        reason = hide_secrets(str(error).strip().partition("\n")[0])
        plan.document.add_problems([f"The check failed: {type(error).__name__}: {reason}"])
    return plan


def find_out(plan: Plan, *, fresh: bool, ladder: Sequence[Settings], held: Collection[int]) -> None:
    """Machine, lineage, rows, steps, memory, time: as far as each can be known without the others."""
    from sft.planning.disk import require_space
    from sft.planning.machine import examine
    from sft.planning.refusals import cache_problems, refusals

    settings, document = plan.settings, plan.document
    plan.machine = [finding for finding in examine(settings) if finding.state != "ok"]
    refused = refusals(settings)
    document.add_problems(refused)
    stage = add_lineage(plan, fresh=fresh, ladder=ladder)
    if any(cache_problems(settings)):
        return
    coming = [other for other in ladder if other.stage in plan.coming or (fresh and other.stage < settings.stage)]
    config = add_rows(plan, held, coming)
    if plan.rows is None:
        add_unlabelled(plan)
        return
    document.steps = steps_of(plan.rows.mix, settings, processes=plan.on.devices if plan.on else None)
    if remark := warmup_remark(settings, document.steps.total or 0):
        plan.notes.append(remark)
    if config is not None and not refused:  # no model of its kind can be built, or none that is worth it
        plan.attempt(add_isolation, plan, config)
        if plan.on is not None:
            plan.attempt(add_elsewhere, plan, plan.rows.mix, config, plan.on)
            return
        plan.attempt(add_memory, plan, plan.rows.mix, config)
        plan.attempt(require_space, stage)
    if plan.need is not None and not document.problems:
        add_time(plan, plan.rows.mix, plan.need, stage.start_model)


def add_lineage(plan: Plan, *, fresh: bool, ladder: Sequence[Settings]) -> Stage:
    """What would be done about the stage's folder; the stage as it lies there."""
    settings = plan.settings
    stage = Stage.inspect(settings, fresh=fresh, processes=launched().processes)
    trained = [parent.stage for parent in stage.parents]
    earlier = [other for other in ladder if other.stage < settings.stage and other.stage not in trained]
    plan.coming = [other.stage for other in earlier]
    folders = [stage_folder(other.out_lora_dir, other.stage) for other in earlier]
    texts = tuple(f"Previous stage adapter not found at {folder}," for folder in folders)
    problems = [text for text in stage.problems if not any(later in text for later in texts)] + resume_problems(stage)
    plan.document.add_problems(problems)
    plan.notes += plan.attempt(restorable, settings, fresh=fresh) or []
    plan.notes += [text for text in stage.warnings if not any(later in text for later in texts)]
    plan.document.lineage = Lineage(
        decision="refuse" if problems else "fresh" if stage.problems else stage.decision,
        parents=[{"stage": parent.stage, "adapter_sha256": parent.adapter_sha256} for parent in stage.parents],
        changed=list(stage.changed),
    )
    return stage


def add_rows(plan: Plan, held: Collection[int], coming: Sequence[Settings] = ()) -> PretrainedConfig | None:
    """The rows of the stage, as far as tokenizer and sources can be read; the configuration of the base model.
    `coming`: stages before this one that are not trained yet."""
    from sft.data.mixture import prepare_mix
    from sft.evaluation.chosen_by import require_comparison, require_metric, require_prompts
    from sft.evaluation.held_out import earlier_questions
    from sft.models.fitness import model_notes, require_known_tokens
    from sft.models.model import load_config, load_tokenizer
    from sft.stages.taught import taught_before

    settings, document = plan.settings, plan.document
    config = plan.attempt(load_config, settings)
    tokenizer = plan.attempt(load_tokenizer, settings) if config is not None else None
    if tokenizer is None:
        return config
    earlier = earlier_questions(settings).union(held)
    taught = plan.attempt(taught_before, settings, coming) or ()
    mix = plan.attempt(prepare_mix, settings, tokenizer, say=plan.notes.append, earlier=earlier, taught=taught)
    plan.notes += model_notes(settings)
    if mix is None:
        return config
    plan.attempt(require_known_tokens, config, settings, tokenizer, mix.train, mix.val)
    plan.notes += [*mix.warnings, *answer_faults(settings)]
    plan.attempt(require_metric, settings, mix, plan.notes.append)
    plan.attempt(require_prompts, settings, mix, tokenizer)
    plan.attempt(require_comparison, settings, mix, tokenizer)
    document.sources = mix.sources
    document.train_rows, document.val_rows = len(mix.train), len(mix.val)
    document.dropped, document.upsampling, document.replay = dict(mix.dropped), mix.upsampling, mix.replay
    document.tokens = Tokens(**{key: mix.tokens[key] for key in ("total", "trained", "longest_row")})
    document.unread = mix.unread
    plan.rows = Rows(tokenizer, mix, add_masked_loss(plan, mix) if settings.masked_loss != "none" else None)
    return config


def answer_faults(settings: Settings) -> list[str]:
    """One line on answers to be trained on that the scores would not take, from at most 2,000 of them."""
    from sft.data.sources.load import load_source
    from sft.data.sources.readers import SourceError
    from sft.scoring.structured import lint

    answers: list[tuple[str, str]] = []
    for source in settings.sources:
        try:
            rows = load_source(source).dataset
        except SourceError:  # said already, by whoever prepared the rows
            continue
        step = max(len(rows) * len(settings.sources) // LINTED, 1)
        some = rows.select(range(0, len(rows), step)).select_columns(["task_key", "messages"])
        answers += [(row["task_key"] or "", row["messages"][-1]["content"] or "") for row in some if row["messages"]]
    sentence = lint(answers, settings.output_markers).sentence()
    return [f"[WARNING] {sentence}: the model is taught to answer so"] if sentence else []


def add_unlabelled(plan: Plan) -> None:
    """Rows per source where they can't be labelled: how many there are is known all the same."""
    from sft.data.sources.load import load_source
    from sft.data.sources.readers import SourceError
    from sft.planning.refusals import failing_sources, required_sources

    for source in plan.settings.sources:
        with suppress(SourceError, Problems):  # listed below
            rows = len(load_source(source).dataset)
            plan.document.sources.append(
                SourceRecord(id=source.id, split=source.split, weight=source.weight, rows=rows)
            )
    required = required_sources(plan.settings)
    plan.document.add_problems([text for text in required if text not in plan.notes])
    known = {*plan.document.problems, *plan.notes}
    plan.notes += [text for text in failing_sources(plan.settings) if text not in known]


def add_masked_loss(plan: Plan, mix: Mix) -> EdgeMask:
    """How often units occur and how many would be masked."""
    from sft.data.masked_loss.edge_mask import EdgeMask

    settings = plan.settings
    edges = mix.train["unit_edges"]
    mask = EdgeMask.build(edges, range(len(edges)), seed=settings.seed, redraw=settings.masked_loss_redraw)
    report = mask.report(settings.epochs)
    plan.document.masked_loss = {key: report[key] for key in _MASK_KEYS}
    return mask


def steps_of(mix: Mix, settings: Settings, *, processes: int | None = None) -> Steps:
    """The optimizer steps of the stage; by so many processes, or those there are."""
    from sft.training.batches import packs_of

    packs = packs_of(mix.train, settings)
    items = len(mix.train) if packs is None else len(packs)
    return steps(items, settings, processes=processes or launched().processes)


def steps(items: int, settings: Settings, *, processes: int) -> Steps:
    """Steps for so many rows or packs, with the rounding of transformers' `set_initial_training_values`."""
    micro_batches = math.ceil(items / (settings.per_device_train_bs * processes))
    per_epoch = max(math.ceil(micro_batches / settings.grad_accum), 1)
    return Steps(
        global_batch=settings.per_device_train_bs * settings.grad_accum * processes,
        per_epoch=per_epoch,
        total=settings.max_steps if settings.max_steps >= 0 else math.ceil(settings.epochs * per_epoch),
    )


def add_isolation(plan: Plan, config: PretrainedConfig) -> None:
    """Whether joined rows stay apart in models of this architecture; `add_time` asks the model itself."""
    from sft.models.isolation import expected_isolation

    plan.document.isolation = expected_isolation(config, plan.settings).record()


def add_memory(plan: Plan, mix: Mix, config: PretrainedConfig) -> None:
    """What a device needs and has; checkpointing where it is asked for or needed."""
    from sft.planning.need import advice, need_of

    settings = plan.settings
    plan.need = need = plan.attempt(need_of, config, settings, mix)
    if need is None:
        return
    estimate = need.estimate
    plan.document.memory = estimate.record()
    if not estimate.fits:
        answering = estimate.generation > estimate.activations
        remedy = advice(settings, answering=answering, checkpointed=need.checkpointing, tokens=need.tokens)
        needed, there = (f"{size / 2**30:.1f} GiB" for size in (estimate.total, estimate.available))
        plan.notes.append(f"[WARNING] does not fit: {needed} needed per device, {there} available; {remedy}")


def add_elsewhere(plan: Plan, mix: Mix, config: PretrainedConfig, machine: Machine) -> None:
    """Launch file, memory and time on a machine that was named."""
    from sft.planning.elsewhere import plan_on

    plan.elsewhere = found = plan_on(config, plan.settings, mix, machine=machine, steps=plan.document.steps)
    plan.document.on = found.record()
    plan.document.memory = found.way.need.estimate.record()
    plan.document.time = found.seconds if found.way.fits else None
    if not found.way.fits:
        needed, there = (found.way.need.estimate.total, found.way.need.estimate.available)
        remedy = "; ".join(found.remedies) or "a smaller model, or SFT_MAX_SEQ_LEN lower"
        plan.notes.append(
            f"[WARNING] does not fit {machine} under any launch file: {needed / 2**30:.1f} GiB needed per device, "
            f"{there / 2**30:.1f} available; it would with: {remedy}"
        )


def add_time(plan: Plan, mix: Mix, need: Need, base: str) -> None:
    """How long training takes, by a step of it on this device."""
    from sft.planning.step_time import forecast, measure_step

    measured = plan.attempt(measure_step, base, plan.settings, mix, need=need)
    if measured is not None and measured.isolation is not None:
        plan.document.isolation = measured.isolation.record()
    if measured is not None:
        plan.forecast = forecast(measured, tokens=mix.tokens["total"], steps=plan.document.steps)
        plan.document.time = plan.forecast.seconds

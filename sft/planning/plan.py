"""What is known of a stage before it is trained, found out step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sft.distributed.launch import launched
from sft.errors import Problems
from sft.planning.document import blank_document
from sft.settings import Settings
from sft.stages.paths import stage_folder
from sft.stages.stage import Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from sft.data.masked_loss.edge_mask import EdgeMask
    from sft.data.mixture import Mix
    from sft.planning.activations import BatchShape
    from sft.planning.kv_cache import AnswerBatch
    from sft.planning.machine import Finding
    from sft.planning.memory import Estimate
    from sft.planning.step_time import StepTime

Result = TypeVar("Result")
_SOURCE_KEYS = ("id", "split", "weight", "rows", "validation_rows", "drawn")
LINTED = 2_000  # answers: about two seconds
_MASK_KEYS = ("units", "distinct_units", "mean_count", "masked_share")


@dataclass
class Plan:
    """What is known of a stage before it is trained: the document, and what only people are shown."""

    settings: Settings
    document: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    machine: list[Finding] = field(default_factory=list)
    coming: list[int] = field(default_factory=list)
    tokenizer: PreTrainedTokenizerBase | None = None
    mix: Mix | None = None
    edge_mask: EdgeMask | None = None
    edges: dict[str, Any] | None = None
    batch: BatchShape | None = None
    answers: AnswerBatch | None = None
    estimate: Estimate | None = None
    checkpointing: bool | None = None
    step_time: StepTime | None = None

    @property
    def problems(self) -> list[str]:
        """What the person must change."""
        return self.document["problems"]

    def add_problems(self, texts: Iterable[str]) -> None:
        """Lists what is not listed yet."""
        self.problems.extend(text for text in texts if text not in self.problems)

    def attempt(self, step: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result | None:
        """The result of a step; None when it found problems, which are then listed with the others."""
        try:
            return step(*arguments, **keywords)
        except Problems as found:
            self.add_problems(found.problems)
            return None


def plan_stage(
    settings: Settings, *, fresh: bool = False, ladder: Sequence[Settings] = (), held: Collection[int] = ()
) -> Plan:
    """Everything about one stage. Stages of `ladder` before it count as trained by the time it starts; `held` are the
    contents they will be validated on."""
    from sft.planning.machine import examine
    from sft.planning.refusals import refusals

    plan = Plan(settings, blank_document(settings.stage) | {"settings": settings.record()})
    plan.machine = [finding for finding in examine(settings) if finding.state != "ok"]
    plan.add_problems(finding.text for finding in plan.machine if finding.state == "broken")
    plan.add_problems(refusals(settings))
    stage = add_lineage(plan, fresh=fresh, ladder=ladder)
    config = add_rows(plan, held)
    if plan.mix is not None:
        add_steps(plan, plan.mix)
        if config is not None:
            plan.attempt(add_memory, plan, plan.mix, config)
            if plan.estimate is not None and not plan.problems:
                plan.attempt(add_time, plan, plan.mix, plan.estimate, stage.start_model)
    return plan


def add_lineage(plan: Plan, *, fresh: bool, ladder: Sequence[Settings]) -> Stage:
    """What the stage would start from and what would be done about its folder."""
    settings = plan.settings
    stage = Stage.inspect(settings, fresh=fresh, processes=launched().processes)
    trained = [parent.stage for parent in stage.parents]
    earlier = [other for other in ladder if other.stage < settings.stage and other.stage not in trained]
    plan.coming = [other.stage for other in earlier]
    folders = [stage_folder(other.out_lora_dir, other.stage) for other in earlier]
    texts = tuple(f"Previous stage adapter not found at {folder}," for folder in folders)
    problems = [text for text in stage.problems if not any(later in text for later in texts)]
    decision = "fresh" if stage.problems and not problems else stage.decision
    plan.document["problems"] += problems
    plan.notes += [text for text in stage.warnings if not any(later in text for later in texts)]
    plan.document["lineage"] = {
        "decision": decision,
        "parents": [{"stage": parent.stage, "adapter_sha256": parent.adapter_sha256} for parent in stage.parents],
        "changed": list(stage.changed),
    }
    return stage


def add_rows(plan: Plan, held: Collection[int]) -> PretrainedConfig | None:
    """The rows of the stage, as far as tokenizer and sources can be read; the configuration of the base model."""
    from sft.data.mixture import prepare_mix
    from sft.evaluation.held_out import earlier_questions
    from sft.models.model import load_config, load_tokenizer

    settings, before = plan.settings, len(plan.problems)
    plan.tokenizer = plan.attempt(load_tokenizer, settings)
    after = len(plan.problems)
    config = plan.attempt(load_config, settings)
    if before < after:
        # The same model, the same reason: once is enough.
        del plan.problems[after:]
    if plan.tokenizer is None:
        add_unlabelled(plan)
        return config
    earlier = earlier_questions(settings).union(held)
    plan.mix = plan.attempt(prepare_mix, settings, plan.tokenizer, say=plan.notes.append, earlier=earlier)
    if plan.mix is None:
        add_unlabelled(plan)
        return config
    mix, document = plan.mix, plan.document
    plan.notes += [*mix.warnings, *answer_faults(settings)]
    document["sources"] = [{key: source[key] for key in _SOURCE_KEYS} for source in mix.sources]
    document["train_rows"], document["val_rows"] = len(mix.train), len(mix.val)
    document["dropped"], document["upsampling"] = dict(mix.dropped), mix.upsampling
    document["unread"] = mix.unread
    document["tokens"] = {key: mix.tokens[key] for key in ("total", "trained", "longest_row")}
    if settings.masked_loss != "none":
        add_masked_loss(plan, mix)
    return config


def answer_faults(settings: Settings) -> list[str]:
    """One line on answers to be trained on that the scores would not take, from at most 2,000 of them."""
    from sft.data.sources.load import load_source
    from sft.data.sources.readers import SourceError
    from sft.scoring.structured import lint

    answers: list[tuple[str, str]] = []
    for source in settings.sources:
        try:
            rows = load_source(source, settings).dataset
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

    failed = []
    for source in plan.settings.sources:
        record: dict[str, Any] = {"id": source.id, "split": source.split, "weight": source.weight}
        try:
            rows = len(load_source(source, plan.settings).dataset)
            plan.document["sources"].append(record | {"rows": rows, "validation_rows": None, "drawn": None})
        except SourceError as error:
            failed.append(f"[ERROR] Failed to load {source.id}: {error}")
        except Problems as found:
            failed += found.problems
    known = {*plan.problems, *plan.notes}
    strict = plan.settings.strict or len(failed) == len(plan.settings.sources)
    (plan.problems if strict else plan.notes).extend(text for text in failed if text not in known)


def add_masked_loss(plan: Plan, mix: Mix) -> None:
    """How often units occur and how many would be masked."""
    from sft.data.masked_loss.edge_mask import EdgeMask

    settings = plan.settings
    edges = mix.train["unit_edges"]
    plan.edge_mask = EdgeMask.build(edges, range(len(edges)), seed=settings.seed, redraw=settings.masked_loss_redraw)
    plan.edges = plan.edge_mask.report(settings.epochs)
    plan.document["masked_loss"] = {key: plan.edges[key] for key in _MASK_KEYS}


def add_steps(plan: Plan, mix: Mix) -> None:
    """The optimizer steps of the stage."""
    from sft.training.batches import packs_of

    packs = packs_of(mix.train, plan.settings)
    items = len(mix.train) if packs is None else len(packs)
    plan.document["steps"] = steps(items, plan.settings, processes=launched().processes)


def steps(items: int, settings: Settings, *, processes: int) -> dict[str, int]:
    """Steps for so many rows or packs, with the rounding of transformers' `set_initial_training_values`."""
    micro_batches = math.ceil(items / (settings.per_device_train_bs * processes))
    per_epoch = max(math.ceil(micro_batches / settings.grad_accum), 1)
    return {
        "global_batch": settings.per_device_train_bs * settings.grad_accum * processes,
        "per_epoch": per_epoch,
        "total": settings.max_steps if settings.max_steps >= 0 else math.ceil(settings.epochs * per_epoch),
    }


def add_memory(plan: Plan, mix: Mix, config: PretrainedConfig) -> None:
    """What a device needs and has; checkpointing where it is asked for or needed."""
    from sft.planning.kv_cache import largest_answers
    from sft.planning.memory import COMFORTABLE, advice, estimate, largest_batch

    settings = plan.settings
    plan.batch, plan.answers = largest_batch(mix.train, settings), largest_answers(mix.val, settings)
    plan.checkpointing = settings.gradient_checkpointing == "1"
    need = estimate(config, settings, plan.batch, checkpointing=plan.checkpointing, answers=plan.answers)
    if settings.gradient_checkpointing == "auto" and need.training > COMFORTABLE * need.available:
        plan.checkpointing = True
        need = estimate(config, settings, plan.batch, checkpointing=True, answers=plan.answers)
    plan.estimate, plan.document["memory"] = need, need.record()
    if not need.fits:
        remedy = advice(settings, answering=need.generation > need.activations)
        needed, there = (f"{size / 2**30:.1f} GiB" for size in (need.total, need.available))
        plan.notes.append(f"[WARNING] does not fit: {needed} needed per device, {there} available; {remedy}")


def add_time(plan: Plan, mix: Mix, need: Estimate, base: str) -> None:
    """How long training takes, by a step of it on this device."""
    from sft.planning.step_time import forecast, measure_step

    plan.step_time = measure_step(base, plan.settings, mix, estimate=need, checkpointing=bool(plan.checkpointing))
    tokens, steps = plan.document["tokens"]["total"], plan.document["steps"]
    plan.document["time"] = forecast(plan.step_time, tokens=tokens, steps=steps)

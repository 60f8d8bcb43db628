"""What `--check` shows to people: settings, rows, masks, steps, memory, lineage, three rows as they are trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.planning.document import MEMORY, Lineage, Steps, Tokens
from sft.reporting.text import aligned, duration, figure, plain

if TYPE_CHECKING:
    from sft.data.mixture import Mix
    from sft.planning.elsewhere import Elsewhere
    from sft.planning.need import Need
    from sft.planning.plan import Plan, Rows
    from sft.planning.step_time import Forecast
    from sft.settings import Settings
    from sft.settings.values import SourceRecord

_SHOWN_ROWS, _SHOWN_CHARACTERS, _WIDEST = 3, 2000, 70


def plan_text(plan: Plan) -> str:
    """Everything about one stage but its problems, which come last, on stderr."""
    parts = [f"Stage {plan.settings.stage}: {plan.document.lineage.decision or 'unknown'}"]
    for title, text in sections(plan):
        parts.append(f"{title}\n{indented(text)}")
    return "\n\n".join(parts) + "\n"


def sections(plan: Plan) -> Iterator[tuple[str, str]]:
    """Titles and texts in the order they are read; without those of which nothing is known."""
    document, rows = plan.document, plan.rows
    yield "Settings that differ from the defaults", settings_table(document.settings)
    if document.lineage.decision:
        yield "Lineage", lineage_text(document.lineage, plan.coming)
    if document.sources:
        yield "Sources", sources_table(document.sources)
    if rows is not None:
        yield "Rows and tokens", rows_text(document.tokens, rows.mix)
        if document.upsampling:
            yield "Upsampling", upsampling_table(document.upsampling)
        if document.replay:
            yield "Replay", replay_table(document.replay)
        if rows.edge_mask is not None:
            yield "Masked loss", masked_loss_text(rows.edge_mask.report(plan.settings.epochs))
    if document.steps.total is not None:
        yield "Steps", steps_text(document.steps, plan.settings, plan.forecast)
    if document.isolation["kept_apart"] is not None:
        from sft.models.isolation import Isolation

        yield "Joined rows", Isolation(**document.isolation).sentence()
    if plan.need is not None:
        yield "Memory per device", memory_table(plan.need)
    if plan.elsewhere is not None:
        yield f"On {plan.elsewhere.machine}", elsewhere_text(plan.elsewhere)
        yield "Memory per device there", memory_table(plan.elsewhere.way.need)
    if rows is not None:
        yield from row_previews(rows)
    if plan.notes:
        yield "Notes", "\n".join(plan.notes)
    if plan.machine:
        yield "This machine", "\n".join(finding.text for finding in plan.machine)


def variants_text(plans: Sequence[Plan]) -> str:
    """What is to be done for each variant of a stage, and what all of them are told."""
    rows = [["variant", "", "rows", "steps", "memory per device", "training"]]
    for plan in plans:
        document, seconds = plan.document, plan.forecast.seconds if plan.forecast else None
        memory = size(document.memory["total"]) if document.memory["total"] else "–"
        decided = "problems" if document.problems else str(document.lineage.decision)
        figures = [figure(document.train_rows), figure(document.steps.total), memory, duration(seconds)]
        rows.append([plan.settings.variant, decided, *figures])
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    first = plans[0].settings
    sets = [word for text in first.tried for word in ("--set", text)]
    remark = f"Everything about one of them: {first.model_copy(update={'tried': ()}).command('--check', *sets)}"
    return "\n".join([f"Stage {first.stage}: {len(plans)} variants", aligned(rows), *notes, remark])


def settings_table(record: dict[str, dict[str, Any]]) -> str:
    """NAME, value and where it comes from."""
    given = {name: entry for name, entry in record.items() if entry["origin"] != "default"}
    widths = [
        max((len(name) for name in given), default=0),
        max((len(cut(e["value"])) for e in given.values()), default=0),
    ]
    lines = [f"{name.ljust(widths[0])}  {cut(e['value']).ljust(widths[1])}  {e['origin']}" for name, e in given.items()]
    return "\n".join([*lines, f"{len(record) - len(given)} settings at their defaults (docs/settings.md)"])


def lineage_text(lineage: Lineage, coming: Sequence[int] = ()) -> str:
    """Decision, parents (those there are, and those of the same ladder that are trained first), what has changed."""
    meaning = {
        "fresh": "a new stage",
        "resume": "goes on from its last checkpoint",
        "complete": "already trained, nothing to do",
        "refuse": "can't be run as things are",
    }
    made_from = ["base model", *(f"stage {p['stage']} ({p['adapter_sha256'][:12]})" for p in lineage.parents)]
    made_from += [f"stage {number} (trained first)" for number in coming]
    decided = str(lineage.decision)
    lines = [f"{decided}: {meaning[decided]}", f"made from: {' + '.join(made_from)}"]
    return "\n".join([*lines, *(f"changed: {change}" for change in lineage.changed)])


def sources_table(sources: list[SourceRecord]) -> str:
    """One line per source."""
    rows = [["source", "split", "weight", "rows", "to validate", "drawn"]]
    for source in sources:
        numbers = [figure(number) for number in (source.rows, source.validation_rows, source.drawn)]
        rows.append([Path(source.id).name, source.split, plain(source.weight), *numbers])
    return aligned(rows)


def rows_text(tokens: Tokens, mix: Mix) -> str:
    """Rows, tokens, every lost row by reason, and what of the rows nobody reads."""
    total, trained, longest = tokens.total or 0, tokens.trained or 0, tokens.longest_row or 0
    lines = [
        f"Rows: {mix.rows_in_words()}",
        f"{total:,} tokens an epoch, {trained:,} of them trained ({100 * trained / max(total, 1):.1f} %), "
        f"longest row {longest:,}",
    ]
    return "\n".join([*lines, *(mix.remarks() or ["Dropped: none"])])


def upsampling_table(rules: list[dict[str, Any]]) -> str:
    """Rules with their multipliers and the rows they match."""
    return aligned(
        [
            ["rule", "multiplier", "rows matched"],
            *([r["rule"], plain(r["multiplier"]), figure(r["matched"])] for r in rules),
        ]
    )


def replay_table(stages: list[dict[str, Any]]) -> str:
    """How many rows come again from each earlier stage, of how many different ones, and where those are from."""
    rows = [["from", "rows", "of", "sources"]]
    for stage in stages:
        names = ", ".join(Path(source).name for source in stage["sources"])
        rows.append([f"stage {stage['stage']}", figure(stage["rows"]), figure(stage["available"]), cut(names)])
    return aligned(rows)


def masked_loss_text(report: dict[str, Any]) -> str:
    """Units, the share that is masked, and the edges that occur most."""
    trained = report["trained_at_least_once"]
    lines = [
        f"{report['units']:,} units, {report['distinct_units']:,} distinct; mean count {report['mean_count']:.2f}",
        f"{100 * report['masked_share']:.1f} % masked in an epoch; trained at least once: "
        f"{trained['expected']:,.0f} expected, {trained['drawn']:,.0f} drawn",
    ]
    top = [["most frequent", "units", "kept"]]
    top += [[cut(edge["edge"]), figure(edge["count"]), f"{100 * edge['keep']:.1f} %"] for edge in report["top"]]
    return "\n".join([*lines, aligned(top)])


def steps_text(steps: Steps, settings: Settings, forecast: Forecast | None) -> str:
    """Steps, the global batch, and the time they take, or why that isn't known."""
    assert steps.global_batch is not None
    lines = [
        f"{steps.total:,} steps, {steps.per_epoch:,} an epoch, "
        f"{steps.global_batch:,} {'sequences' if settings.packing else 'rows'} a step "
        f"({settings.per_device_train_bs} x {settings.grad_accum} accumulated"
        f" x {steps.global_batch // settings.per_device_train_bs // settings.grad_accum} devices)"
    ]
    return "\n".join([*lines, *(time_lines(forecast) if forecast else ())])


def time_lines(forecast: Forecast) -> list[str]:
    """Estimated time, speed and peak memory as measured with the largest micro-batch."""
    peak = f", peak {size(forecast.peak)}" if forecast.peak else ""
    if forecast.seconds is None:
        return [f"no estimate of the time: {forecast.reason}{peak}"]
    return [
        f"training about {duration(forecast.seconds)}, {forecast.step_seconds:.3g} s a step, "
        "without evaluating and saving",
        f"measured on {forecast.measured_on}: {forecast.tokens_per_second:,.0f} tokens/s{peak}",
    ]


def memory_table(need: Need) -> str:
    """Each part, the micro-batch and the answers it was worked out for, and how far it can be trusted."""
    batch, answers = need.batch, need.answers
    parts = [part for part in MEMORY if part != "generation" or answers]
    rows = [["part", "size"], *([part, size(getattr(need.estimate, part))] for part in parts)]
    checkpointing = "with" if need.checkpointing else "without"
    what = "micro-batch" if not need.tokens else f"pass (SFT_MICRO_BATCH_TOKENS: at most {need.tokens:,} tokens)"
    lines = [f"largest {what}: {batch.rows} rows, {batch.tokens:,} tokens; {checkpointing} gradient checkpointing"]
    if answers:
        lines.append(
            f"generation: keys and values of {answers.rows} answers, {answers.tokens:,} tokens with their prompts; "
            "the total has the larger of activations and generation"
        )
    if not need.estimate.traced:
        lines.append("activations: by a rule of thumb, much less exact: this model's code can't run on shapes alone")
    return "\n".join([aligned(rows), *lines])


def elsewhere_text(found: Elsewhere) -> str:
    """Launch files in the order they were tried, how to launch, the time and what it rests on."""
    rows = [["launch file", "needed", "available", ""]]
    for way in found.tried:
        need = way.need.estimate
        rows.append([way.launch_file, size(need.total), size(need.available), "fits" if way.fits else "does not fit"])
    lines = [aligned(rows)]
    if found.way.fits:
        lines += [found.command, f"training about {duration(found.seconds)}, {found.tokens_per_second:,.0f} tokens/s"]
    return "\n".join([*lines, *(f"assumed: {text}" for text in found.assumptions())])


def row_previews(rows: Rows) -> Iterator[tuple[str, str]]:
    """The first rows as the model sees them in the first epoch, trained tokens in green."""
    from sft.data.labels.label import preview
    from sft.training.batches import TrainingRows

    colour = sys.stdout.isatty()
    trained = TrainingRows(rows.mix.train, edge_mask=rows.edge_mask)
    marks = "green" if colour else "between 「 and 」"
    for position in range(min(_SHOWN_ROWS, len(rows.mix.train))):
        text = preview(rows.tokenizer, trained.row(0, position), colour=colour)
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..." + "\x1b[0m" * colour
        yield f"Row {position + 1} as rendered (trained tokens {marks})", shown


def size(num_bytes: int) -> str:
    """3 GiB as "3.00 GiB", less than one in MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def cut(value: Any) -> str:
    """A value on one line, shortened."""
    text = " ".join(plain(value).split())
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def indented(text: str) -> str:
    """Every line moved to the right."""
    return "\n".join(f"  {line}" for line in text.splitlines())

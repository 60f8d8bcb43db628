"""What `--check` shows to people: settings, rows, masks, steps, memory, lineage, three rows as they are trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.planning.document import MEMORY
from sft.reporting.text import aligned, duration, figure, plain

if TYPE_CHECKING:
    from sft.data.mixture import Mix
    from sft.planning.memory import Estimate
    from sft.planning.plan import Plan
    from sft.planning.step_time import StepTime

_SHOWN_ROWS, _SHOWN_CHARACTERS, _WIDEST = 3, 2000, 70


def plan_text(plan: Plan) -> str:
    """Everything about one stage but its problems, which come last, on stderr."""
    parts = [f"Stage {plan.settings.stage}: {plan.document['lineage']['decision']}"]
    for title, text in sections(plan):
        parts.append(f"{title}\n{indented(text)}")
    return "\n\n".join(parts) + "\n"


def sections(plan: Plan) -> Iterator[tuple[str, str]]:
    """Titles and texts in the order they are read; without those of which nothing is known."""
    document = plan.document
    yield "Settings that differ from the defaults", settings_table(document["settings"])
    yield "Lineage", lineage_text(document["lineage"], plan.coming)
    if document["sources"]:
        yield "Sources", sources_table(document["sources"])
    if plan.mix is not None:
        yield "Rows and tokens", rows_text(document, plan.mix)
        if document["upsampling"]:
            yield "Upsampling", upsampling_table(document["upsampling"])
    if plan.edges is not None:
        yield "Masked loss", masked_loss_text(plan.edges)
    if document["steps"]["total"] is not None:
        yield "Steps", steps_text(document["steps"], plan)
    if plan.estimate is not None:
        yield "Memory per device", memory_table(plan.estimate, plan)
    if plan.mix is not None and plan.tokenizer is not None:
        yield from row_previews(plan)
    if plan.notes:
        yield "Notes", "\n".join(plan.notes)
    if plan.machine:
        yield "This machine", "\n".join(finding.text for finding in plan.machine)


def settings_table(record: dict[str, dict[str, Any]]) -> str:
    """NAME, value and where it comes from."""
    given = {name: entry for name, entry in record.items() if entry["origin"] != "default"}
    widths = [
        max((len(name) for name in given), default=0),
        max((len(cut(e["value"])) for e in given.values()), default=0),
    ]
    lines = [f"{name.ljust(widths[0])}  {cut(e['value']).ljust(widths[1])}  {e['origin']}" for name, e in given.items()]
    return "\n".join([*lines, f"{len(record) - len(given)} settings at their defaults (docs/settings.md)"])


def lineage_text(lineage: dict[str, Any], coming: Sequence[int] = ()) -> str:
    """Decision, parents (those there are, and those of the same ladder that are trained first), what has changed."""
    meaning = {
        "fresh": "a new stage",
        "resume": "goes on from its last checkpoint",
        "complete": "already trained, nothing to do",
        "refuse": "can't be run as things are",
    }
    made_from = ["base model", *(f"stage {p['stage']} ({p['adapter_sha256'][:12]})" for p in lineage["parents"])]
    made_from += [f"stage {number} (trained first)" for number in coming]
    lines = [
        f"{lineage['decision']}: {meaning[lineage['decision']]}",
        f"made from: {' + '.join(made_from)}",
    ]
    return "\n".join([*lines, *(f"changed: {change}" for change in lineage["changed"])])


def sources_table(sources: list[dict[str, Any]]) -> str:
    """One line per source."""
    rows = [["source", "split", "weight", "rows", "to validate", "drawn"]]
    for source in sources:
        numbers = [figure(source[key]) for key in ("rows", "validation_rows", "drawn")]
        rows.append([Path(source["id"]).name, source["split"], plain(source["weight"]), *numbers])
    return aligned(rows)


def rows_text(document: dict[str, Any], mix: Mix) -> str:
    """Rows, tokens, every lost row by reason, and what of the rows nobody reads."""
    tokens = document["tokens"]
    share = 100 * tokens["trained"] / max(tokens["total"], 1)
    lines = [
        f"Rows: {mix.rows_in_words()}",
        f"{tokens['total']:,} tokens an epoch, {tokens['trained']:,} of them trained ({share:.1f} %), "
        f"longest row {tokens['longest_row']:,}",
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


def steps_text(steps: dict[str, int], plan: Plan) -> str:
    """Steps, the global batch, and the time they take, or why that isn't known."""
    settings = plan.settings
    lines = [
        f"{steps['total']:,} steps, {steps['per_epoch']:,} an epoch, "
        f"{steps['global_batch']:,} {'sequences' if settings.packing else 'rows'} a step "
        f"({settings.per_device_train_bs} x {settings.grad_accum} accumulated"
        f" x {steps['global_batch'] // settings.per_device_train_bs // settings.grad_accum} devices)"
    ]
    if plan.step_time:
        lines += time_lines(plan.step_time, plan.document["time"])
    return "\n".join(lines)


def time_lines(step_time: StepTime, time: dict[str, Any]) -> list[str]:
    """Estimated time, speed and peak memory as measured with the largest micro-batch."""
    peak = f", peak {size(step_time.peak)}" if step_time.peak else ""
    if time["seconds"] is None:
        return [f"no estimate of the time: {time['reason']}{peak}"]
    return [
        f"training about {duration(time['seconds'])}, {time['step_seconds']:.3g} s a step, "
        "without evaluating and saving",
        f"measured on {time['measured_on']}: {time['tokens_per_second']:,.0f} tokens/s{peak}",
    ]


def memory_table(estimate: Estimate, plan: Plan) -> str:
    """Each part, the micro-batch and the answers it was worked out for, and how far it can be trusted."""
    parts = [part for part in MEMORY if part != "generation" or plan.answers]
    rows = [["part", "size"], *([part, size(getattr(estimate, part))] for part in parts)]
    batch, answers = plan.batch, plan.answers
    checkpointing = "with" if plan.checkpointing else "without"
    largest = f"largest micro-batch: {batch.rows} rows, {batch.tokens:,} tokens; " if batch else ""
    lines = [f"{largest}{checkpointing} gradient checkpointing"]
    if answers:
        lines.append(
            f"generation: keys and values of {answers.rows} answers, {answers.tokens:,} tokens with their prompts; "
            "the total has the larger of activations and generation"
        )
    if not estimate.traced:
        lines.append("activations: by a rule of thumb, much less exact: this model's code can't run on shapes alone")
    return "\n".join([aligned(rows), *lines])


def row_previews(plan: Plan) -> Iterator[tuple[str, str]]:
    """The first rows as the model sees them in the first epoch, trained tokens in green."""
    from sft.data.labels.label import preview
    from sft.training.batches import TrainingRows

    assert plan.mix is not None and plan.tokenizer is not None
    colour = sys.stdout.isatty()
    rows = TrainingRows(plan.mix.train, edge_mask=plan.edge_mask)
    marks = "green" if colour else "between 「 and 」"
    for position in range(min(_SHOWN_ROWS, len(plan.mix.train))):
        text = preview(plan.tokenizer, rows.row(0, position), colour=colour)
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

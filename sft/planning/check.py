"""--check: everything short of training, for each stage of a ladder. Writes nothing but the cache of prepared rows."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING

from sft.distributed.launch import launched
from sft.environment import silence_torch, uncollected
from sft.errors import Problems
from sft.planning.document import Document, print_documents
from sft.planning.plan import Plan, plan_stage
from sft.settings import Settings
from sft.stages.opening import quiet_start

if TYPE_CHECKING:
    from sft.planning.elsewhere import Machine


def check(ladder: list[Settings], options: argparse.Namespace) -> None:
    """Checks every stage and prints the result: tables, or with `--json` one document.

    Raises:
        Problems: there are some, after everything that could be found out was printed.
    """
    if launched().rank != 0:
        return
    quiet_start(ladder[0])
    with uncollected():
        silence_torch()
        for room in ("disk", "refusals"):
            import_module(f"sft.planning.{room}")
    machine = machine_asked(options)
    plans = []
    held: set[int] = set()
    for settings in ladder:
        plans.append(plan_stage(settings, fresh=options.fresh, ladder=ladder, held=held, on=machine))
        if settings.variant:
            continue
        held.update(plans[-1].rows.mix.held.tolist() if plans[-1].rows else ())
        if not options.json:
            from sft.planning.tables import plan_text

            print(plan_text(plans[-1]), flush=True)
    if ladder[0].variant:
        add_variants_space(plans, fresh=options.fresh)
        if not options.json:
            from sft.planning.tables import variants_text

            print(variants_text(plans), flush=True)
    if options.json:
        print_documents([plan.document for plan in plans])
    raise_problems(plans)


def add_variants_space(plans: list[Plan], *, fresh: bool) -> None:
    """Whether the disk takes all variants, where each of them alone could be trained."""
    from sft.planning.disk import require_space_for_all
    from sft.stages.stage import Stage

    if not any(plan.document.problems for plan in plans):
        stages = [Stage.inspect(plan.settings, fresh=fresh, processes=launched().processes) for plan in plans]
        plans[0].attempt(require_space_for_all, stages)


def raise_problems(plans: list[Plan]) -> None:
    """All problems, each with the stages or variants that have it where there are several; what all variants have in
    common, once."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        for text in plan.document.problems:
            found.setdefault(text, []).append(plan.settings.variant or f"stage {plan.settings.stage}")
    if found:
        raise Problems([text if len(who) == len(plans) else f"{', '.join(who)}: {text}" for text, who in found.items()])


def machine_asked(options: argparse.Namespace) -> Machine | None:
    """The machine of --on, None without it.

    Raises:
        Problems: it is none; in the document as well.
    """
    if options.on is None:
        return None
    from sft.planning.elsewhere import machine_of

    try:
        return machine_of(options.on)
    except Problems as found:
        if options.json:
            print_documents([Document(None, problems=found.problems)])
        raise

"""--check: everything short of training, for each stage of a ladder. Writes nothing but the cache of prepared rows."""

from __future__ import annotations

import argparse

from sft.distributed.launch import launched
from sft.environment import offline_unless_reachable, silence_libraries, silence_torch
from sft.errors import Problems
from sft.planning.document import print_documents
from sft.planning.plan import plan_stage
from sft.settings import Settings


def check(ladder: list[Settings], options: argparse.Namespace) -> None:
    """Checks every stage and prints the result: tables, or with `--json` one document.

    Raises:
        Problems: there are some, after everything that could be found out was printed.
    """
    if launched().rank != 0:
        return
    silence_libraries()
    ladder[0].export_passthrough()
    offline_unless_reachable()
    silence_torch()
    plans = []
    held: set[int] = set()
    for settings in ladder:
        plans.append(plan_stage(settings, fresh=options.fresh, ladder=ladder, held=held))
        held.update(plans[-1].rows.mix.held.tolist() if plans[-1].rows else ())
        if not options.json:
            from sft.planning.tables import plan_text

            print(plan_text(plans[-1]), flush=True)
    if options.json:
        print_documents([plan.document for plan in plans])
    found = [(plan.settings.stage, text) for plan in plans for text in plan.document.problems]
    if found:
        raise Problems([f"stage {stage}: {text}" if len(plans) > 1 else text for stage, text in found])

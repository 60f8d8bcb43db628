#!/usr/bin/env python3
"""Staged LoRA fine-tuning: one stage from its env file to its report, or a ladder of them. See README.md."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sft.heap import begin_tight

# Before anything is read: as a program by itself, not where tests and notebooks import it.
if (__name__ == "__main__" or Path(sys.argv[0]).name == "staged-sft") and not {"-h", "--help"} & set(sys.argv):
    begin_tight()

from sft import cli

if TYPE_CHECKING:
    from sft.settings import Settings


def train_stage(settings: Settings, *, fresh: bool) -> None:
    """The stage in order. Imports wait until it is known that there is something to do: torch alone takes seconds."""
    from sft.environment import silence_torch, uncollected
    from sft.reporting.leftovers import look_after
    from sft.stages.opening import open_stage
    from sft.stages.status_lines import announce

    with open_stage(settings, fresh=fresh) as stage:  # lineage and lock
        announce(stage, cli.say)
        if stage.decision == "complete":
            look_after(stage)
            return
        cli.say("Loading libraries ...")
        with uncollected():
            silence_torch()
            from sft import run
            from sft.merging.parents import load_verified, merge_parents
            from sft.models.model import load_tokenizer
            from sft.planning.disk import require_space
            from sft.planning.refusals import require_ready
            from sft.reporting.recording import tracked
            from sft.stages.safety_copy import kept_safe

        require_ready(settings)  # what --check lists as well
        tokenizer = load_tokenizer(settings)
        mix = run.prepare_rows(settings, tokenizer)  # labelled, audited, split, mixed, upsampled
        require_space(stage)
        stage.begin(**run.rows_facts(mix))
        for place, aside in stage.moved.items():
            cli.say(f"{place.name} was moved to {aside}")
        evaluation = run.evaluation(stage, tokenizer, mix)
        base = merge_parents(stage)  # published and verified, or the base model itself
        earlier = run.score_earlier_models(stage, evaluation)
        cli.say("Loading the model ...")
        model = load_verified(stage, base)
        with tracked(stage, mix) as tracker, kept_safe(stage) as copy:
            trainer = run.build_trainer(stage, model, tokenizer, mix, evaluation, tracker, copy)
            run.train(stage, trainer)
            run.finish(stage, trainer, mix, evaluation, earlier, tracker)


def main(options: argparse.Namespace) -> int:
    if options.adopt or options.drop_tries:
        from sft.variants import change_variants

        return change_variants(options)
    if options.check and not options.stage:
        from sft.planning.machine import check_machine

        check_machine(options)
        return 0
    ladder = cli.load_ladder(options)
    cli.say_untested()
    if options.check:
        from sft.planning.check import check

        check(ladder, options)
        return 0
    if options.tries:
        from sft.variants import try_variants

        return try_variants(ladder, options, train_stage)
    from sft.reporting.gate import exit_code, judge_stage, passed

    gates = []
    for settings in ladder:
        train_stage(settings, fresh=options.fresh)
        gates += [judge_stage(settings)] if settings.gate else []
        if not all(map(passed, gates)):  # no stage is built on one that failed
            break
    if len(ladder) > 1:
        from sft.reporting.report import close_ladder

        close_ladder(ladder[: ladder.index(settings) + 1])
    return exit_code(gates, as_json=options.json)


def program() -> int:
    """The command; installed it is called staged-sft."""
    code = cli.command_line(main)
    gc.freeze()  # or the collector goes through all the libraries once more: 1.4 s of a stop that has 30
    return code


if __name__ == "__main__":
    sys.exit(program())

"""`--try`: the variants of a stage, one after the other on the ordinary way of a stage; `--adopt` and `--drop-tries`.

In one process, as `--stage all` goes from stage to stage: starting Python and the libraries costs 10 seconds a variant,
under a launcher all ranks have to step through together, and a stop signal reaches the one that is trained. What one
variant leaves behind is freed before the next begins; one that fails does not end the others.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sft import cli
from sft.distributed.launch import launched
from sft.distributed.signals import STOP
from sft.environment import silence_torch
from sft.errors import Problems, hide_secrets
from sft.settings import Settings, load_settings
from sft.settings.variants import FREELY, WITH_OTHER_ROWS, value_text
from sft.stages import paths
from sft.stages.opening import quiet_start
from sft.stages.stage import Stage
from sft.stages.variants import Variant, adopt, drop, find_variants, pick

Train = Callable[..., None]


def require_confirmed(ladder: Sequence[Settings]) -> None:
    """Beyond eight variants the count is asked back where somebody can answer.

    Raises:
        Problems: nobody can, or does not want them.
    """
    count = len(ladder)
    if count <= FREELY:
        return
    alone = launched().processes == 1
    if not (alone and sys.stdin and sys.stdin.isatty()):
        remedy = f"confirm them on a terminal, or name at most {FREELY} a command: the table ranks all that are there"
        raise Problems([f"--try: {count} variants of stage {ladder[0].stage} would be trained; {remedy}"])
    if input(f"Train {count} variants of stage {ladder[0].stage}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Problems([f"--try: {count} variants were not confirmed; name fewer values"])


def try_variants(ladder: Sequence[Settings], options: argparse.Namespace, train_stage: Train) -> int:
    """Trains every variant that is not complete yet, ranks all there are, and returns the exit code.

    Raises:
        Problems: something is wrong with one of them, or all together do not fit on the disk: nothing is trained then.
    """
    require_confirmed(ladder)
    quiet_start(ladder[0])
    silence_torch()
    by_name = {settings.variant: settings for settings in ladder}
    codes, said = [0], set[str]()
    waiting = _waiting(ladder, fresh=options.fresh)
    for place, name in enumerate(waiting, 1):
        cli.say(f"Variant {place} of {len(waiting)}: {name}")
        codes.append(_trained(by_name[name], train_stage, fresh=options.fresh, said=said))
        _free_memory()
    if launched().rank == 0:
        show_variants(ladder[0])
    return max(codes, key=(0, 2, 1).index)


def _waiting(ladder: Sequence[Settings], *, fresh: bool) -> list[str]:
    """The names of the variants to train; ranks hear them of the main process, as later some of them are trained."""
    if launched().processes == 1:
        return _look(ladder, fresh=fresh)
    from sft.distributed import ranks

    main = ranks.join_processes().is_main_process
    return ranks.from_main(_look(ladder, fresh=fresh) if main else None, "the main process to look at the variants")


def _look(ladder: Sequence[Settings], *, fresh: bool) -> list[str]:
    """What is not complete, in order, what has failed before last: it may fail again."""
    from sft.planning.disk import require_space_for_all

    adopted = {each.name for each in _variants(ladder[0]).values() if each.adopted}
    stages = [
        Stage.inspect(settings, fresh=fresh, processes=launched().processes)
        for settings in ladder
        if settings.variant not in adopted
    ]
    if problems := dict.fromkeys(text for stage in stages for text in stage.problems):
        raise Problems(problems)
    require_space_for_all(stages)
    waiting = [stage for stage in stages if stage.decision != "complete"]
    names = [stage.settings.variant for stage in sorted(waiting, key=lambda s: s.manifest.status == "failed")]
    for settings in ladder:
        if settings.variant not in names:
            cli.say(f"Variant {settings.variant}: {'adopted' if settings.variant in adopted else 'complete'} already")
    return names


def _trained(settings: Settings, train_stage: Train, *, fresh: bool, said: set[str]) -> int:
    """The exit code of one variant. `said`: what was said of others; all may have one thing wrong."""
    try:
        train_stage(settings, fresh=fresh)
    except Exception as error:  # whatever a library raised is this variant's end, not the end of the others
        # Ranks would not step on together, and a signal that reached a library's own processes shows as a failure.
        if launched().processes > 1 or STOP.number is not None:
            raise
        refused = isinstance(error, Problems)
        texts = error.problems if isinstance(error, Problems) else [f"[ERROR] {cli.explain(error)}"]
        texts = [*texts, *getattr(error, "__notes__", [])]
        cli.say(f"Variant {settings.variant} {'was refused' if refused else 'failed'}; the others go on")
        cli.say("\n".join(hide_secrets(text) for text in texts if text not in said) or "for the same reason")
        said.update(texts)
        return 2 if refused else 1
    return 0


def _free_memory() -> None:
    """Trainer, optimizer and model hold each other in circles; the next variant needs their room."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # without a GPU it does nothing


def _variants(settings: Settings) -> dict[str, Variant]:
    return find_variants(paths.stage_folder(settings.out_lora_dir, settings.stage), settings.stage)


def show_variants(settings: Settings) -> None:
    """Writes the page of a stage's variants and prints their table."""
    from sft.reporting.variants import variants_table, write_variants_report

    target = paths.variants_report(paths.stage_folder(settings.out_lora_dir, settings.stage))
    found = list(_variants(settings).values())
    facts = write_variants_report(found, target, settings.stage, settings.report_language)
    print(f"\nVariants of stage {settings.stage}\n{variants_table(facts)}\n\nReport: {target}")
    tried = {name for each in found for name in each.manifest.tried()}
    if other := sorted(tried & {*WITH_OTHER_ROWS}):
        print(f"They were trained on other rows, or in another order ({', '.join(other)}), and scored on the same.")
    if facts["variants"] and not any(row["adopted"] for row in facts["variants"]):
        plain = settings.model_copy(update={"tried": ()})
        print(f"To make one the stage: {plain.command('--adopt', facts['variants'][0]['name'])}")


def one_stage(options: argparse.Namespace, option: str) -> Settings:
    """The stage whose variants are meant.

    Raises:
        Problems: none or several, other work asked for at once, or mistakes in the settings.
    """
    if options.tries or options.check or (options.adopt and options.drop_tries):
        raise Problems([f"{option}: goes with neither --try nor --check, nor with each other; one after the other"])
    numbers = cli.stage_numbers(options.stage, options.env_dir) if options.stage else []
    if len(numbers) != 1:
        raise Problems([f"{option}: is about one stage; name it with --stage N"])
    return load_settings(numbers[0], **cli.settings_options(options))


def adopt_variant(options: argparse.Namespace) -> None:
    """Makes a complete variant OUT_stageN, and says what its env file lacks.

    Raises:
        Problems: there is no such variant, it is not complete or of other settings, or OUT_stageN is there.
    """
    settings = one_stage(options, "--adopt")
    folder = paths.stage_folder(settings.out_lora_dir, settings.stage)
    variant = pick(options.adopt, "--adopt", _variants(settings), folder)
    tried = variant.manifest.tried()
    texts = [f"{name}={value_text(value)}" for name, value in tried.items()]
    own = load_settings(settings.stage, tried=texts, **cli.settings_options(options))
    if variant.adopted:
        cli.say(f"{folder} is variant {variant.name} already")
    else:
        _adopt(variant, own, folder, fresh=options.fresh)
    record = settings.record()
    for name, value in tried.items():
        if record[name]["value"] != value:
            now = f"{value_text(record[name]['value'])} ({record[name]['origin']})"
            cli.say(f"Write {name}={value_text(value)} into stage{settings.stage}.env; it is {now} so far, and refused")


def _adopt(variant: Variant, own: Settings, folder: Path, *, fresh: bool) -> None:
    from sft.reporting.report import write_report
    from sft.stages.safety_copy import copy_finished

    if variant.status != "complete":
        raise Problems([f"--adopt {variant.name}: is {variant.status}, not complete; {own.command()} goes on with it"])
    quiet_start(own)
    if problems := Stage.inspect(own, processes=launched().processes).problems:
        raise Problems(problems)
    if moved := adopt(variant, folder, fresh=fresh):
        cli.say(f"The earlier output was moved to {moved}")
    write_report(folder, own.report_language)
    copy_finished(Stage(own.model_copy(update={"tried": ()})))
    cli.say(f"Variant {variant.name} is stage {own.stage} now: {folder}")


def drop_variants(options: argparse.Namespace) -> None:
    """Deletes the variants named, all or, where one is not there, none.

    Raises:
        Problems: a name that no variant has, or that of the stage itself.
    """
    settings = one_stage(options, "--drop-tries")
    folder, there = paths.stage_folder(settings.out_lora_dir, settings.stage), _variants(settings)
    named = [pick(text, "--drop-tries", there, folder) for text in options.drop_tries.split(",")]
    drop(list({each.name: each for each in named}.values()), folder)
    for each in named:
        cli.say(f"Dropped {each.folder}")


def change_variants(options: argparse.Namespace) -> int:
    """`--adopt` or `--drop-tries`, on the main process alone; the exit code."""
    if launched().rank == 0:
        (adopt_variant if options.adopt else drop_variants)(options)
    return 0

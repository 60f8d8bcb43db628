#!/usr/bin/env python3
"""Merge a stage's adapters into its base model, a folder that any tool loads.

  export_model.py --checkpoint_dir OUT_stage3                     -> OUT_stage3/merged
  export_model.py --checkpoint_dir OUT_stage3/checkpoint-400 --output served
  export_model.py --checkpoint_dir OUT_stage3 --push me/my-model --private
  export_model.py --checkpoint_dir OUT_stage3 --as-adapter [--rank 32]   -> OUT_stage3/adapter, for the untouched base
  export_model.py --checkpoint_dir OUT_stage3 --base-model models/moved

All stages before it are folded in as well. A plain PEFT adapter goes into the base its adapter_config.json names. The
result is compared with base + adapters on probe prompts before it appears.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft.environment import offline_unless_reachable, silence_libraries
from sft.errors import Problems
from sft.programs.command_line import reworded, run_program

if TYPE_CHECKING:
    from sft.programs.export import Origin


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--checkpoint_dir",
        "--checkpoint-dir",
        type=Path,
        required=True,
        metavar="D",
        help="a stage, a checkpoint, an adapter",
    )
    add("--output", type=Path, metavar="O", help="folder to write (D/merged)")
    add("--as-adapter", action="store_true", help="all stages as one LoRA adapter instead (D/adapter)")
    add("--rank", type=int, metavar="R", help="with --as-adapter: the nearest adapter of this rank, its error is said")
    add("--base-model", "--base_model", metavar="MODEL", help="where the base model lies now (where it lay)")
    add("--push", metavar="REPO", help="also upload it to this hub repository")
    add("--private", action="store_true", help="with --push: create the repository as a private one")
    return parser.parse_args()


def main() -> None:
    """Exports, says where to, uploads if asked."""
    options = arguments()
    if options.private and not options.push:
        raise Problems(["--private goes with --push REPO; nothing is uploaded without it"])
    if options.rank is not None and (not options.as_adapter or options.rank < 1):
        raise Problems([f"--rank {options.rank}: is a number from 1 on and goes with --as-adapter"])
    silence_libraries()
    offline = offline_unless_reachable()
    if options.push:
        from sft.programs.export import check_repository

        check_repository(options.push, offline=offline)
    from sft.programs.export import check_target

    origin = origin_of(options)
    target = options.output or options.checkpoint_dir / ("adapter" if options.as_adapter else "merged")
    check_target(target)
    write = write_adapter if options.as_adapter else write_merged
    write(origin, target, options)
    if options.push:
        from sft.programs.export import upload

        print(f"Uploaded: {upload(target, options.push, private=options.private)}")


def origin_of(options: argparse.Namespace) -> "Origin":
    """What the result was made from, on the base model where it lies now."""
    from sft.programs.base_model import require_base, with_base_model
    from sft.programs.export import find_origin

    origin = find_origin(options.checkpoint_dir)
    if options.base_model:
        origin = with_base_model(origin, options.base_model)
    require_base(origin, f"--checkpoint_dir {options.checkpoint_dir}")
    if not origin.is_base_known:
        print(f"[WARNING] Nothing says whether {origin.base} is the model that {origin.name} was trained on")
    return origin


def write_merged(origin: "Origin", target: Path, options: argparse.Namespace) -> None:
    """One model folder."""
    from sft.programs.export import export

    what = f"Merging {len(origin.adapters)} adapters into" if origin.adapters else "Copying"
    print(f"{what} {origin.base} ...", flush=True)
    with reworded("SFT_BASE_MODEL=", f"--checkpoint_dir {options.checkpoint_dir}: its base model "):
        record = export(origin, target)
    for warning in record.warnings:
        print(f"[WARNING] {warning}")
    print(f"Merged model: {target} ({record.dtype}, {record.tensors_changed} tensors changed, {record.seconds:.1f} s)")
    if record.kl is not None:
        print(f"Verified: KL {record.kl:.2g}, largest logit difference {record.max_abs_diff:.2g} on probe prompts")


def write_adapter(origin: "Origin", target: Path, options: argparse.Namespace) -> None:
    """One adapter for the base model as it is."""
    from sft.programs.export_adapter import export_adapter

    print(f"Joining {len(origin.adapters)} adapters for {origin.base} ...", flush=True)
    with reworded("SFT_BASE_MODEL=", f"--checkpoint_dir {options.checkpoint_dir}: its base model "):
        found = export_adapter(origin, target, rank=options.rank)
    ranks = sorted(set(found.combined.ranks.values()))
    print(f"Adapter: {target} (rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'})")
    if errors := found.combined.errors:
        worst = max(errors, key=errors.__getitem__)
        print(f"Shortened: {len(errors)} matrices lose up to {errors[worst]:.1%} of their update ({worst})")
    if found.answers:
        print(f"The stage's questions, all stages against this adapter: {found.answers.sentence()}")
    print(f"Compared with all stages: KL {found.kl:.2g}, largest logit difference {found.max_abs_diff:.2g}")
    for note in found.notes:
        print(f"Serving: {note}")


def program() -> int:
    """The installed command."""
    return run_program(main)


if __name__ == "__main__":
    raise SystemExit(program())

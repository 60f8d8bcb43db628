#!/usr/bin/env python3
"""Merge a stage's adapters into its base model, a folder that any tool loads.

  export_model.py --checkpoint_dir OUT_stage3                     -> OUT_stage3/merged
  export_model.py --checkpoint_dir OUT_stage3/checkpoint-400 --output served
  export_model.py --checkpoint_dir OUT_stage3 --push me/my-model --private

All stages before it are folded in as well. A plain PEFT adapter goes into the base its adapter_config.json names. The
result is compared with base + adapters on probe prompts before it appears.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft.environment import offline_unless_reachable, silence_libraries
from sft.errors import Problems
from sft.programs.command_line import reworded, run_program


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
    add("--push", metavar="REPO", help="also upload it to this hub repository")
    add("--private", action="store_true", help="with --push: create the repository as a private one")
    return parser.parse_args()


def main() -> None:
    """Exports, says where to, uploads if asked."""
    options = arguments()
    if options.private and not options.push:
        raise Problems(["--private goes with --push REPO; nothing is uploaded without it"])
    silence_libraries()
    offline = offline_unless_reachable()
    if options.push:
        from sft.programs.export import check_repository

        check_repository(options.push, offline=offline)
    from sft.programs.export import check_target, export, find_origin

    origin = find_origin(options.checkpoint_dir)
    target = options.output or options.checkpoint_dir / "merged"
    check_target(target)
    what = f"Merging {len(origin.adapters)} adapters into" if origin.adapters else "Copying"
    print(f"{what} {origin.base} ...", flush=True)
    with reworded("SFT_BASE_MODEL=", f"--checkpoint_dir {options.checkpoint_dir}: its base model "):
        record = export(origin, target)
    for warning in record.warnings:
        print(f"[WARNING] {warning}")
    print(f"Merged model: {target} ({record.dtype}, {record.tensors_changed} tensors changed, {record.seconds:.1f} s)")
    if record.kl is not None:
        print(f"Verified: KL {record.kl:.2g}, largest logit difference {record.max_abs_diff:.2g} on probe prompts")
    if options.push:
        from sft.programs.export import upload

        print(f"Uploaded: {upload(target, options.push, private=options.private)}")


if __name__ == "__main__":
    sys.exit(run_program(main))

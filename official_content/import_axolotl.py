#!/usr/bin/env python3
"""Translate an Axolotl file into a stageN.env.

  import_axolotl.py qwen_finetune.yml > stage1.env

The env file goes to stdout. Keys without a line of their own stand in it as comments, each with the reason, and are
listed on stderr as well. The result is checked by the settings themselves: a value they refuse is exit code 2.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft.errors import Problems
from sft.programs.command_line import run_program


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.yml", help="an Axolotl configuration")
    return parser.parse_args()


def read_config(path: Path) -> dict[str, Any]:
    """The keys of the YAML file. Raises Problems that name the file and the line."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Problems([f"{path}: not readable as YAML ({' '.join(str(error).split())})"]) from error
    if not isinstance(config, dict):
        raise Problems([f"{path}: an Axolotl file has keys and values, this is {type(config).__name__}"])
    return config


def check(text: str, values: dict[str, str]) -> None:
    """Let the settings read what was written. Raises their Problems, and one where they would read something else."""
    from io import StringIO

    from dotenv.parser import parse_stream

    from sft.settings import load_settings

    if {line.key: line.value for line in parse_stream(StringIO(text)) if line.key} != values:
        raise Problems(["the file holds text that an env file would read as other settings; write that value by hand"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stage1.env").write_text(text, encoding="utf-8")
        load_settings(1, env_dir=Path(folder), environ={})


def main() -> None:
    path = arguments().file
    config = read_config(path)
    from sft.programs.axolotl import translate

    translation = translate(config)
    text = translation.env(path.name)
    check(text, translation.values)
    print(text, end="")
    if translation.reasons:
        print(f"{len(translation.values)} settings; without a line of their own:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in translation.explained()), file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_program(main))

#!/usr/bin/env python3
"""Write the embedded ladder into a folder: stage1.env to stage3.env, and the model and rows they name.

  copy_demo.py            into the current folder
  copy_demo.py trial      into trial/

The stages are then trained from inside that folder. Files that are there already are kept where they are the same, and
nothing is written where one of them is another.
"""

import argparse
import filecmp
from pathlib import Path

from sft.errors import Problems
from sft.programs.command_line import run_program
from sft.storage.atomic import write_bytes

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("stage[123].env", "official_content/demo/README.md", "official_content/demo/*/*")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="where it goes (the current folder)")
    return parser.parse_args()


def files() -> list[Path]:
    """The ladder's files below the root. Raises Problems where this installation was built without them."""
    found = [path.relative_to(ROOT) for pattern in PARTS for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    if not any(path.suffix == ".safetensors" for path in found) or not any(path.suffix == ".env" for path in found):
        raise Problems([f"{ROOT}: this installation has no embedded ladder; take another wheel, or the repository"])
    return [path for path in found if "__pycache__" not in path.parts]


def main() -> None:
    folder = arguments().folder
    wanted = files()
    others = [
        str(folder / path)
        for path in wanted
        if (folder / path).exists() and not filecmp.cmp(ROOT / path, folder / path, shallow=False)
    ]
    if others:
        raise Problems([f"{name}: is there and is another file; name another folder" for name in others])
    for path in wanted:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / path).exists():
            write_bytes(folder / path, (ROOT / path).read_bytes())
    first = "" if folder == Path() else f"cd {folder} && "
    print(f"{len(wanted)} files in {folder.resolve()}. Next: {first}staged-sft --stage all")


def program() -> int:
    """The installed command."""
    return run_program(main)


if __name__ == "__main__":
    raise SystemExit(program())

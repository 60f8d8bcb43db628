"""Write the demo's task files: python official_content/demo/make_data.py OUTPUT_DIR [--seed 7]

general.jsonl        text -> JSON, YAML, CSV
toml_xml.jsonl       text -> TOML, XML
conversions.jsonl    from one format into another
"""

import argparse
import json
from pathlib import Path
from random import Random

from records import draw_task

FILES = {
    "general.jsonl": (900, [("text", "json"), ("text", "yaml"), ("text", "csv")]),
    "toml_xml.jsonl": (600, [("text", "toml"), ("text", "xml")]),
    "conversions.jsonl": (900, [
        ("json", "yaml"), ("json", "toml"), ("json", "xml"), ("json", "csv"), ("yaml", "json"), ("yaml", "toml"),
        ("toml", "json"), ("toml", "yaml"), ("xml", "json"), ("xml", "yaml"), ("csv", "json"), ("csv", "yaml"),
    ]),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for number, (name, (rows, tasks)) in enumerate(FILES.items()):
        random = Random(options.seed * 1000 + number)
        lines = [json.dumps(draw_task(random, *tasks[row % len(tasks)]), ensure_ascii=False) for row in range(rows)]
        (options.output / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

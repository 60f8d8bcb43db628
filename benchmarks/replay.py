"""What SFT_REPLAY is worth: `python -m benchmarks.replay [--scratch DIR]`, about 20 minutes of one core.

A ladder on the embedded model whose second stage teaches one format alone, at a rate at which the formats of the first
are forgotten; with several shares of replay and several seeds. A table for people, one JSON document last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import ROOT, load_average, progress
from benchmarks.tables import grid

SHARES = (0.0, 0.01, 0.05, 0.1)
SEEDS = (1, 2, 3)
COMMON = {
    "SFT_BASE_MODEL": ROOT / "official_content/demo/model", "SFT_VAL_RATIO": 0.06, "SFT_MAX_SEQ_LEN": 512,
    "SFT_PER_DEVICE_TRAIN_BS": 16, "SFT_GRAD_ACCUM": 1, "SFT_LR": "5e-3", "SFT_EVAL_STEPS": 1000,
    "SFT_SAVE_STEPS": 1000, "SFT_GEN_EVAL": "structured", "SFT_GEN_EVAL_SAMPLES": 36, "SFT_GEN_MAX_NEW_TOKENS": 160,
    "SFT_GEN_BATCH_SIZE": 36, "SFT_NUM_GENERATE_SAMPLES": 0, "SFT_GENERAL_EVAL": 0, "SFT_REPORT_TO": "none",
}  # fmt: skip
# Rows of each stage by the task that they teach, and how often each is seen.
TASKS = {1: (("text_to_json", "text_to_yaml"), "general.jsonl", 2), 2: (("text_to_toml",), "toml_xml.jsonl", 2)}


def write_ladder(folder: Path) -> None:
    """Rows and env files of both stages."""
    for stage, (tasks, name, epochs) in TASKS.items():
        rows = (ROOT / "official_content/demo/data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if json.loads(row)["subcategory"] in tasks]
        (folder / f"rows{stage}.jsonl").write_text("".join(kept), encoding="utf-8")
        settings = COMMON | {"SFT_DATASET_ID": folder / f"rows{stage}.jsonl", "SFT_EPOCHS": epochs}
        settings["SFT_OUT_LORA_DIR"] = folder / "out"
        lines = "".join(f"{key}='{value}'\n" for key, value in settings.items())
        (folder / f"stage{stage}.env").write_text(lines, encoding="utf-8")


def train(folder: Path, stage: int, out: Path, seed: int, share: float = 0.0) -> None:
    sets = {"SFT_OUT_LORA_DIR": out, "SFT_SEED": seed} | ({"SFT_REPLAY": share} if share else {})
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, ROOT / "train.py", "--stage", str(stage), "--env-dir", folder, *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SFT_", "MLFLOW_"))}
    with (folder / f"{out.name}_stage{stage}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def measure(folder: Path, shares: list[float], seeds: list[int]) -> list[dict[str, Any]]:
    """One record per seed and share: scores of the first stage's tasks before and after the second, and its own."""
    write_ladder(folder)
    found = []
    for seed in seeds:
        progress(f"seed {seed}: stage 1")
        first = folder / f"seed{seed}"
        train(folder, 1, first, seed)
        for share in shares:
            progress(f"seed {seed}: stage 2 with {share:.0%} replay")
            out = folder / f"seed{seed}_{round(share * 1000)}"
            shutil.copytree(f"{first}_stage1", f"{out}_stage1")
            train(folder, 2, out, seed, share)
            manifest = json.loads(Path(f"{out}_stage2/stage.json").read_text(encoding="utf-8"))
            matrix = manifest["forgetting"]
            scores = {m: dict(zip(matrix["tasks"], row, strict=True))
                      for m, row in zip(matrix["models"], matrix["scores"], strict=True)}  # fmt: skip
            found.append(
                {
                    "seed": seed, "share": share, "rows": sum(each["rows"] for each in manifest["replay"]),
                    "train_rows": manifest["train_rows"], "learnt": scores["stage 1"]["stage 1"],
                    "kept": scores["stage 2"]["stage 1"], "own_before": scores["stage 1"]["stage 2"],
                    "own_after": scores["stage 2"]["stage 2"],
                    "by_task": matrix["by_task"]["stage 2"]["stage 1"], "answers": matrix["by_question"]["stage 2"],
                }
            )  # fmt: skip
    return found


def summary(found: list[dict[str, Any]]) -> list[list[str]]:
    """A line per share: means over the seeds, the range, and the difference to no replay question by question."""
    from sft.scoring.significance import paired_difference

    rows = []
    for share in sorted({each["share"] for each in found}):
        runs = [each for each in found if each["share"] == share]
        plain = {each["seed"]: each["answers"] for each in found if each["share"] == 0.0}
        cells = [f"{share:.0%}", "/".join(str(each["rows"]) for each in runs)]
        cells += [ranged([each[name] for each in runs]) for name in ("learnt", "kept", "own_before", "own_after")]
        for tasks in ("stage 1", "stage 2"):
            pairs = [
                pair
                for each in runs if each["seed"] in plain
                for pair in zip(plain[each["seed"]][tasks], each["answers"][tasks], strict=True)
            ]  # fmt: skip
            cells.append(paired_difference(*zip(*pairs, strict=True)).sentence() if share and pairs else "")
        rows.append(cells)
    return rows


def ranged(values: list[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


HEAD = [
    "replay", "rows", "stage 1's tasks after stage 1", "after stage 2", "stage 2's before", "after", "kept against 0 %",
    "own against 0 %",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("--scratch", type=Path, help="where the runs go (default: a temporary folder)")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    scratch = Path(options.scratch or tempfile.mkdtemp(prefix="staged_sft_replay_")).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_DATASETS_CACHE", str(scratch / "datasets"))
    before = load_average()
    try:
        found = measure(scratch, options.shares, options.seeds)
    finally:
        if not options.scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    print(grid(HEAD, summary(found)))
    print(json.dumps({"load_average": [before, load_average()], "runs": found}))


if __name__ == "__main__":
    main()

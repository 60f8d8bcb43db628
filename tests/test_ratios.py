"""Ratios that stay put on any machine, held with room to spare; absolute times are `make bench`'s business."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import inputs, merging
from benchmarks.common import ROOT, child, spread


def cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def test_labels_cost_little_more_than_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_settings: Callable
):
    """Rendered, encoded, masked, audited and written in at most four times what the tokenizer's own call takes.

    Measured 1.5 to 2 times; a second encoding per row, or one call per row, makes it more than four.
    """
    from sft.data.labels import label
    from sft.data.labels.audit import audit
    from sft.data.sources.load import load_source
    from sft.settings import Source

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    rows = inputs.generated_rows(tmp_path / "rows.jsonl", 600)
    tokenizer = inputs.learnt_tokenizer(rows, 2000)
    loaded = load_source(Source(id=str(rows)))
    texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in loaded.dataset["messages"]]
    ratios = []
    for version in range(3):
        monkeypatch.setattr(label, "VERSION", -1 - version)  # nothing is found in the cache
        settings = make_settings(max_seq_len=8192, num_proc=1)
        floor = cpu_seconds(lambda: tokenizer(texts, add_special_tokens=False))
        ours = cpu_seconds(lambda s=settings: audit(label.label(loaded, tokenizer, s), tokenizer, s))
        ratios.append(ours / floor)
    assert statistics.median(ratios) < 4


def test_the_memory_of_a_merge_does_not_grow_with_the_model(tmp_path: Path):
    """Three times the layers, 101 MB more to merge: at most a fifth of that more memory."""
    extra, sizes = [], []
    for layers in (8, 24):
        folder = tmp_path / str(layers)
        folder.mkdir()
        sizes.append(merging.make(folder, (512, 2048, layers, 8000, 8_000_000))["bytes"])
        found = child("merging", "ours", folder).figures()
        extra.append(found["peak_bytes"] - found["imported_bytes"])
    assert sizes[1] - sizes[0] > 100e6
    assert extra[1] - extra[0] < 0.2 * (sizes[1] - sizes[0])


@pytest.mark.parametrize("mistake", [[], ["--stage", "1", "--set", "SFT_LORA_RR=8"]])
def test_help_and_mistakes_import_nothing_heavy(mistake: list[str], tmp_path: Path):
    """Answers come without torch and its relatives, whose import alone takes seconds."""
    code = (
        "import atexit, json, runpy, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules))))\n"
        f"sys.argv = ['train.py', *{mistake or ['--help']!r}]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SFT_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if mistake else 0), done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    heavy = {
        "torch",
        "transformers",
        "datasets",
        "trl",
        "peft",
        "mlflow",
        "numpy",
        "pyarrow",
        "matplotlib",
        "accelerate",
    }
    assert loaded & heavy == set()
    assert mistake or not loaded & {"pydantic", "sft.settings"}  # help names no settings


def test_a_merge_of_folders_imports_torch_and_little_else():
    """Its start-up counts as much as the merge itself: no settings, and none of torch's companions."""
    code = "import json, sys, sft.merging.merge; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)))
    assert "torch" in loaded
    assert not loaded & {"pydantic", "transformers", "peft", "datasets", "accelerate"}


def test_the_step_of_the_growth_table_trains(tmp_path: Path):
    """The item ends a long benchmark; an argument missing in it was found only there."""
    from benchmarks.growth import train_step
    from tests.architectures import tiny_model

    tiny_model("qwen3", vocab_size=1024).save_pretrained(tmp_path)
    assert train_step(tmp_path, 16, total=64)["seconds"] > 0


def test_the_spread_of_a_benchmark_is_taken_per_figure():
    """Median, lowest and highest of three rounds; a figure need not come with every variant."""
    runs = [{"seconds": 3.0}, {"seconds": 1.0}, {"seconds": 2.0}]
    assert spread(runs) == {"median": {"seconds": 2.0}, "lowest": {"seconds": 1.0}, "highest": {"seconds": 3.0}}

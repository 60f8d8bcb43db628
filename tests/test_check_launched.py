"""`--check` under a launcher: the main process alone checks, for all of them; nobody waits for anybody."""

import json
import re

import pytest

from tests.launching import processes, run
from tests.tiny import write_model, write_rows, write_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("checked")
    rows = write_rows(folder / "rows.jsonl", 40)
    common = {"SFT_BASE_MODEL": write_model(folder / "base"), "SFT_OUT_LORA_DIR": folder / "out"}
    write_stage(folder, 1, common | {"SFT_DATASET_ID": rows, "SFT_GEN_EVAL": "structured"})
    return folder


@pytest.mark.parametrize("kind", ["torchrun", "ddp", "zero2"])
def test_two_processes_print_one_page_and_end(ladder, kind: str):
    """36 rows in global batches of 4 x 2 x 2: three steps; exit code 0, nothing trained, nobody left."""
    mark = ladder / kind
    code, shown = run(kind, mark, "--stage", 1, "--check", "--env-dir", ladder)
    assert code == 0, shown
    assert shown.count("Stage 1: fresh") == shown.count("Memory per device") == 1
    assert "3 steps, 3 an epoch, 16 rows a step (4 x 2 accumulated x 2 devices)" in shown
    assert not processes(mark)
    assert not list(ladder.glob("out*"))


def test_zero3_claims_no_time(ladder):
    """No device holds the model; the document is one JSON document, the page says why."""
    code, shown = run("zero3", ladder / "zero3", "--stage", 1, "--check", "--json", "--env-dir", ladder)
    assert code == 0, shown
    document = json.loads(re.search(r"^\{.*^\}", shown, re.MULTILINE | re.DOTALL)[0])
    assert document["time"] is None
    assert document["steps"]["global_batch"] == 16

"""What a command imports: only what its stage uses, and everything a later stage of the same process asks for."""

import importlib.metadata
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from sft.data.chosen import numbers_of
from sft.data.sources import store
from sft.environment import Deferred, Distributions, defer
from tests.tiny import write_model, write_rows, write_stage

ROOT = Path(__file__).resolve().parents[1]
# The parts of bitsandbytes and of DeepSpeed that are there once either is more than a name.
LOADED = {"bitsandbytes.nn", "torch._inductor.compile_fx", "deepspeed.runtime"}


def modules_after(folder: Path, *commands: list[str]) -> tuple[list[int], list[set[str]]]:
    """Exit codes and all loaded modules after each of these commands of train.py, one process for all."""
    program = (
        "import json, sys, train\nfrom sft import cli\nfound = []\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    try:\n        code = cli.command_line(train.main, command)\n"
        "    except SystemExit as end:\n        code = end.code or 0\n"
        "    found.append((code, list(sys.modules)))\n"
        "print(json.dumps(found), file=open(sys.argv[2], 'w'))"
    )
    answer = folder / "modules.json"
    subprocess.run([sys.executable, "-c", program, json.dumps(commands), answer], cwd=ROOT, check=True)
    found = json.loads(answer.read_text())
    return [code for code, _ in found], [set(modules) for _, modules in found]


@pytest.fixture
def tiny_stages(tmp_path: Path) -> Path:
    """Stage 1 of a tiny model, and stage 2 with its base in 4 bits."""
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    write_model(tmp_path / "base")
    common = {"SFT_BASE_MODEL": tmp_path / "base", "SFT_DATASET_ID": rows, "SFT_OUT_LORA_DIR": tmp_path / "out"}
    common |= {"SFT_MAX_STEPS": 2}
    write_stage(tmp_path, 1, common)
    write_stage(tmp_path, 2, common | {"SFT_LOAD_IN_4BIT": 1})
    return tmp_path


def heavy(modules: set[str]) -> set[str]:
    names = {"torch", "transformers", "peft", "trl", "datasets", "pandas", "numpy", "mlflow", "huggingface_hub"}
    return modules & names


def test_help_and_mistakes_load_no_library(tiny_stages: Path):
    """Neither help, a setting that does not exist, nor a stage that has no env file."""
    commands = [
        ["--help"],
        ["--stage", "1", "--env-dir", str(tiny_stages), "--set", "SFT_LORA_RR=8"],
        ["--stage", "7", "--env-dir", str(tiny_stages)],
    ]
    codes, modules = modules_after(tiny_stages, *commands)
    assert codes == [0, 2, 2]
    assert [heavy(each) for each in modules] == [set()] * 3


def test_a_check_loads_neither_trainer_nor_tracking_nor_quantiser(tiny_stages: Path):
    """Of a plain stage; DeepSpeed stays away as well."""
    codes, (modules,) = modules_after(tiny_stages, ["--stage", "1", "--check", "--env-dir", str(tiny_stages)])
    assert codes == [0]
    assert modules & {*LOADED, "mlflow", "trl.trainer.sft_trainer", "sft.training.trainer"} == set()


@pytest.mark.slow
def test_a_stage_in_4_bits_follows_a_plain_one_in_the_same_process(tiny_stages: Path):
    """The plain one trains without bitsandbytes and DeepSpeed; the other loads the first when it needs it."""
    commands = [["--stage", number, "--env-dir", str(tiny_stages)] for number in ("1", "2")]
    codes, (plain, quantised) = modules_after(tiny_stages, *commands)
    assert codes == [0, 0]
    assert plain & LOADED == set()
    assert "bitsandbytes.nn" in quantised
    assert "deepspeed.runtime" not in quantised
    assert json.loads((tiny_stages / "out_stage2" / "training_config.json").read_text())["bnb_config"]["load_in_4bit"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch):
    """Writes a package and defers it; `loads` has a line for every time it was loaded."""

    def make(text: str, **known: object) -> Path:
        loads = tmp_path / "loads"
        loads.write_text("")
        source = f"open({str(loads)!r}, 'a').write('x')\n{text}"
        (tmp_path / "wanted.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        defer("wanted", **known)
        return loads

    yield make
    sys.modules.pop("wanted", None)


def test_a_deferred_package_is_loaded_once_by_its_first_use(package):
    """Until then it is there to import and to be found; what is known of it needs no loading."""
    loads = package("value = 3\nclass Known: pass", Known=int)
    import wanted

    assert importlib.util.find_spec("wanted") is not None
    assert wanted.Known is int
    assert not hasattr(wanted, "__warningregistry__")
    assert loads.read_text() == ""
    assert wanted.value == 3
    assert wanted.Known is not int
    assert loads.read_text() == "x"
    with pytest.raises(AttributeError, match="other"):
        wanted.other  # noqa: B018


def test_a_deferred_package_that_fails_says_so_every_time(package):
    """As an import of it would; one that is missing or loaded stays as it is."""
    package("raise ImportError('no driver')")
    import wanted

    for _ in range(2):
        with pytest.raises(ImportError, match="no driver"):
            wanted.value  # noqa: B018
    assert isinstance(wanted, Deferred)
    before = json.loads
    defer("json")
    defer("no_such_package_anywhere")
    assert json.loads is before
    assert "no_such_package_anywhere" not in sys.modules


def test_distributions_are_those_of_all_packages(monkeypatch):
    """The same answers, most without the long list; one that no package has is missing."""
    whole = importlib.metadata.packages_distributions()
    found = Distributions()
    asked = ("transformers", "peft", "trl", "yaml")
    assert {name: found[name] for name in asked} == {name: list(dict.fromkeys(whole[name])) for name in asked}
    with pytest.raises(KeyError):
        found["no_such_package_anywhere"]


def test_a_column_of_numbers_is_that_of_the_view():
    """Of joined data sets, views of views and ranges, as whole numbers that can be negated."""
    joined = datasets.concatenate_datasets([
        datasets.Dataset.from_dict({"length": list(part)}).cast_column("length", datasets.Value("uint16"))
        for part in (range(50), range(100, 130))
    ])  # fmt: skip
    view = joined.select(np.random.default_rng(0).permutation(80))
    for rows in (joined, view, view.select([7, 3, 3, 60]), view.select(range(5, 9)), joined.select(range(48, 53))):
        assert numbers_of(rows, "length").tolist() == list(rows["length"])
        assert numbers_of(rows, "length").dtype == np.int64


def test_stored_rows_are_few_batches_however_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A thousand batches are gone through with every view of the rows."""
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path)
    parts = [pa.table({"number": [n, n + 1], "text": ["a", "b" * 3000]}) for n in range(0, 8000, 2)]

    def fill(write: store.Write) -> dict[str, Counter[str]]:
        for part in parts:
            write(part)
        return {}

    found = store.stored("rows", parts[0].schema, fill).dataset
    assert found.data.column("number").num_chunks == 2  # of 8 MiB and what is left
    assert found["number"][:] == list(range(8000))

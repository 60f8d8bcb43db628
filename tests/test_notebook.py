"""The notebook: it holds no outputs, speaks two languages, chooses by the machine, and every cell runs, twice."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "official_content" / "staged_sft.ipynb"
# As nvidia-smi prints them: name, MiB, compute capability.
T4, L4, A100 = "Tesla T4, 15360, 7.5\n", "NVIDIA L4, 23034, 8.9\n", "NVIDIA A100-SXM4-40GB, 40960, 8.0\n"
QUICK = {
    "SFT_MAX_STEPS": "2", "SFT_EVAL_STEPS": "2", "SFT_SAVE_STEPS": "2", "SFT_GEN_EVAL_SAMPLES": "2",
    "SFT_GEN_MAX_NEW_TOKENS": "8", "SFT_GENERAL_EVAL": "0", "SFT_REPORT_TO": "none", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def notebook() -> nbformat.NotebookNode:
    return nbformat.read(FILE, as_version=4)


def cell(name: str) -> str:
    (found,) = (each.source for each in notebook().cells if each.id == name)
    return found


def functions(name: str) -> dict:
    """What a cell defines, without what it does: its `def`s alone are executed."""
    source = "\n\n".join(re.findall(r"^def .*?(?=^\S|\Z)", cell(name), re.MULTILINE | re.DOTALL))
    names: dict = {"Path": Path, "os": os, "sys": sys}
    exec(source, names)
    return names


def test_the_notebook_is_valid_and_stores_no_outputs():
    """Nobody's results, and nothing for a diff to show but the cells."""
    nbformat.validate(json.loads(FILE.read_text(encoding="utf-8")))
    assert [each.id for each in notebook().cells if each.get("outputs") or each.get("execution_count")] == []


def test_every_explanation_is_in_both_languages():
    """English and Japanese in each cell of text."""
    texts = [each.source for each in notebook().cells if each.cell_type == "markdown"]
    assert len(texts) >= 7
    assert [text for text in texts if not (re.search(r"[ぁ-んァ-ン]", text) and re.search(r"[a-z]{4}", text))] == []


def test_the_machine_decides_how_the_4b_model_is_trained():
    """bfloat16 on an L4 and an A100, 4 bits on a T4, the embedded model on a CPU; sixteen rows a step everywhere."""
    names = functions("machine")
    chosen = {text: names["settings_for"](names["gpus_of"](text)) for text in ("", T4, L4, A100, T4 + T4)}
    assert chosen[""]["SFT_BASE_MODEL"] == "official_content/demo/model"
    four_bit = [chosen[text].get("SFT_LOAD_IN_4BIT") for text in (T4, L4, A100, T4 + T4)]
    assert four_bit == ["1", None, None, "1"]
    for text, found in chosen.items():
        rows = int(found["SFT_PER_DEVICE_TRAIN_BS"]) * int(found["SFT_GRAD_ACCUM"])
        assert rows * max(1, text.count("\n")) == 16


def test_two_t4s_are_started_together():
    """Kaggle's pair: one process each, by the launch line that the installed package has."""
    names = functions("machine")
    start = names["start_with"]
    assert start(names["gpus_of"](T4)) == start([]) == "staged-sft"
    assert start(names["gpus_of"](T4 + T4)) == "accelerate launch --multi_gpu --num_processes 2 -m staged_sft.train"


def test_a_secret_that_is_missing_or_forbidden_is_none(monkeypatch: pytest.MonkeyPatch):
    """Colab's userdata raises its own error for either; the environment goes before it."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    secret = functions("push")["secret"]
    assert secret("HF_TOKEN") is None

    class Userdata:
        @staticmethod
        def get(name: str) -> str:
            raise RuntimeError("NotebookAccessError")

    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(userdata=Userdata))
    assert secret("HF_TOKEN") is None
    monkeypatch.setenv("HF_TOKEN", "written")
    assert secret("HF_TOKEN") == "written"


def test_an_install_without_a_network_is_one_line_with_what_to_do(tmp_path: Path):
    """pip finds nothing: the cell ends with the setting that switches the network on and the other way in."""
    venv.create(tmp_path / "fresh", with_pip=True)
    (tmp_path / "cell.py").write_text(cell("install"), encoding="utf-8")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [tmp_path / "fresh" / "bin" / "python", "cell.py"]
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=alone | offline)
    assert done.returncode == 1
    said = "staged-sft[gpu] was not installed: switch the Internet on in the settings, or name a wheel"
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize("fault", [ValueError("mount failed"), None])
def test_a_drive_that_is_not_mounted_is_said_and_nothing_is_copied_there(
    fault: Exception | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Declined, or mounted without a folder to write to: the cell ends well, and says that there is no safety copy."""

    class Drive:
        @staticmethod
        def mount(place: str) -> None:
            if fault:
                raise fault

    monkeypatch.delenv("SFT_MIRROR", raising=False)
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=Drive))
    names: dict = {"os": os, "sys": sys, "Path": Path}
    exec(cell("mirror"), names)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Drive is not mounted (")
    assert (second, names["MIRROR"]) == ("Safety copy: none; a lost session starts again", "")


def executed(folder: Path) -> dict[str, str]:
    """What each cell printed, by its name; a failed cell fails the test with its output."""
    found = notebook()
    NotebookClient(found, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    return {
        each.id: "".join(output.get("text", "") or str(output.get("data", "")) for output in each.outputs)
        for each in found.cells
        if each.cell_type == "code"
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_cell_runs_and_a_second_time_trains_nothing(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the first cell to the last without an edit, on a CPU with the embedded model: nothing is installed or
    pushed, the safety copy is made, the report is shown. The second time everything is complete already."""
    work = tmp_path / "home"
    work.mkdir()
    for name, value in (QUICK | {"SFT_MIRROR": str(tmp_path / "drive")}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "drive").mkdir()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{commands}{os.pathsep}{ROOT}")
    first = executed(work)
    assert re.search(r"^torch +ok", first["machine"], re.MULTILINE)
    assert "Forgetting matrix" in first["demo"]
    assert "stand in for it" in first["rows"]
    assert "<iframe srcdoc=" in first["report"]
    assert first["chat"].strip()
    assert "Merged model: outputs/my_stage1/merged" in first["export"]
    assert first["push"] == "Nothing is pushed: write YOU/my-model in REPO and run this cell again\n"
    assert list((tmp_path / "drive").rglob("adapter_model.safetensors"))
    second = executed(work)
    assert second["demo"].count("Training has already been completed") == 3
    assert "Training has already been completed" in second["train"]

"""`--check` without a stage: each finding is good or has a remedy; only what is essential ends with exit code 2."""

import json
import re
import sqlite3
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import train
from sft import cli
from sft.environment import triton_missing
from sft.planning import machine
from sft.planning.machine import Finding
from sft.settings.values import ATTENTION
from sft.training.loss import leave_out_triton


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No network: the hub is switched off."""
    monkeypatch.setattr("sft.planning.machine.hub_is_off", lambda: True)


def test_the_installed_versions_are_the_pinned_ones():
    """The environment of the tests is made from constraints.txt."""
    found = {finding.name: finding.state for finding in machine.libraries()}
    assert found.pop("deepspeed") == ("ok" if find_spec("deepspeed") else "warning")
    assert found == dict.fromkeys((*machine.NEEDED, "bitsandbytes"), "ok")


def test_pins_are_read_from_a_constraints_file():
    """Comments behind a pin and lines without one are passed over."""
    assert machine.pins("# note\ntorch==2.13.0  # CPU wheel\n\npeft==0.21.2\n") == {"torch": "2.13.0", "peft": "0.21.2"}


def test_a_build_of_the_pinned_version_is_good_and_another_version_is_named():
    """2.13.0+cu130 is 2.13.0; 2.12.1 is a warning with the command that mends it."""
    assert machine.library("torch", "2.13.0+cu130", "2.13.0") == Finding("torch", "ok", "2.13.0+cu130")
    other = machine.library("torch", "2.12.1", "2.13.0")
    assert other.text == "torch: 2.12.1, tested with 2.13.0; run make install"
    assert other.state == "warning"


def test_a_missing_library_is_broken(monkeypatch):
    """torch is needed, deepspeed only for some launches."""

    def version(name):
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    states = {finding.name: finding.state for finding in machine.libraries()}
    assert (states["torch"], states["deepspeed"]) == ("broken", "warning")


def test_a_stage_that_tracks_nowhere_does_not_need_mlflow(monkeypatch, make_settings):
    """SFT_REPORT_TO=none trains without it."""
    missing = Finding("mlflow", "broken", "is not installed", machine.INSTALL)
    monkeypatch.setattr(machine, "libraries", lambda: [missing])
    assert machine.machine_problems(make_settings()) == [missing.text]
    assert machine.machine_problems(make_settings(report_to=("none",))) == []


def test_old_python_is_broken():
    """3.11 is the oldest."""
    assert machine.python((3, 10, 2)).state == "broken"
    assert machine.python((3, 11, 0)) == Finding("Python", "ok", "3.11.0")


@pytest.mark.parametrize(("free", "state"), [(0.5, "warning"), (5, "warning"), (500, "ok")])
def test_disk_space(monkeypatch, tmp_path, free, state):
    """Under 10 GiB a merged model may not fit; whether a stage does is counted for each."""
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 2**30))
    assert machine.disk(tmp_path / "not" / "there").state == state


def test_on_kaggle_results_belong_into_the_folder_that_is_kept(tmp_path, monkeypatch):
    """Inside it is good, outside a warning with the setting, elsewhere there is nothing to say."""
    assert list(machine.kaggle(tmp_path)) == []
    monkeypatch.setattr(machine, "KAGGLE", tmp_path / "working")
    (tmp_path / "working").mkdir()
    assert [finding.state for finding in machine.kaggle(tmp_path / "working" / "outputs")] == ["ok"]
    (lost,) = machine.kaggle(tmp_path / "outputs")
    assert lost.text.endswith(
        f"outputs is lost when the session ends; set SFT_OUT_LORA_DIR to a path below {tmp_path}/working"
    )


def test_stores(tmp_path):
    """A sqlite file is good, a file store is refused by MLflow, an unreachable server is a warning without its
    password.
    """
    database = tmp_path / "mlflow.db"
    sqlite3.connect(database).close()
    assert machine.store(f"sqlite:///{database}").state == "ok"
    assert machine.store(f"file://{tmp_path}").remedy.startswith("MLflow refuses file stores")
    gone = machine.store("http://user:secret@127.0.0.1:9/")
    assert gone.state == "warning"
    assert "secret" not in gone.text


def test_an_address_that_keeps_silent_costs_no_more_than_the_limit(monkeypatch):
    """A hub that accepts and never answers does not hold the check up."""
    monkeypatch.setattr(machine, "SECONDS", 0.05)
    monkeypatch.setattr(machine, "_fault", lambda address: (machine.sys.stdin and __import__("time").sleep(1)) or "")
    assert machine.unreachable("http://silent.invalid") == "no answer in 0 s"


def test_the_command_prints_a_table(capsys):
    """Exit 0 here; Python, attention and the hub have their lines."""
    assert cli.command_line(train.main, ["--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["Python", "ok"]
    assert any(line.startswith("attention") and "sdpa" in line for line in lines)
    assert any(line.startswith("hub") and "HF_HUB_OFFLINE" in line for line in lines)


def test_what_is_broken_ends_with_exit_code_2(monkeypatch, capsys):
    """The same words in the document and on stderr."""
    monkeypatch.setattr(machine, "examine", lambda settings: [Finding("peft", "broken", "is not installed", "run it")])
    assert cli.command_line(train.main, ["--check", "--json"]) == 2
    captured = capsys.readouterr()
    listed = [{"name": "peft", "state": "broken", "found": "is not installed", "remedy": "run it"}]
    assert json.loads(captured.out) == {"machine": listed, "problems": ["peft: is not installed; run it"]}
    assert "[ERROR] peft: is not installed; run it" in captured.err


def test_a_stage_is_missing(capsys):
    """Without --check the stage must be named."""
    assert cli.command_line(train.main, []) == 2
    assert (
        "[ERROR] --stage: is missing; give a number such as 1, a range such as 1-3, or all" in capsys.readouterr().err
    )


# GPUs, as far as they can be played on a machine without one

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder)  Sun\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.3\n"


@pytest.fixture
def blind(monkeypatch, tmp_path):
    """torch sees no GPU; the driver's file says this, torch is built for this CUDA."""

    def make(driver: str | None, *, cuda: str | None = "13.0", build: str = "2.13.0+cu130"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", build)
        monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("CUDA unknown error")))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(machine.shutil, "which", lambda name: None)
        monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
        monkeypatch.setattr(machine, "DEVICE", tmp_path / "nvidia0")
        if driver is not None:
            (tmp_path / "version").write_text(driver)
        return next(machine.devices())

    return make


def test_a_machine_without_a_gpu_is_fine(blind):
    """No driver, no card, no remedy."""
    assert blind(None).state == "ok"


def test_a_driver_too_old_for_the_wheel_is_broken_and_training_does_not_fall_to_the_cpu(blind, make_settings):
    """CUDA 13 wants driver 580; 535 runs the wheel for CUDA 12.6, whose exact command is given."""
    found = blind(CLOSED)
    assert (found.state, found.found) == (
        "broken", "driver 535.104.05 is too old for torch 2.13.0+cu130 (CUDA 13.0 needs 580)"
    )  # fmt: skip
    assert found.remedy == (
        "update the driver to 580 or newer, or pip install torch==2.13.0+cu126 --index-url "
        "https://download.pytorch.org/whl/cu126; CUDA_VISIBLE_DEVICES= trains on the CPU all the same"
    )
    assert machine.machine_problems(make_settings()) == [found.text]


def test_a_driver_too_old_for_every_wheel_is_to_be_updated(blind):
    """Driver 470: no torch build fits it; hiding the card is the other way."""
    found = blind(CLOSED.replace("535.104.05", "470.57.02"))
    assert found.remedy.startswith("update the driver to 580 or newer; CUDA_VISIBLE_DEVICES=")


@pytest.mark.parametrize(("driver", "index"), [(OPEN, "cu130"), (CLOSED, "cu126")])
def test_a_torch_for_the_cpu_beside_a_gpu_is_broken(blind, driver, index):
    """The wheel that the driver can run is named."""
    found = blind(driver, cuda=None, build="2.13.0+cpu")
    assert found.state == "broken"
    assert f"pip install torch==2.13.0+{index} --index-url" in found.remedy


def test_a_card_without_a_driver_torch_can_use_says_what_cuda_says(blind):
    """The driver is new enough, so CUDA's own words and the container's flag are named."""
    found = blind(OPEN)
    assert found.found == "there is one (driver 580.65.06), but torch does not see it: CUDA unknown error"
    assert "--gpus all" in found.remedy


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_gpus_are_nobodys_fault(blind, monkeypatch, value):
    """Who sets CUDA_VISIBLE_DEVICES means it."""
    blind(CLOSED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    (found, _) = machine.devices()
    assert (found.state, found.found.partition(":")[0]) == ("ok", "none (hidden by CUDA_VISIBLE_DEVICES)")


def test_nvidia_smi_tells_of_a_gpu_where_no_file_does(blind, monkeypatch):
    """Windows' Linux has neither; an image that merely holds the program has no GPU."""
    blind(None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/nvidia-smi" if name == "nvidia-smi" else None)
    asked = {"returncode": 0, "stdout": "551.23\n"}
    monkeypatch.setattr(machine.subprocess, "run", lambda *command, **how: SimpleNamespace(**asked))
    assert machine.gpu_driver() == "551.23"
    asked |= {"returncode": 9, "stdout": "NVIDIA-SMI has failed\n"}
    assert machine.gpu_driver() is None


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 0), False), ((6, 1), False), ((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True),
     ((12, 1), True), ((13, 0), True)],
)  # fmt: skip
def test_kernels_of_the_cuda_13_wheel(capability, runs):
    """Same generation and not newer than the card; PTX for all that come after it; V100 and older are out."""
    wheel = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert machine.has_kernels(capability, wheel) is runs


@pytest.fixture
def cards(monkeypatch):
    """One visible card of this name and capability, on a machine with these tools."""

    def make(card: str, capability: tuple[int, int], missing: list[str], *, bf16: bool = True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: card)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number=0: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number=0: (79 * 2**30, 80 * 2**30))
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
        monkeypatch.setattr(machine, "triton_missing", lambda: missing)
        return {finding.name: finding for finding in machine.devices()}

    return make


def test_a_card_without_kernels_is_broken_with_the_wheel_that_has_them(cards):
    """Too old for this build, too new for any, too old for all: each with its remedy."""
    found = cards("Tesla V100", (7, 0), [], bf16=False)["GPU 0"]
    assert found.state == "broken"
    assert "compute capability 7.0" in found.found
    assert "torch==2.13.0+cu126" in found.remedy
    assert cards("a card of tomorrow", (13, 0), [])["GPU 0"].remedy == "take a newer torch"
    assert "another card" in cards("Tesla K80", (3, 7), [])["GPU 0"].remedy


def test_a_gpu_needs_a_compiler_and_python_h(cards):
    """Triton builds its launcher when the first kernel runs; the packages that bring both are named."""
    found = cards("H100", (9, 0), ["a C compiler", "Python.h"])["Triton"]
    assert (found.state, found.found) == ("broken", "a C compiler and Python.h not found")
    assert re.fullmatch(r"apt-get install gcc python3\.\d+-dev", found.remedy)
    assert "Triton" not in cards("H100", (9, 0), [])


@pytest.mark.parametrize(("bf16", "state"), [(True, "ok"), (False, "warning")])
def test_bfloat16_in_emulation_is_none(cards, bf16, state):
    """A T4 says that it has it."""
    assert cards("Tesla T4", (7, 5), [], bf16=bf16)["bfloat16"].state == state


def test_a_gpu_whose_figures_mlflow_could_not_read_is_a_warning(cards, monkeypatch):
    """MLflow imports pynvml and stays silent without it."""
    assert "GPU metrics" not in cards("H100", (9, 0), [])
    known = machine.find_spec
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "pynvml" else known(name))
    found = cards("H100", (9, 0), [])["GPU metrics"]
    assert (found.state, found.remedy) == ("warning", "pip install nvidia-ml-py")


def test_ways_to_compute_attention_are_those_sft_attn_takes(cards):
    """What is listed can be set."""
    listed = cards("H100", (9, 0), [])["attention"].found.split(", ")
    assert set(listed) <= set(ATTENTION)


def test_what_triton_needs_is_looked_for(monkeypatch):
    """A compiler under any of its names, CC first, and the headers of this Python."""
    monkeypatch.setattr("sft.environment.find_spec", lambda name: object())
    monkeypatch.setattr("sft.environment.shutil.which", lambda name: None)
    assert "a C compiler" in triton_missing()
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setattr("sft.environment.shutil.which", lambda name: name if name == "/opt/cc" else None)
    assert "a C compiler" not in triton_missing()
    monkeypatch.setattr("sft.environment.sysconfig.get_paths", lambda: {"include": "/nowhere"})
    assert triton_missing() == ["Python.h"]


def test_without_a_working_triton_the_fused_head_is_torch(monkeypatch):
    """TRL's own switch, read at every call; where Triton works it is left alone."""
    from trl.kernels import chunked_logprob

    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    monkeypatch.setattr("sft.training.loss.triton_missing", list)
    leave_out_triton()
    assert chunked_logprob._use_triton(torch.device("cuda"))
    monkeypatch.setattr("sft.training.loss.triton_missing", lambda: ["Python.h"])
    leave_out_triton()
    assert not chunked_logprob._use_triton(torch.device("cuda"))

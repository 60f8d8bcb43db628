"""`--check` without a stage: is this machine ready? Every finding is good or comes with a remedy."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from sft.distributed.launch import launched
from sft.environment import answer_within, gpus_hidden, hub_address, hub_is_off, silence_libraries, triton_missing
from sft.errors import REPOSITORY, Problems, hide_secrets
from sft.settings import Settings
from sft.settings.schema import tracking_uri

State = Literal["ok", "warning", "broken"]
NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "mlflow")
OPTIONAL = {
    "bitsandbytes": "pip install bitsandbytes, for SFT_LOAD_IN_4BIT, SFT_LOAD_IN_8BIT and 8-bit optimizers",
    "deepspeed": "make install-deepspeed or pip install deepspeed, for the launch files zero2 and zero3",
}
PINS = (REPOSITORY or Path()) / "constraints.txt"
INSTALL = "run make install" if REPOSITORY else "run pip install --upgrade staged-sft"
SECONDS = 3.0  # for a hub or a tracking server that keeps silent
KAGGLE = Path("/kaggle/working")
_ROOMY = 10 * 2**30  # free bytes: a merged base of 4 billion parameters has 8 GB
# Where Linux shows NVIDIA's driver and the first card.
DRIVER, DEVICE = Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0")
# The oldest driver for each generation of CUDA; wheels of torch 2.13 with the oldest driver they run with.
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_NEW_WHEEL, _OLD_WHEEL = "cu130", "cu126"
_WHEELS = {_NEW_WHEEL: 580, _OLD_WHEEL: 525}
# CUDA 13 has no kernels for cards before Turing, CUDA 12.6 none before Maxwell.
_TURING, _OLDEST_CARD = (7, 5), (5, 0)
_HEADERS = f"gcc python{sys.version_info.major}.{sys.version_info.minor}-dev"


class Finding(NamedTuple):
    """One row of the table."""

    name: str
    state: State
    found: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """The finding as one sentence."""
        return f"{self.name}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def check_machine(options: argparse.Namespace) -> None:
    """Prints the findings as a table, or with `--json` as a document.

    Raises:
        Problems: something is missing without which nothing can be trained.
    """
    if launched().rank != 0:
        return
    findings = examine(None)
    broken = [finding.text for finding in findings if finding.state == "broken"]
    if options.json:
        records = [finding._asdict() for finding in findings]
        print(json.dumps({"machine": records, "problems": broken}, ensure_ascii=False, indent=2))
    else:
        print(table(findings))
    if broken:
        raise Problems(broken)


def table(findings: list[Finding]) -> str:
    """One line per finding; a remedy stands on the line below."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name.ljust(width)}  {finding.state.ljust(7)}  {finding.found}")
        lines += [f"{'':{width}}           -> {finding.remedy}"] if finding.remedy else []
    return "\n".join(lines)


def examine(settings: Settings | None) -> list[Finding]:
    """Everything there is to find on this machine, for a stage or in general."""
    silence_libraries()
    outputs = settings.out_lora_dir.parent if settings else Path()
    uri = settings.mlflow_tracking_uri if settings else tracking_uri()
    tracked = settings is None or "mlflow" in settings.report_to
    return [
        python(sys.version_info[:3]),
        *libraries(),
        *devices(),
        disk(outputs),
        *kaggle(outputs),
        hub(),
        *([store(uri)] if tracked else []),
    ]


def python(version: tuple[int, ...]) -> Finding:
    """Python itself."""
    found = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(
            "Python", "broken", found, "Python 3.11 or newer is needed; " + INSTALL + " with PYTHON=python3.11"
        )
    return Finding("Python", "ok", found)


def pins(text: str) -> dict[str, str]:
    """{name: version} of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def libraries() -> Iterator[Finding]:
    """Installed versions against the pinned ones."""
    pinned = pins(PINS.read_text(encoding="utf-8")) if REPOSITORY else {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield library(name, metadata.version(name), pinned.get(name))
        except metadata.PackageNotFoundError:
            if name in NEEDED:
                yield Finding(name, "broken", "is not installed", INSTALL)
            else:
                yield Finding(name, "warning", "is not installed", OPTIONAL[name])


def library(name: str, installed: str, pinned: str | None) -> Finding:
    """A version that is not the pinned one was not tested; "+cu130" and the like are builds of the same version."""
    if pinned and installed.partition("+")[0] != pinned:
        return Finding(name, "warning", f"{installed}, tested with {pinned}", INSTALL)
    return Finding(name, "ok", installed)


def devices() -> Iterator[Finding]:
    """GPUs, their memory, what they need of this machine, number formats and ways to compute attention."""
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        driver = None if gpus_hidden() else gpu_driver()
        yield no_gpu(torch) if driver is None else unseen_gpu(torch, driver)
        yield Finding("attention", "ok", "sdpa, eager, flex_attention")
        return
    for number in range(torch.cuda.device_count()):
        yield gpu(torch, number)
    if missing := triton_missing():
        yield Finding("Triton", "broken", f"{' and '.join(missing)} not found", f"apt-get install {_HEADERS}")
    if find_spec("pynvml") is None:
        yield Finding("GPU metrics", "warning", "pynvml not found: MLflow has none", "pip install nvidia-ml-py")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bfloat16", "ok", "supported")
    else:
        yield Finding("bfloat16", "warning", "not supported", "SFT_DTYPE=auto does without it")
    paths = ["sdpa", "eager", "flex_attention", *(["flash_attention_2"] if find_spec("flash_attn") else [])]
    yield Finding("attention", "ok", ", ".join(paths))


def machine_problems(settings: Settings) -> list[str]:
    """What is wrong with this machine's libraries and GPUs, so that the stage can't be trained with them."""
    left_out = set() if "mlflow" in settings.report_to else {"mlflow"}
    broken = [finding for finding in (*libraries(), *devices()) if finding.state == "broken"]
    return [finding.text for finding in broken if finding.name not in left_out]


def gpu(torch: Any, number: int) -> Finding:
    """One GPU: whether this torch has kernels for it, and its memory."""
    card, capability = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
    if not has_kernels(capability, torch.cuda.get_arch_list()):
        version = ".".join(map(str, capability))
        found = f"{card} (compute capability {version}) has no kernels in torch {torch.__version__}"
        return Finding(f"GPU {number}", "broken", found, wheel_for(torch, capability))
    free, total = torch.cuda.mem_get_info(number)
    busy = free < 0.9 * total
    found = f"{card}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return Finding(
        f"GPU {number}", "warning" if busy else "ok", found, "another program uses it: see nvidia-smi" if busy else ""
    )


def wheel_for(torch: Any, capability: tuple[int, int]) -> str:
    """How to get a torch with kernels for the card."""
    if capability < _OLDEST_CARD:
        return "no wheel of this torch has them: train on another card"
    index = _OLD_WHEEL if capability < _TURING else _NEW_WHEEL
    return "take a newer torch" if index in torch.__version__ else install_torch(torch, index)


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether kernels for these architectures ("sm_80", "compute_120") run on the card: those of the same generation
    and not newer, or code that is compiled for any newer card when it is loaded."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = int(digits.rstrip("af"))
        built = divmod(number, 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not architectures


def no_gpu(torch: Any) -> Finding:
    """There is none, or the person has hidden it."""
    if torch.backends.mps.is_available():
        found = f"Apple's GPU (MPS) is left alone, nothing was tried on it: training runs on {os.cpu_count()} CPU cores"
        return Finding("GPU", "ok", found)
    why = " (hidden by CUDA_VISIBLE_DEVICES)" if gpus_hidden() else ""
    why = why or ("" if torch.version.cuda else " (this torch is built for the CPU alone)")
    return Finding("GPU", "ok", f"none{why}: training runs on {os.cpu_count()} CPU cores, in float32 by default")


def unseen_gpu(torch: Any, driver: str) -> Finding:
    """The machine has a GPU and torch does not see it: why, and which driver or wheel mends it."""
    version, cuda = tuple(int(part) for part in driver.split(".")[:1] if part), torch.version.cuda
    there = f"driver {driver}" if driver else "a GPU"
    if cuda is None:
        index = next((name for name, oldest in _WHEELS.items() if version >= (oldest,)), None)
        remedy = install_torch(torch, index) if index else f"update the driver to {_WHEELS[_NEW_WHEEL]} or newer"
        found = f"there is one ({there}), but torch {torch.__version__} is built for the CPU alone"
    elif version and version < (oldest := _OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0),):
        found = f"driver {driver} is too old for torch {torch.__version__} (CUDA {cuda} needs {oldest})"
        older = f", or {install_torch(torch, _OLD_WHEEL)}" if version >= (_WHEELS[_OLD_WHEEL],) else ""
        remedy = f"update the driver to {oldest} or newer{older}"
    else:
        found = f"there is one ({there}), but torch does not see it{cuda_fault(torch)}"
        remedy = "see nvidia-smi; a container must be started with --gpus all"
    return Finding("GPU", "broken", found, f"{remedy}; CUDA_VISIBLE_DEVICES= trains on the CPU all the same")


def install_torch(torch: Any, index: str) -> str:
    """The command that installs the same torch for another CUDA."""
    version = f"{torch.__version__.partition('+')[0]}+{index}"
    return f"pip install torch=={version} --index-url https://download.pytorch.org/whl/{index}"


def cuda_fault(torch: Any) -> str:
    """What CUDA says when it is asked for a device."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f": {str(error).splitlines()[0]}"
    return ""


def gpu_driver() -> str | None:
    """The version of the NVIDIA driver where this machine has a GPU, "" where it can't be told; None without a GPU."""
    for source in (_driver_file, _driver_of_nvidia_smi):
        if match := re.search(r"\b\d{3}\.\d[\d.]*", source()):
            return match[0]
    return "" if DEVICE.exists() else None


def _driver_file() -> str:
    return DRIVER.read_text(encoding="utf-8", errors="replace") if DRIVER.is_file() else ""


def _driver_of_nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20.0)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout if asked.returncode == 0 else ""


def disk(folder: Path) -> Finding:
    """Room where outputs go."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    name = f"disk at {there}"
    if not os.access(there, os.W_OK):
        return Finding(name, "broken", "not writable", "choose another SFT_OUT_LORA_DIR, or change its permissions")
    free = shutil.disk_usage(there).free
    found = f"{free / 2**30:.1f} GiB free"
    if free < _ROOMY:
        return Finding(name, "warning", found, "a merged model takes as much as the base model: free some space for it")
    return Finding(name, "ok", found)


def kaggle(outputs: Path) -> Iterator[Finding]:
    """On Kaggle only: whether what is written outlives the session."""
    if not KAGGLE.is_dir():
        return
    if outputs.absolute().is_relative_to(KAGGLE):
        yield Finding("Kaggle", "ok", f"what is below {KAGGLE} is kept as the notebook's output")
    else:
        text = f"{outputs.absolute()} is lost when the session ends"
        yield Finding("Kaggle", "warning", text, f"set SFT_OUT_LORA_DIR to a path below {KAGGLE}")


def hub() -> Finding:
    """Whether models and data sets can be fetched."""
    local = "use folders and files on this machine, or what is in the cache"
    if hub_is_off():
        return Finding("hub", "ok", f"switched off by HF_HUB_OFFLINE: {local}")
    fault = unreachable(hub_address())
    return Finding("hub", "warning", f"not reachable ({fault})", local) if fault else Finding("hub", "ok", "reachable")


def store(uri: str) -> Finding:
    """Where MLflow keeps runs."""
    shown, name = hide_secrets(uri), "MLflow store"
    kind = urlsplit(uri).scheme
    if kind in ("http", "https"):
        fault = unreachable(uri)
        remedy = "start the server, or leave MLFLOW_TRACKING_URI unset; training goes on without it"
        return Finding(name, "warning", f"{shown}: {fault}", remedy) if fault else Finding(name, "ok", shown)
    if kind == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if os.access(there, os.W_OK):
            return Finding(name, "ok", shown)
        return Finding(name, "warning", f"{shown}: {there} is not writable", "set MLFLOW_TRACKING_URI to another place")
    if kind in ("", "file"):
        remedy = "MLflow refuses file stores: MLFLOW_TRACKING_URI=sqlite:///path/mlflow.db"
        return Finding(name, "warning", shown, remedy)
    return Finding(name, "ok", shown)


def unreachable(address: str) -> str:
    """Why there is no answer from an address within a few seconds; "" when there is one, whatever it says."""
    fault = answer_within(SECONDS, lambda: _fault(address))
    return f"no answer in {SECONDS:.0f} s" if fault is None else fault


def _fault(address: str) -> str:
    try:
        with urlopen(Request(address, method="HEAD"), timeout=SECONDS):
            return ""
    except HTTPError:
        return ""
    except (URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__

"""`--check` without a stage: is this machine ready? Every finding is good or comes with a remedy."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Literal, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from sft.distributed.launch import launched
from sft.environment import hub_address, hub_is_off, silence_libraries
from sft.errors import Problems, hide_secrets
from sft.settings import Settings
from sft.settings.schema import tracking_uri

State = Literal["ok", "warning", "broken"]
NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "bitsandbytes", "mlflow")
OPTIONAL = ("deepspeed",)
PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
INSTALL = "run make install"
SECONDS = 3.0
_ROOMY, _CRAMPED = 10 * 2**30, 2**30
_AMPERE = (8, 0)


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
    pinned = pins(PINS.read_text(encoding="utf-8")) if PINS.is_file() else {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield library(name, metadata.version(name), pinned.get(name))
        except metadata.PackageNotFoundError:
            state: State = "broken" if name in NEEDED else "warning"
            yield Finding(name, state, "is not installed", INSTALL)


def library(name: str, installed: str, pinned: str | None) -> Finding:
    """A version that is not the pinned one was not tested; "+cu130" and the like are builds of the same version."""
    if pinned and installed.partition("+")[0] != pinned:
        return Finding(name, "warning", f"{installed}, tested with {pinned}", INSTALL)
    return Finding(name, "ok", installed)


def devices() -> Iterator[Finding]:
    """GPUs, their memory, bfloat16 and ways to compute attention."""
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this torch is built for the CPU alone)"
        yield Finding("GPU", "ok", f"none{built}: training runs on {os.cpu_count()} CPU cores, in float32 by default")
        yield Finding("attention", "ok", "sdpa, eager, flex_attention")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found = f"{torch.cuda.get_device_name(number)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        busy = free < 0.9 * total
        remedy = "another program uses it: see nvidia-smi" if busy else ""
        yield Finding(f"GPU {number}", "warning" if busy else "ok", found, remedy)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bfloat16", "ok", "supported")
    else:
        yield Finding("bfloat16", "warning", "not supported", "SFT_DTYPE=float32, or float16 with a low SFT_LR")
    paths = ["sdpa", "eager", "flex_attention", *(["flash_attention_2"] if find_spec("flash_attn") else [])]
    if torch.cuda.get_device_capability() >= _AMPERE and find_spec("torch.nn.attention.varlen"):
        paths.append("varlen")
    yield Finding("attention", "ok", ", ".join(paths))


def disk(folder: Path) -> Finding:
    """Room where outputs go."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    name = f"disk at {there}"
    if not os.access(there, os.W_OK):
        return Finding(name, "broken", "not writable", "choose another SFT_OUT_LORA_DIR, or change its permissions")
    free = shutil.disk_usage(there).free
    found = f"{free / 2**30:.1f} GiB free"
    if free < _CRAMPED:
        return Finding(name, "broken", found, "free some space: checkpoints and merged models need it")
    if free < _ROOMY:
        return Finding(name, "warning", found, "a merged model takes as much as the base model: free some space for it")
    return Finding(name, "ok", found)


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
    answers: list[str] = []
    # A name server that keeps silent takes no notice of a time limit; a thread can be left behind.
    asking = Thread(target=lambda: answers.append(_fault(address)), daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answers[0] if answers else f"no answer in {SECONDS:.0f} s"


def _fault(address: str) -> str:
    try:
        with urlopen(Request(address, method="HEAD"), timeout=SECONDS):
            return ""
    except HTTPError:
        return ""
    except (URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__

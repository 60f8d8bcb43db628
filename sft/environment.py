"""The process around a run: quiet libraries, and whether the hub can be reached (found out at once)."""

import gc
import importlib
import importlib.metadata
import logging
import os
import shutil
import socket
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from threading import RLock, Thread
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from packaging.requirements import Requirement

from sft.distributed.launch import launched
from sft.heap import return_freed_memory

# Where the package's bounds are wider than what was run: pip shall not replace the torch of a notebook service.
TRIED = ("torch>=2.11,<2.15",)
Answer = TypeVar("Answer")
_all_distributions = importlib.metadata.packages_distributions

# A name server that knows a name says so within this time.
_NAME_SECONDS = 5.0


@contextmanager
def restored_variable(name: str) -> Iterator[None]:
    """The environment variable is afterwards what it was, whatever a library writes there meanwhile."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def silence_libraries() -> None:
    """Call before torch's companions are imported. What the user has set in the environment stays as it is."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "BITSANDBYTES_NOWELCOME": "1",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    }.items():
        os.environ.setdefault(name, value)
    # Threads that wait give their core away after a moment. Spinning as long as OpenMP does by itself, two threads on
    # two busy cores took 20 times as long; not at all costs 40 % on idle ones (docs/log.md). Read as torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Every micro-batch has another length: blocks that can grow leave no holes. torch reads it when it is imported.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT looks for its own rank patterns of fused experts among modules, where they are parameters.
    warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|transformers|peft|trl|bitsandbytes|accelerate)"
    )
    for name in ("DeepSpeed", "bitsandbytes", "mlflow", "alembic", "accelerate", "torch.distributed", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    defer("bitsandbytes")  # PEFT imports it whatever the model; 0.7 s, and Inductor with it
    if not launched().deepspeed:  # accelerate asks of every model whether it is DeepSpeed's; 1.2 s
        defer("deepspeed", DeepSpeedEngine=type("DeepSpeedEngine", (), {}))


class Deferred(ModuleType):
    """A package that libraries import in case they need it: it is loaded when something of it is first used."""

    _loading = RLock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__version__", "__all__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with self._loading:
            if type(self) is Deferred:
                assert self.__spec__ is not None and self.__spec__.loader is not None
                kind: Any = self
                kind.__class__ = ModuleType
                with ExitStack() as failed:  # whoever asks again is told why as well
                    failed.callback(setattr, self, "__class__", Deferred)
                    self.__spec__.loader.exec_module(self)
                    failed.pop_all()
        return getattr(self, name)


def defer(name: str, **known: Any) -> None:
    """Where the package is installed and not loaded yet, `import name` costs nothing until something other than what is
    `known` is asked of it."""
    spec = find_spec(name) if name not in sys.modules else None
    if spec is not None:
        module = sys.modules[name] = module_from_spec(spec)
        vars(module).update(known)
        module.__class__ = Deferred


class Distributions(dict[str, list[str]]):
    """importlib.metadata.packages_distributions as far as it is asked for: it reads the list of files of every package
    there is, and most are distributed under the name they are imported by."""

    def __missing__(self, name: str) -> list[str]:
        self.update({name: [name]} if installed(name) else _all_distributions())
        if name not in self:
            raise KeyError(name)
        return self[name]


@contextmanager
def uncollected() -> Iterator[None]:
    """For the first import of the libraries: nearly all it makes is there to stay, and looking through it for garbage
    again and again takes a quarter of its time (docs/log.md). Afterwards it is left out of every search."""
    if "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def silence_torch() -> None:
    """Call after torch and before accelerate: deepspeed would announce the accelerator it found."""
    import torch

    # TRL has a list made of all packages installed, 0.3 s, for the versions of two.
    vars(importlib.metadata).update(packages_distributions=Distributions)
    try:
        importlib.import_module("trl")
    finally:
        vars(importlib.metadata).update(packages_distributions=_all_distributions)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return_freed_memory()
    # accelerate launch gives each process one thread, also beside a GPU, where an off-loaded optimizer then runs on
    # one core: share the cores instead.
    if (launch := launched()).processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_processes))


def gpus_hidden() -> bool:
    """Whether the person has hidden all GPUs from this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def triton_missing() -> list[str]:
    """What Triton lacks to build its launcher when a kernel first runs: [] where it can."""
    compilers = [os.environ.get("CC", ""), "gcc", "clang"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    there = {
        "the package triton": find_spec("triton") is not None,
        "a C compiler": any(shutil.which(name) for name in compilers if name),
        "Python.h": headers.is_file(),
    }
    return [name for name, found in there.items() if not found]


def offline_unless_reachable() -> bool:
    """Tell the hub's client to use only its cache where the hub's name can't be resolved; True when it was told.

    Call it before the first import of huggingface_hub, transformers or datasets: they read the choice once.
    """
    host = urlsplit(hub_address()).hostname or "huggingface.co"
    # Behind a proxy, names are resolved by the proxy.
    if "HF_HUB_OFFLINE" in os.environ or getproxies().get("https") or _resolves(host):
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    return True


def required() -> list[str]:
    """What this package asks for, as its metadata has it, and what was tried of it; [] where it is not installed."""
    try:
        return [*(importlib.metadata.requires("staged-sft") or []), *TRIED]
    except importlib.metadata.PackageNotFoundError:
        return []


def installed(name: str) -> str | None:
    """The version of a package; None where it is missing, which the import of it will say."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def untested_versions(requirements: Iterable[str], version_of: Callable[[str], str | None] = installed) -> str:
    """One line about installed packages outside the bounds of these requirements, of which the last about a package
    counts; "" where there is none.

    Overrides of a library's private methods are dead where it has renamed them, and nothing else would say so.
    """
    asked = {each.name: each for each in map(Requirement, requirements) if each.marker is None}
    found = [
        f"{each.name} {version} (tested: {each.specifier})"
        for each in asked.values()
        if (version := version_of(each.name)) and not each.specifier.contains(version, True)
    ]
    remedy = "make install, or pip install -c constraints.txt ., installs tested ones"
    return f"[WARNING] Untested versions: {', '.join(found)}; {remedy}" if found else ""


def hub_address() -> str:
    """The hub, or the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_is_off() -> bool:
    """Whether the person has switched it off."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def answer_within(seconds: float, ask: Callable[[], Answer]) -> Answer | None:
    """None where nothing comes in time. A name server that keeps silent takes no notice of a time limit: a thread can
    be left behind."""
    answers: list[Answer] = []
    asking = Thread(target=lambda: answers.append(ask()), daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


def _resolves(host: str) -> bool:
    return bool(answer_within(_NAME_SECONDS, lambda: _has_address(host)))


def _has_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def person_language() -> str:
    """The language of the person at this terminal, as far as pages are written in it: "ja" or "en"."""
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    locale = next((value for name in names if (value := os.environ.get(name))), "")
    return "ja" if locale.lower().startswith("ja") else "en"

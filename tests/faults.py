"""A three-stage ladder of seconds, run in forked children that can be killed, and what must be equal at its end.

Forking saves each run the import of torch and its companions (8 s): hundreds of kills fit into an hour.
"""

import errno
import hashlib
import json
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file

import sft.run  # noqa: F401 - imported here so that children find it loaded
import train
from sft import cli
from sft.stages import checkpoints
from tests.tiny import write_model, write_rows, write_stage

# Threads that encode texts do not survive a fork.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
PHASES = ("start", "data", "merge", "load", "training", "saving", "finish")
NOT_COMPARED = {"time", "tokens_per_second"}


def write_ladder(folder: Path, *, report_to: str = "none") -> Path:
    """Three stages that between them use dropout, packing, masked loss, workers, NEFTune, accumulation remainders,
    fractional epochs, more than one epoch, early stopping, and rhythms of evaluation and saving that don't meet."""
    base = write_model(folder / "base")
    rows_json, rows_yaml = write_rows(folder / "json.jsonl", 48), write_rows(folder / "yaml.jsonl", 30, target="yaml")
    mix = [{"id": str(rows_json), "weight": 1.0}, {"id": str(rows_yaml), "weight": 2.0}]
    common = {
        "SFT_BASE_MODEL": base, "SFT_OUT_LORA_DIR": folder / "out", "SFT_LORA_DROPOUT": 0.1,
        "SFT_GEN_EVAL": "structured", "SFT_GEN_EVAL_SAMPLES": 3, "SFT_GEN_MAX_NEW_TOKENS": 6,
        "SFT_NUM_GENERATE_SAMPLES": 0, "SFT_REPORT_TO": report_to, "SFT_NUM_PROC": 1,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlruns/mlflow.db",
    }  # fmt: skip
    write_stage(folder, 1, common | {
        "SFT_DATASET_ID": rows_json, "SFT_EPOCHS": 1.5, "SFT_PER_DEVICE_TRAIN_BS": 2, "SFT_GRAD_ACCUM": 3,
        "SFT_MASKED_LOSS": "inverse_frequency", "SFT_MASKED_LOSS_UNIT": "json_edge",
        "SFT_EVAL_STEPS": 5, "SFT_SAVE_STEPS": 2, "SFT_LOGGING_STEPS": 3,
    })  # fmt: skip
    write_stage(folder, 2, common | {
        "SFT_DATASET_MIX": json.dumps(mix), "SFT_EPOCHS": 4, "SFT_PER_DEVICE_TRAIN_BS": 1, "SFT_GRAD_ACCUM": 2,
        "SFT_PACKING": 1, "SFT_DATALOADER_WORKERS": 2, "SFT_EARLY_STOPPING_PATIENCE": 2,
        "SFT_METRIC_FOR_BEST": "gen_score",  # always 0 here: the third evaluation, at step 9, is the last
        "SFT_EVAL_STEPS": 3, "SFT_SAVE_STEPS": 3, "SFT_LOGGING_STEPS": 2,
    })  # fmt: skip
    write_stage(folder, 3, common | {
        "SFT_DATASET_ID": rows_yaml, "SFT_EPOCHS": 2, "SFT_PER_DEVICE_TRAIN_BS": 2, "SFT_GRAD_ACCUM": 2,
        "SFT_GROUP_BY_LENGTH": 1, "SFT_NEFTUNE_NOISE_ALPHA": 5, "SFT_METRIC_FOR_BEST": "eval_perplexity",
        "SFT_EVAL_STEPS": 4, "SFT_SAVE_STEPS": 5, "SFT_LOGGING_STEPS": 2,
    })  # fmt: skip
    return folder


@dataclass
class Run:
    """A run in a child with a session of its own, all it prints going to `log`."""

    pid: int
    log: Path
    started: float

    def wait(self, seconds: float) -> int | None:
        """Its exit code (negative: the signal that killed it), None if it goes on."""
        end = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= end:
                return None
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def cpu_seconds(self) -> float:
        """What it has used of the processor: the same on an idle and on a busy machine. Only until it is waited for."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_over(self) -> bool:
        """Whether it has ended; it is still to be waited for."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def orphans(self) -> list[int]:
        """Processes of its session, zombies left out."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH):
                    raise
                continue
            if int(fields[3]) == self.pid and fields[0] != "Z" and int(stat.parent.name) != self.pid:
                found.append(int(stat.parent.name))
        return found


def start(arguments: Sequence[object], log: Path, *, prepare: Callable[[], object] = lambda: None) -> Run:
    """train.py with these arguments in a forked child. `prepare` is called in the child first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child([str(argument) for argument in arguments], log, prepare)
    return Run(pid, log, time.monotonic())


def _child(arguments: list[str], log: Path, prepare: Callable[[], object]) -> None:
    code = 99
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - pytest has replaced them
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.argv = ["train.py", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        prepare()
        code = cli.command_line(train.main, arguments)
        # What the end of an interpreter waits for: threads that are no daemons, children.
        threading._shutdown()
        multiprocessing.util._exit_function()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def own_cache(folder: Path) -> Callable[[], object]:
    """Prepared rows of this run only."""
    return lambda: setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")


def ladder_arguments(inputs: Path, out: Path, *more: object) -> list[object]:
    return ["--stage", "all", "--env-dir", inputs, "--set", f"SFT_OUT_LORA_DIR={out / 'out'}", *more]


def phase(text: str, out: Path) -> str:
    """What a run was doing, by what it had printed last and what lies in its folder."""
    _, begun, last = text.rpartition("Checking checkpoint status...")
    if not begun or "is complete:" in last or "IMPORTANT NOTICE" in last:
        return "start"
    if "Rows:" not in last:
        return "data"
    if "Merging earlier" in last and "Merged " not in last:
        return "merge"
    if "Training " not in last:
        return "load"
    if list(out.glob("out_stage*/.saving/*")):
        return "saving"
    steps = [line for line in last.splitlines() if line.startswith("step ")]
    now, _, total = (steps[-1].split()[1] if steps else "0/1").partition("/")
    ended = "Stopping early" in last or (now == total and "evaluation" in steps[-1])
    return "finish" if ended else "training"


def digest(path: Path, out: Path | None = None) -> str:
    """Of a file's content: of safetensors the tensors, of JSON what does not name the output folder."""
    content = path.read_bytes()
    if path.name == "probe.safetensors":
        content = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(load_file(path).items()))
    return hashlib.sha256(content.replace(str(out).encode(), b"OUT")).hexdigest()[:16]


def end_state(out: Path, stages: Sequence[int] = (1, 2, 3)) -> dict[str, object]:
    """Everything that must not depend on how often a ladder was killed, by name."""
    state: dict[str, object] = {}
    for number in stages:
        folder = out / f"out_stage{number}"
        manifest = json.loads((folder / "stage.json").read_text())
        state |= {f"{number} {name}": manifest[name] for name in ("status", "steps", "metrics", "tokens", "forgetting")}
        state[f"{number} metrics"] = metric_history(folder)
        state |= {f"{number} {name}": digest(folder / name, out) for name in sorted(result_files(folder))}
        checkpoint = checkpoints.find(folder)[0].folder
        state[f"{number} last checkpoint"] = checkpoint.name
        names = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")
        state |= {f"{number} {checkpoint.name}/{name}": digest(checkpoint / name) for name in names}
        merged = out / f"out_stage{number}_merged_base" / "model.safetensors"
        state[f"{number} merged base"] = digest(merged) if merged.exists() else None
        state[f"{number} leftovers"] = [str(path) for path in out.rglob("*") if is_leftover(path)]
    return state


def result_files(folder: Path) -> list[str]:
    best = [f"best_model/{path.name}" for path in (folder / "best_model").iterdir()]
    generated = [path.name for path in folder.glob("gen_*")]
    return [
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "probe.safetensors",
        *generated,
        *best,
    ]


def is_leftover(path: Path) -> bool:
    return ".partial-" in path.name or ".replaced-" in path.name or path.name in (".saving", ".result")


def metric_history(folder: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in NOT_COMPARED} for record in records]


def differences(first: dict[str, object], second: dict[str, object]) -> list[str]:
    """Names whose values differ; "1 metrics" contains tokens_per_second in the manifest, which is not compared."""

    def plain(value: object) -> object:
        return {k: v for k, v in value.items() if k not in NOT_COMPARED} if isinstance(value, dict) else value

    return [name for name in sorted(first.keys() | second.keys()) if plain(first.get(name)) != plain(second.get(name))]

"""Every name below and beside OUT_stageN. No other file spells one."""

import re
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft.settings import Settings

# In OUT_stageN.
MANIFEST = "stage.json"
METRICS = "metrics.jsonl"
TRAINING_CONFIG = "training_config.json"
PROBE = "probe.safetensors"
QUESTIONS, HELD_OUT = "gen_rows.jsonl", "held_out.json"
EARLIER_SCORES, GENERAL = "earlier_scores.json", "general.json"
REPORT, REPORT_FACTS = "report.html", "report.json"
OPEN_RUN = ".mlflow_run.json"  # as long as an MLflow run of the stage has not been ended
BEST_MODEL, BEST_RECORD = "best_model", "best_model_info.json"
GEN_METRICS, GEN_SAMPLES = "gen_metrics_step", "gen_samples_step"
# Answers of this stage's model to an earlier stage's questions, and of an earlier stage's model to this one's.
SAMPLES_OF_STAGE, SAMPLES_BY_STAGE = "gen_samples_of_stage", "gen_samples_by_stage"
ERROR_LOGS = "error*.log"
# In a checkpoint: what the Trainer saves of itself, and what the run's own counters were.
TRAINER_STATE, RHYTHM = "trainer_state.json", "rhythm.json"
# In OUT_stageN_merged_base and in an export.
MERGE_RECORD = "merge.json"
# PEFT's and transformers' own.
ADAPTER, ADAPTER_CONFIG, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
MODEL_CONFIG = "config.json"

ROW_LOSSES = "row_losses.json"  # of a variant: its last loss on every validation row

# Between OUT_stageN and a variant's name; what a folder is called that was moved aside or is half removed.
_TRY = ".try-"
_SET_ASIDE = re.compile(r"\.(old|broken)-\d{8}T|\.(partial|replaced)-\d+$")

SEALED = (
    *("adapter_", "model", MODEL_CONFIG, "tokenizer", TRAINING_CONFIG, f"{BEST_MODEL}/", "gen_", HELD_OUT, "metrics."),
)
"""How the names of a completed stage's files begin that are sealed: what later stages and people rely on."""


def stage_folder(out_lora_dir: Path, number: int) -> Path:
    """OUT_stageN."""
    return Path(f"{out_lora_dir}_stage{number}")


def variant_folder(folder: Path, name: str) -> Path:
    """OUT_stageN.try-NAME, beside OUT_stageN."""
    return folder.with_name(f"{folder.name}{_TRY}{name}")


def own_folder(settings: "Settings") -> Path:
    """Where a stage, or the variant of it that these settings are, is written."""
    stage = stage_folder(settings.out_lora_dir, settings.stage)
    return variant_folder(stage, settings.variant) if settings.variant else stage


def stage_name(folder: Path) -> str:
    """The name of OUT_stageN, also for one of its variants."""
    return folder.name.partition(_TRY)[0]


def variants_of(folder: Path) -> dict[str, Path]:
    """Name and folder of every variant beside OUT_stageN; not what was moved aside or is being removed."""
    start = f"{folder.name}{_TRY}"
    found = {path.name.removeprefix(start): path for path in folder.parent.glob(f"{escape(start)}*") if path.is_dir()}
    return {name: path for name, path in sorted(found.items()) if not _SET_ASIDE.search(name)}


def variants_report(folder: Path) -> Path:
    """OUT_stageN.tries.html, which lays the variants of a stage beside each other."""
    return folder.with_name(f"{folder.name}.tries.html")


def sibling_stage(folder: Path, number: int, other: int) -> Path | None:
    """OUT_stageK beside the folder OUT_stageN, whose end alone is looked at; None where it was renamed."""
    stem, found, _ = stage_name(folder).rpartition(f"_stage{number}")
    return folder.with_name(f"{stem}_stage{other}") if found else None


def merged_base(folder: Path) -> Path:
    """OUT_stageN_merged_base, beside OUT_stageN."""
    return folder.with_name(f"{folder.name}_merged_base")


def lock_path(folder: Path) -> Path:
    """The lock stands beside the output, so that the output can be moved aside while it is held."""
    return folder.with_name(f"{folder.name}.lock")


def checkpoint_name(step: int) -> str:
    """checkpoint-<step>."""
    return f"checkpoint-{step}"


def error_log(rank: int) -> str:
    """error.log, or error.rank<k>.log of a process beside the main one."""
    return f"error.rank{rank}.log" if rank else "error.log"

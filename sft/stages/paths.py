"""Every name below and beside OUT_stageN. No other file spells one."""

from pathlib import Path

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
ERROR_LOGS = "error*.log"
# In a checkpoint: what the Trainer saves of itself, and what the run's own counters were.
TRAINER_STATE, RHYTHM = "trainer_state.json", "rhythm.json"
# In OUT_stageN_merged_base and in an export.
MERGE_RECORD = "merge.json"
# PEFT's and transformers' own.
ADAPTER, ADAPTER_CONFIG, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
MODEL_CONFIG = "config.json"

SEALED = (
    *("adapter_", "model", MODEL_CONFIG, "tokenizer", TRAINING_CONFIG, f"{BEST_MODEL}/", "gen_", HELD_OUT, "metrics."),
)
"""How the names of a completed stage's files begin that are sealed: what later stages and people rely on."""


def stage_folder(out_lora_dir: Path, number: int) -> Path:
    """OUT_stageN."""
    return Path(f"{out_lora_dir}_stage{number}")


def sibling_stage(folder: Path, number: int, other: int) -> Path | None:
    """OUT_stageK beside the folder OUT_stageN, whose end alone is looked at; None where it was renamed."""
    stem, found, _ = folder.name.rpartition(f"_stage{number}")
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

"""Rules that join several settings, or a setting and what is on the disk; which settings cannot change a result."""

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sft.scoring.metrics import EXTRACTION_METRICS, SCHEMA_METRICS, STRUCTURED_METRICS, metric_direction
from sft.scoring.metrics import NAMES as METRICS
from sft.scoring.own import parts_of
from sft.settings.values import is_there, one_of

NO_FOLDER = "there is no such folder; correct the path, or give a hub id such as org/model"
# Schedulers with a lowest rate, and what transformers calls it; a plain cosine becomes the first.
FLOORS = {
    "cosine_with_min_lr": "min_lr_rate",
    "cosine_warmup_with_min_lr": "min_lr_rate",
    "warmup_stable_decay": "min_lr_ratio",
}
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")

RESULT_NEUTRAL = frozenset({
    "SFT_OUT_LORA_DIR", "SFT_STRICT", "SFT_NUM_PROC", "SFT_DATALOADER_WORKERS", "SFT_GRADIENT_CHECKPOINTING",
    "SFT_PER_DEVICE_EVAL_BS", "SFT_LOGGING_STEPS", "SFT_SAVE_STEPS", "SFT_SAVE_TOTAL_LIMIT", "SFT_GEN_BATCH_SIZE",
    "SFT_NUM_GENERATE_SAMPLES", "SFT_GENERAL_EVAL", "SFT_FORGETTING_MARGIN", "SFT_GATE", "SFT_REPORT_TO",
    "SFT_MICRO_BATCH_TOKENS", "SFT_REPORT_LANGUAGE", "SFT_RUN_NAME", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI",
    "SFT_MIRROR",
})  # fmt: skip
"""Settings that cannot change what a stage learns; a completed or resumed stage does not mind their change."""
_EVALUATING = frozenset({
    "SFT_METRIC_FOR_BEST", "SFT_EVAL_STEPS", "SFT_GEN_EVAL", "SFT_GEN_EVAL_SAMPLES", "SFT_GEN_MAX_NEW_TOKENS",
    "SFT_EXTRACTION_FIELDS", "SFT_JSON_SCHEMA", "SFT_GENERAL_EVAL",
})  # fmt: skip


def resume_neutral(*starts: Mapping[str, Any]) -> frozenset[str]:
    """Settings that a stage may be given anew when it goes on, beside those that never matter.

    They only choose what is evaluated; that reaches the weights where an evaluation ends training or lowers the rate.
    `starts`: the values by name as the manifest records them, of then and of now.
    """
    for start in starts:
        patience, scheduler = start.get("SFT_EARLY_STOPPING_PATIENCE"), start.get("SFT_LR_SCHEDULER")
        if (isinstance(patience, int) and patience > 0) or scheduler in BY_EVALUATION:
            return frozenset()
    return _EVALUATING


class Conflict(NamedTuple):
    """Settings that do not go together: the one to name first, all involved, and what to do."""

    names: tuple[str, ...]
    text: str
    absence: bool = False
    """Whether something is missing, which goes without saying where the env file itself is."""


def conflicts(settings: Any) -> Iterator[Conflict]:
    """Every rule that joins several settings, or a setting and what is on the disk."""
    for rule in (_data_rules, _weight_rules, _training_rules, _evaluation_rules, _metric_rule):
        yield from rule(settings)
    yield from _output_rules(settings.out_lora_dir, settings.stage)
    yield from _base_model_rules(settings.base_model)


def _data_rules(settings: Any) -> Iterator[Conflict]:
    if not settings.dataset_mix and not settings.dataset_id:
        yield Conflict(
            ("SFT_DATASET_ID", "SFT_DATASET_MIX"),
            "is not set, nor is SFT_DATASET_MIX; name the data set to train on in one of them",
            absence=True,
        )
    if settings.use_upsampling and not settings.upsample_rules:
        yield Conflict(
            ("SFT_USE_UPSAMPLING", "SFT_UPSAMPLE_RULES"),
            """there are no rules; write SFT_UPSAMPLE_RULES='{"text_to_toml": 3.0}', or set SFT_USE_UPSAMPLING=0""",
        )
    if settings.replay and settings.stage == 1:
        yield Conflict(("SFT_REPLAY",), "stage 1 has no earlier stage whose rows could come again; leave it out here")
    if settings.group_by_length and settings.shuffle != "mix":
        text = f"SFT_SHUFFLE={settings.shuffle} keeps an order that grouping by length would undo; drop one of them"
        yield Conflict(("SFT_GROUP_BY_LENGTH", "SFT_SHUFFLE"), text)


def _weight_rules(settings: Any) -> Iterator[Conflict]:
    if len(settings.quantised) > 1:
        yield Conflict(settings.quantised, f"{settings.quantised[-1]} is on as well; keep one of them")
    for name in settings.quantised:
        if not settings.use_lora:
            text = "quantised weights cannot be trained themselves; set SFT_USE_LORA=1, or do not quantise"
            yield Conflict((name, "SFT_USE_LORA"), text)
        if find_spec("bitsandbytes") is None:
            yield Conflict((name,), "bitsandbytes is not installed; pip install bitsandbytes, or do not quantise")
    if settings.lora_modules_to_save and not settings.use_lora:
        text = "SFT_USE_LORA=0 trains every module in full; leave it out, or set SFT_USE_LORA=1"
        yield Conflict(("SFT_LORA_MODULES_TO_SAVE", "SFT_USE_LORA"), text)
    if settings.dtype == "float16" and not settings.use_lora:
        text = "weights trained themselves overflow in float16; take bfloat16 or float32, or set SFT_USE_LORA=1"
        yield Conflict(("SFT_DTYPE", "SFT_USE_LORA"), text)


def _training_rules(settings: Any) -> Iterator[Conflict]:
    if settings.epochs == 0 and settings.max_steps < 0:
        yield Conflict(("SFT_EPOCHS", "SFT_MAX_STEPS"), "nothing would be trained; give more than 0, or SFT_MAX_STEPS")
    if settings.min_lr_ratio > 0 and settings.lr_scheduler not in {"cosine", *FLOORS}:
        text = f"SFT_LR_SCHEDULER={settings.lr_scheduler} has no lowest rate; take cosine, or leave the ratio out"
        yield Conflict(("SFT_MIN_LR_RATIO", "SFT_LR_SCHEDULER"), text)


def _evaluation_rules(settings: Any) -> Iterator[Conflict]:
    if settings.gate and settings.gen_eval in ("none", "samples") and not settings.general_eval:
        text = f"there is nothing to compare: SFT_GEN_EVAL={settings.gen_eval} scores no answers and SFT_GENERAL_EVAL=0"
        remedy = "set SFT_GEN_EVAL=structured or another that scores, or SFT_GENERAL_EVAL=1"
        yield Conflict(("SFT_GATE", "SFT_GEN_EVAL", "SFT_GENERAL_EVAL"), f"{text} asks no questions; {remedy}")
    if settings.json_schema and settings.gen_eval == "none":
        text = "no answers are generated that could be held to it; set SFT_GEN_EVAL=samples or another, or leave it out"
        yield Conflict(("SFT_JSON_SCHEMA", "SFT_GEN_EVAL"), text)
    if settings.val_ratio > 0 or settings.eval_dataset:
        return
    remedy = "set SFT_VAL_RATIO above 0, or SFT_EVAL_DATASET"
    if settings.gen_eval != "none" and not settings.gen_eval_dataset:
        text = f"there are no rows to generate answers for; {remedy}, or SFT_GEN_EVAL_DATASET"
        yield Conflict(("SFT_GEN_EVAL", "SFT_VAL_RATIO", "SFT_EVAL_DATASET", "SFT_GEN_EVAL_DATASET"), text)
    if settings.lr_scheduler in BY_EVALUATION:
        text = f"{settings.lr_scheduler} goes by the loss on validation rows; {remedy}"
        yield Conflict(("SFT_LR_SCHEDULER", "SFT_VAL_RATIO", "SFT_EVAL_DATASET"), text)
    if settings.early_stopping_patience > 0 and not settings.gen_eval_dataset:
        text = f"early stopping needs validation rows; {remedy}"
        yield Conflict(("SFT_EARLY_STOPPING_PATIENCE", "SFT_VAL_RATIO", "SFT_EVAL_DATASET"), text)


def _metric_rule(settings: Any) -> Iterator[Conflict]:
    names = ("SFT_METRIC_FOR_BEST", "SFT_GEN_EVAL")
    plain = settings.metric_for_best.removeprefix("eval_").split("/")[0]
    own = parts_of(settings.gen_eval) is not None
    try:
        metric_direction(settings.metric_for_best, () if own else None)  # which way is asked where the file may be run
    except ValueError:
        yield Conflict(names[:1], one_of(settings.metric_for_best, ("eval_loss", *METRICS)))
        return
    for mode, metrics in (("structured", STRUCTURED_METRICS), ("extraction", EXTRACTION_METRICS)):
        if plain in metrics and settings.gen_eval != mode and not own:
            yield Conflict(names, f"is computed only with SFT_GEN_EVAL={mode}; set that, or take eval_loss")
    if plain in SCHEMA_METRICS and not settings.json_schema and not own:
        names = ("SFT_METRIC_FOR_BEST", "SFT_JSON_SCHEMA")
        yield Conflict(names, "is computed only with SFT_JSON_SCHEMA; set that, or take eval_loss")


def _output_rules(out: Path, stage: int) -> Iterator[Conflict]:
    folder = out.with_name(f"{out.name}_stage{stage}")
    there = [path for path in (folder, *folder.absolute().parents) if is_there(path)]
    blocking = [path for path in (out, *there) if is_there(path) and not path.is_dir()]
    if blocking:
        yield Conflict(("SFT_OUT_LORA_DIR",), f"{blocking[0]} is a file; choose a path where folders can be made")
    elif there[0] != folder and not os.access(there[0], os.W_OK):
        text = f"{there[0]} is not writable; choose another path or change its permissions"
        yield Conflict(("SFT_OUT_LORA_DIR",), text)


def _base_model_rules(base_model: str) -> Iterator[Conflict]:
    path, names = Path(base_model), ("SFT_BASE_MODEL",)
    if is_there(path) and not path.is_dir():
        yield Conflict(names, "is a file; name the folder of a model, or a hub id")
    elif is_there(path):
        if not is_there(path / "config.json"):
            adapter = is_there(path / "adapter_config.json")
            what = "is an adapter, no model" if adapter else "is no model folder: config.json is missing"
            yield Conflict(names, f"{what}; name the folder or hub id of a base model")
    elif is_missing_folder(base_model):
        yield Conflict(names, NO_FOLDER)


def warmup_remark(settings: Any, steps: int) -> str:
    """What to say where the rate never gets to SFT_LR; "" where it does."""
    if settings.warmup_steps < steps:
        return ""
    return (
        f"[WARNING] SFT_WARMUP_STEPS={settings.warmup_steps}: there are only {steps} steps, so the learning rate never "
        f"reaches SFT_LR; set less, or SFT_WARMUP_STEPS=0 with SFT_WARMUP_RATIO={settings.warmup_ratio:g}"
    )


def is_missing_folder(model: str) -> bool:
    """Whether a model's name can only be a path, and nothing is there."""
    return (model.startswith(("/", ".")) or model.count("/") > 1) and not is_there(Path(model))

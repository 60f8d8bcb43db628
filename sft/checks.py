"""What is wrong with settings: pydantic's errors in words, and rules that join several settings."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from sft.env import Place, closest, shown
from sft.values import NotJson, one_of

STRUCTURED_METRICS = (
    "gen_parse_rate",
    "gen_only_rate",
    "gen_key_rate",
    "gen_value_rate",
    "gen_exact_rate",
    "gen_score",
)
EXTRACTION_METRICS = (
    "gen_json_parse_rate", "gen_schema_ok_rate", "gen_offender_presence_precision", "gen_offender_presence_recall",
    "gen_offender_presence_f1", "gen_fp_rate_on_negative", "gen_offender_name_set_f1", "gen_field_exact_match_rate",
    "gen_all_fields_exact_match_rate",
)  # fmt: skip
LOSS_METRICS = ("loss", "perplexity")
_LOWER_IS_BETTER = {"loss", "perplexity", "gen_fp_rate_on_negative"}

RESULT_NEUTRAL = frozenset({
    "SFT_OUT_LORA_DIR", "SFT_STRICT", "SFT_NUM_PROC", "SFT_DATALOADER_WORKERS", "SFT_GRADIENT_CHECKPOINTING",
    "SFT_PER_DEVICE_EVAL_BS", "SFT_LOGGING_STEPS", "SFT_SAVE_STEPS", "SFT_SAVE_TOTAL_LIMIT", "SFT_GEN_BATCH_SIZE",
    "SFT_NUM_GENERATE_SAMPLES", "SFT_FORGETTING_MARGIN", "SFT_REPORT_TO", "SFT_RUN_NAME", "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_URI",
})  # fmt: skip
"""Settings that cannot change what a stage learns; a completed or resumed stage does not mind their change."""


def metric_direction(name: str) -> bool:
    """Whether greater is better for a metric we log, with or without "eval_" and a "/part"; ValueError if unknown."""
    plain = name.removeprefix("eval_").split("/")[0]
    known = (*LOSS_METRICS, *STRUCTURED_METRICS, *EXTRACTION_METRICS)
    if plain not in known or (plain != name.removeprefix("eval_") and not plain.startswith("gen_")):
        raise ValueError(one_of(name, ("eval_loss", *known)))
    return plain not in _LOWER_IS_BETTER


def explain(error: Mapping[str, Any], *, name: str, field: Any, place: Place, given: str) -> str:
    """One pydantic error as "NAME=value: what is wrong; remedy"."""
    context, kind = error.get("ctx", {}), error["type"]
    if isinstance(context.get("error"), NotJson):
        return _explain_json(context["error"], name=name, place=place)
    words = _unknown_key(error["loc"][-1], field.annotation) if kind == "extra_forbidden" else ""
    words = words or _words(kind, context, field.annotation, error["input"])
    within = _within(error["loc"][1:], error["input"], kind)
    subject = f"{name} {within}" if within else shown(name, given)
    return f"{subject}: {words or error['msg']} ({place})"


def _explain_json(error: NotJson, *, name: str, place: Place) -> str:
    remedy = f"write {name} as JSON, single quotes outside, double quotes inside"
    where = f"{place.origin} line {place.line + error.line - 1}" if place.line else place.origin
    return f"[WARNING] Failed to parse {name.removeprefix('SFT_')}: {error.reason}; {remedy} ({where}){error.pointer}"


def _within(loc: tuple[Any, ...], value: object, kind: str) -> str:
    """Which entry and key of a JSON value the error is about, with the value."""
    if not loc:
        return ""
    entry = f"entry {loc[0] + 1}" if isinstance(loc[0], int) else f'"{loc[0]}"'
    key = "".join(f' "{part}"' for part in loc[1:] if part != "[key]")
    text = (
        "" if kind in ("missing", "extra_forbidden") else f"={json.dumps(value, ensure_ascii=False, default=str)[:60]}"
    )
    return entry + key + text


def _words(kind: str, context: Mapping[str, Any], annotation: Any, value: object) -> str:
    """What is wrong and the remedy, for one kind of pydantic error."""
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return one_of(value, _choices(annotation))
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        asked = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}[bounds[kind]]
        return f"is out of range; give {asked} {context[bounds[kind]]}"
    return {
        "missing": "is missing; write it",
        "int_parsing": "is not a whole number; write digits only",
        "int_from_float": "is not a whole number; write digits only",
        "int_parsing_size": "is too large; give a smaller number",
        "int_type": "is not a whole number; write digits without quotes",
        "float_parsing": "is not a number; write one such as 0.1 or 1e-4",
        "float_type": "is not a number; write it without quotes",
        "finite_number": "is not a finite number; write one such as 0.1 or 1e-4",
        "string_type": "is not a text; put it in double quotes",
        "string_too_short": "is empty; write it",
        "model_type": 'is no JSON object; write {"id": "..."}',
        "model_attributes_type": 'is no JSON object; write {"id": "..."}',
    }.get(kind, "")


def _unknown_key(key: object, annotation: Any) -> str:
    known = tuple(get_args(annotation)[0].model_fields)
    near = closest(str(key), known)
    return f"is an unknown key; {f'did you mean {near}?' if near else 'known are ' + ', '.join(known)}"


def _choices(annotation: Any) -> tuple[str, ...]:
    choices = get_args(annotation)
    return choices if choices and all(isinstance(choice, str) for choice in choices) else _choices(choices[0])


class Conflict(NamedTuple):
    """Settings that do not go together: the one to name first, all involved, and what to do."""

    names: tuple[str, ...]
    text: str


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
        )
    if settings.use_upsampling and not settings.upsample_rules:
        yield Conflict(
            ("SFT_USE_UPSAMPLING", "SFT_UPSAMPLE_RULES"),
            """there are no rules; write SFT_UPSAMPLE_RULES='{"text_to_toml": 3.0}', or set SFT_USE_UPSAMPLING=0""",
        )


def _weight_rules(settings: Any) -> Iterator[Conflict]:
    if settings.load_in_4bit and settings.load_in_8bit:
        yield Conflict(("SFT_LOAD_IN_8BIT", "SFT_LOAD_IN_4BIT"), "SFT_LOAD_IN_4BIT is on as well; keep one of them")
    for name, quantised in (("SFT_LOAD_IN_4BIT", settings.load_in_4bit), ("SFT_LOAD_IN_8BIT", settings.load_in_8bit)):
        if quantised and not settings.use_lora:
            text = "quantised weights cannot be trained themselves; set SFT_USE_LORA=1, or do not quantise"
            yield Conflict((name, "SFT_USE_LORA"), text)


def _training_rules(settings: Any) -> Iterator[Conflict]:
    if settings.epochs == 0 and settings.max_steps < 0:
        yield Conflict(("SFT_EPOCHS", "SFT_MAX_STEPS"), "nothing would be trained; give more than 0, or SFT_MAX_STEPS")


def _evaluation_rules(settings: Any) -> Iterator[Conflict]:
    if settings.val_ratio > 0 or settings.eval_dataset:
        return
    remedy = "set SFT_VAL_RATIO above 0, or SFT_EVAL_DATASET"
    if settings.gen_eval != "none" and not settings.gen_eval_dataset:
        text = f"there are no rows to generate answers for; {remedy}, or SFT_GEN_EVAL_DATASET"
        yield Conflict(("SFT_GEN_EVAL", "SFT_VAL_RATIO", "SFT_EVAL_DATASET", "SFT_GEN_EVAL_DATASET"), text)
    if settings.early_stopping_patience > 0 and not settings.gen_eval_dataset:
        text = f"early stopping needs validation rows; {remedy}"
        yield Conflict(("SFT_EARLY_STOPPING_PATIENCE", "SFT_VAL_RATIO", "SFT_EVAL_DATASET"), text)


def _metric_rule(settings: Any) -> Iterator[Conflict]:
    names = ("SFT_METRIC_FOR_BEST", "SFT_GEN_EVAL")
    plain = settings.metric_for_best.removeprefix("eval_").split("/")[0]
    try:
        metric_direction(settings.metric_for_best)
    except ValueError as error:
        yield Conflict(names[:1], str(error))
        return
    for mode, metrics in (("structured", STRUCTURED_METRICS), ("extraction", EXTRACTION_METRICS)):
        if plain in metrics and settings.gen_eval != mode:
            yield Conflict(names, f"is computed only with SFT_GEN_EVAL={mode}; set that, or take eval_loss")


def _output_rules(out: Path, stage: int) -> Iterator[Conflict]:
    folder = out.with_name(f"{out.name}_stage{stage}")
    for path in (out, folder, *folder.parents):
        if path.exists() and not path.is_dir():
            yield Conflict(("SFT_OUT_LORA_DIR",), f"{path} is a file; choose a path where folders can be made")
            return
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    if not folder.exists() and not os.access(nearest, os.W_OK):
        yield Conflict(
            ("SFT_OUT_LORA_DIR",), f"{nearest} is not writable; choose another path or change its permissions"
        )


def _base_model_rules(base_model: str) -> Iterator[Conflict]:
    path, names = Path(base_model), ("SFT_BASE_MODEL",)
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            what = "is an adapter, no model" if adapter else "is no model folder: config.json is missing"
            yield Conflict(names, f"{what}; name the folder or hub id of a base model")
    elif base_model.startswith(("/", ".")) or base_model.count("/") > 1:
        yield Conflict(names, "there is no such folder; correct the path, or give a hub id such as org/model")

"""docs/settings.md, generated from the settings: `python -m sft.settings.page > docs/settings.md`."""

from typing import get_args

from pydantic.fields import FieldInfo

from sft.settings.mistakes import literals
from sft.settings.schema import NAMES, Settings
from sft.settings.values import ATTENTION, CHAT_TEMPLATES, GEN_EVALS, TRACKERS

_GROUPS = {
    "SFT_BASE_MODEL": "Model",
    "SFT_USE_LORA": "LoRA",
    "SFT_OUT_LORA_DIR": "Output",
    "SFT_DATASET_ID": "Data",
    "SFT_MASKED_LOSS": "Masked loss",
    "SFT_EPOCHS": "Optimisation",
    "SFT_LOGGING_STEPS": "Rhythm",
    "SFT_GEN_EVAL": "Generation evaluation",
    "MLFLOW_EXPERIMENT_NAME": "Tracking",
}
"""First setting of each group -> heading."""

_HEAD = """# Settings

Written by `python -m sft.settings.page` from `sft/settings/schema.py`; change it there.

A setting is read from `--set NAME=VALUE`, else the process environment, else `stageN.env`, else its default applies.
Switches take 1/0, true/false or yes/no. `NAME=` unsets. In paths and data set ids `~` and `$VAR` are replaced.
JSON goes between single quotes and may run over several lines. Any other name in `stageN.env` is handed to the
process environment unless it is set there already (`HF_TOKEN`, `CUDA_VISIBLE_DEVICES`); a `SFT_` name that is not
listed here is a mistake.
"""
_ID_OR_LIST = "id, path or JSON list"
_SPECIAL = {
    "SFT_BASE_MODEL": "id or path",
    "SFT_ATTN": f"{', '.join(ATTENTION)} or a hub kernel",
    "SFT_CHAT_TEMPLATE": f"{', '.join(CHAT_TEMPLATES)} or a path",
    "SFT_OUT_LORA_DIR": "path",
    "SFT_DATASET_ID": "id or path",
    "SFT_DATASET_MIX": "JSON list",
    "SFT_DATASET_MIX_TOTAL_SIZE": "-1 or whole number ≥ 1",
    "SFT_EVAL_DATASET": _ID_OR_LIST,
    "SFT_NUM_PROC": "auto or whole number ≥ 1",
    "SFT_GEN_BATCH_SIZE": "auto or whole number ≥ 1",
    "SFT_UPSAMPLE_RULES": "JSON object",
    "SFT_MICRO_BATCH_TOKENS": "auto or whole number ≥ 0",
    "SFT_MAX_STEPS": "-1 or whole number ≥ 1",
    "SFT_EARLY_STOPPING_PATIENCE": "-1 or whole number ≥ 1",
    "SFT_GEN_EVAL": f"{', '.join(GEN_EVALS)} or path/to/metric.py:function",
    "SFT_GEN_EVAL_DATASET": _ID_OR_LIST,
    "SFT_JSON_SCHEMA": "path",
    "SFT_REPORT_TO": ", ".join(TRACKERS),
}
"""Values that a type does not tell."""
_TABLE_HEAD = "| setting | default | values | meaning |\n|---|---|---|---|"
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def settings_page() -> str:
    """docs/settings.md: every setting with its default, the values it takes and its sentence."""
    lines = [_HEAD.rstrip()]
    for name, attribute in NAMES.items():
        field = Settings.model_fields[attribute]
        if name in _GROUPS:
            lines.append(f"\n## {_GROUPS[name]}\n\n{_TABLE_HEAD}")
        lines.append(f"| `{name}` | {_default(name, field)} | {_values(name, field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None and _SPECIAL.get(name, "").startswith("auto"):
        return "auto"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(name: str, field: FieldInfo) -> str:
    """The choices, the range or the kind of a value."""
    if choices := literals(field.annotation):
        return ", ".join(choices)
    if name in _SPECIAL:
        return _SPECIAL[name]
    if isinstance(field.default, tuple):
        return "comma list"
    kinds = {bool: "0, 1", int: "whole number", float: "number", str: "text"}
    annotation = field.annotation
    kind = next((kinds[part] for part in (annotation, *get_args(annotation)) if part in kinds), "")
    return f"{kind} {_range(field)}".strip()


def _range(field: FieldInfo) -> str:
    limits = {bound: getattr(part, bound) for part in field.metadata for bound, _ in _BOUNDS if hasattr(part, bound)}
    return ", ".join(f"{sign} {limits[bound]}" for bound, sign in _BOUNDS if bound in limits)


if __name__ == "__main__":
    print(settings_page(), end="")

"""An Axolotl configuration -> lines of a stageN.env, with a reason for every key that has no line of its own."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.errors import Problems
from sft.programs.axolotl_keys import AXOLOTL_DEFAULTS, COLUMNS, REASONS, SAME
from sft.settings.env_file import printable
from sft.settings.values import CHAT_TEMPLATES

Config = Mapping[str, Any]
LAUNCHED = "how a run is launched is no setting: accelerate launch --config_file configs/accelerate/{}.yaml train.py"


@dataclass
class Translation:
    """Lines of the env file by setting name, and a reason by Axolotl key for what has no line."""

    values: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def env(self, title: str) -> str:
        """The text of the env file."""
        lines = [
            f"# Translated from {printable(title)}.",
            *(f"{name}={_quoted(value)}" for name, value in self.values.items()),
        ]
        if self.reasons:
            lines += ["", "# Without a line of their own:", *map("#   {}".format, self.explained())]
        return "\n".join(lines) + "\n"

    def explained(self) -> list[str]:
        """`key: reason`, each on one line whatever the file held."""
        return [printable(f"{key}: {reason}") for key, reason in self.reasons.items()]


def translate(config: Config) -> Translation:
    """Every key of the configuration as a setting or as a reason; what is unknown gets that as its reason.

    Raises:
        Problems: a key or value with a line end or another control character, which would be read as something else;
            a list that is none.
    """
    if found := list(_mistakes(config)):
        raise Problems(found)
    translation = Translation()
    for key, value in {**config, **_missing(config)}.items():
        if key in SPECIAL:
            SPECIAL[key](translation, value, config)
        elif key in SAME:
            if value is not None:
                translation.values[SAME[key]] = _text(value)
        else:
            translation.reasons[key] = REASONS.get(key, "has no equivalent here")
    hidden = [name for name, value in translation.values.items() if not value.isprintable()]
    if hidden:
        raise Problems(f"{name}: its value holds a line end or a control character; remove it" for name in hidden)
    return translation


def _mistakes(config: Config) -> Iterator[str]:
    for key in config:
        if not str(key).isprintable():
            yield f"{key!r}: a key holds a line end or a control character; remove it"
    for key in ("datasets", "test_datasets", "datasets_eval"):
        if not _is_list_of_sources(config.get(key) or []):
            yield f"{key}: is no list of data sets; write [{{path: rows.jsonl}}], names and files as text"
    for key in ("plugins", "lora_target_modules", "lora_modules_to_save"):
        value = config.get(key) or []
        if not (_are_texts(value) or (key == "lora_target_modules" and isinstance(value, str))):
            yield f"{key}: {printable(value)} is no list of names; write [a, b]"


def _is_list_of_sources(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, Mapping) and _is_source(entry) for entry in value)


def _is_source(entry: Mapping[Any, Any]) -> bool:
    files = entry.get("data_files") or []
    texts = [entry[name] for name in ("path", "split", "name", "revision", *COLUMNS) if entry.get(name)]
    return _are_texts([*entry, *texts]) and _are_texts(files if isinstance(files, list) else [files])


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _missing(config: Config) -> dict[str, Any]:
    validation = {"val_set_size"} if config.get("test_datasets") or config.get("datasets_eval") else set()
    return {key: value for key, value in AXOLOTL_DEFAULTS.items() if key not in config and key not in validation}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _quoted(value: str) -> str:
    if not any(character in value for character in " #\"'{["):
        return value
    escaped = value.replace("\\", r"\\").replace("'", r"\'")
    return f"'{escaped}'"


def _precision(translation: Translation, value: Any, config: Config) -> None:
    if value in (True, "full"):
        translation.values["SFT_DTYPE"] = "bfloat16"
    elif value == "auto":
        translation.values["SFT_DTYPE"] = "auto"
    else:
        translation.values["SFT_DTYPE"] = "float16" if config.get("fp16") else "float32"


def _adapter(translation: Translation, value: Any, config: Config) -> None:
    del config
    translation.values["SFT_USE_LORA"] = "1" if value in ("lora", "qlora") else "0"
    if value == "qlora":
        translation.values["SFT_LOAD_IN_4BIT"] = "1"


def _targets(translation: Translation, value: Any, config: Config) -> None:
    del config
    if value:
        translation.values["SFT_LORA_TARGET_MODULES"] = value if isinstance(value, str) else ",".join(value)


def _saved(translation: Translation, value: Any, config: Config) -> None:
    del config
    if value:
        translation.values["SFT_LORA_MODULES_TO_SAVE"] = ",".join(value)


def _linear(translation: Translation, value: Any, config: Config) -> None:
    if value and not config.get("lora_target_modules"):
        translation.values["SFT_LORA_TARGET_MODULES"] = "all-linear"
    elif value:
        translation.reasons["lora_target_linear"] = (
            "the layers listed are all the linear ones but the router of a mixture of experts; all-linear adds that"
        )
    else:
        translation.reasons["lora_target_linear"] = REASONS["lora_target_linear"]


def _source(entry: Config, translation: Translation, key: str) -> dict[str, Any]:
    """One entry of `datasets` as a source; what it asks for beyond that becomes a reason."""
    kind = entry.get("type")
    entry = {**entry, **kind} if isinstance(kind, Mapping) else dict(entry)
    names = {"path": "id", "split": "split", "name": "name", "revision": "revision"}
    source = {ours: entry[theirs] for theirs, ours in names.items() if entry.get(theirs)}
    if files := entry.get("data_files"):
        source["id"] = files if isinstance(files, str) else files[0]
    columns = {ours: entry[theirs] for theirs, ours in COLUMNS.items() if entry.get(theirs, ours) != ours}
    if columns:
        source["columns"] = columns
    if "type" in entry or "format" in entry:
        translation.reasons[f"{key}[].type"] = "the shape of the rows is recognised from their columns"
    known = {*names, *COLUMNS, "data_files", "type", "format", "ds_type", "weight"}
    for name in sorted(set(entry) - known):
        translation.reasons[f"{key}[].{name}"] = "has no equivalent here"
    return source


def _datasets(translation: Translation, value: Any, config: Config) -> None:
    del config
    sources = [_source(entry, translation, "datasets") for entry in value or []]
    if len(sources) == 1 and set(sources[0]) <= {"id", "split"}:
        translation.values["SFT_DATASET_ID"] = sources[0]["id"]
        if sources[0].get("split", "train") != "train":
            translation.values["SFT_DATASET_SPLIT"] = sources[0]["split"]
        return
    translation.values["SFT_DATASET_MIX"] = json.dumps(sources, ensure_ascii=False)
    if len(sources) > 1:
        translation.reasons["datasets"] = (
            "Axolotl joins its data sets row by row, a mix draws by weight: give each its number of rows as weight "
            "and SFT_DATASET_MIX_TOTAL_SIZE their sum, and every row is trained once"
        )


def _evaluation(translation: Translation, value: Any, config: Config) -> None:
    del config
    sources = [_source(entry, translation, "test_datasets") for entry in value or []]
    if sources:
        plain = len(sources) == 1 and set(sources[0]) == {"id"}
        translation.values["SFT_EVAL_DATASET"] = sources[0]["id"] if plain else json.dumps(sources, ensure_ascii=False)


def _share(translation: Translation, value: Any, config: Config) -> None:
    del config
    if isinstance(value, int | float) and value < 1:
        translation.values["SFT_VAL_RATIO"] = _text(value)
    else:
        translation.reasons["val_set_size"] = f"{value} rows: give SFT_VAL_RATIO as a share of all rows"


def _steps(setting: str, key: str) -> Callable[[Translation, Any, Config], None]:
    def apply(translation: Translation, value: Any, config: Config) -> None:
        del config
        if isinstance(value, int) and value >= 1:
            translation.values[setting] = _text(value)
        else:
            translation.reasons[key] = f"{value} of all steps: give {setting} as a number of steps (--check shows them)"

    return apply


def _template(translation: Translation, value: Any, config: Config) -> None:
    del config
    if value in CHAT_TEMPLATES:
        translation.values["SFT_CHAT_TEMPLATE"] = value
    else:
        translation.reasons["chat_template"] = (
            f"{value}: the tokenizer's own template is used; --check shows rows in it"
        )


def _checkpointing(translation: Translation, value: Any, config: Config) -> None:
    del config
    translation.values["SFT_GRADIENT_CHECKPOINTING"] = "1" if value else "0"


def _deepspeed(translation: Translation, value: Any, config: Config) -> None:
    del config
    if value:
        kind = "zero2" if "2" in str(value) else "zero3"
        translation.reasons["deepspeed"] = LAUNCHED.format(kind)


def _fsdp(translation: Translation, value: Any, config: Config) -> None:
    del config
    if value:
        translation.reasons["fsdp"] = LAUNCHED.format("fsdp")


def _plugins(translation: Translation, value: Any, config: Config) -> None:
    del config
    for name in value or []:
        if "generationeval" in name.lower().replace("_", ""):
            translation.values["SFT_GEN_EVAL"] = "extraction"
            reason = (
                "SFT_GEN_EVAL=extraction scores offenders as document 001 does; structured and samples are the others"
            )
        elif "mlflow" in name.lower():
            reason = "runs are recorded in MLflow without a setting"
        elif "liger" in name.lower() or "cross_entropy" in name.lower():
            reason = "the loss comes from a fused head"
        else:
            reason = "there is no plug-in system here"
        translation.reasons[f"plugins: {name}"] = reason


SPECIAL: dict[str, Callable[[Translation, Any, Config], None]] = {
    "bf16": _precision,
    "adapter": _adapter,
    "lora_target_modules": _targets,
    "lora_modules_to_save": _saved,
    "lora_target_linear": _linear,
    "datasets": _datasets,
    "test_datasets": _evaluation,
    "datasets_eval": _evaluation,
    "val_set_size": _share,
    "eval_steps": _steps("SFT_EVAL_STEPS", "eval_steps"),
    "save_steps": _steps("SFT_SAVE_STEPS", "save_steps"),
    "chat_template": _template,
    "gradient_checkpointing": _checkpointing,
    "deepspeed": _deepspeed,
    "fsdp": _fsdp,
    "fsdp_config": _fsdp,
    "plugins": _plugins,
}

"""From the text of a setting to its value. A `ValueError` says "what is wrong; remedy"."""

import codecs
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from sft.errors import hide_secrets
from sft.scoring.metrics import KINDS as GEN_EVALS
from sft.scoring.own import parts_of
from sft.settings.env_file import closest, printable

ATTENTION = (
    "auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip
QUANTISING = ("SFT_LOAD_IN_8BIT", "SFT_LOAD_IN_4BIT")
"""Switches that quantise the frozen weights, each more sparing than the one before."""
CHAT_TEMPLATES = ("chatml", "llama2", "alpaca", "mistral")
# Under the name of the package what pip calls it.
FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
# How optimizers begin that are no part of torch or transformers.
OPTIMIZER_PACKAGES = {
    **dict.fromkeys(
        ("adamw_bnb_8bit", "adamw_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb"), ("bitsandbytes", "bitsandbytes")
    ),
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch-npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
}
# What chat templates are handed besides options, and names of the functions' own arguments on the way there.
_TEMPLATE_ARGUMENTS = frozenset(
    "messages tools documents add_generation_prompt conversations chat_template continue_final_message"
    " return_assistant_tokens_mask compiled_template self".split()
)
TRACKERS = ("mlflow", "tensorboard", "wandb", "none")
# Not on/off and y/n: YAML and shells disagree about those.
_TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


class NotJson(ValueError):
    """Text that is not JSON: the reason, and where it stops making sense (counted from 1)."""

    def __init__(self, reason: str, *, text: str, line: int, column: int) -> None:
        self.reason, self.text, self.line, self.column = reason, text, line, column
        super().__init__(reason)

    @property
    def pointer(self) -> str:
        """The broken line with a caret under the broken position."""
        lines = self.text.split("\n")
        start = max(0, self.column - 60)
        excerpt = printable(lines[min(self.line, len(lines)) - 1][start : start + 100])
        return f"\n    {excerpt.rstrip()}\n    {' ' * (self.column - 1 - start)}^"


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN, no key twice, nothing that UTF-8 cannot hold."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise NotJson(str(error), text=text, line=error.lineno, column=error.colno) from None
    except UnicodeEncodeError:
        raise NotJson("it contains half of a character", text=text, line=1, column=1) from None
    except RecursionError:
        raise NotJson("it is nested too deeply", text=text, line=1, column=1) from None
    except ValueError as error:
        raise NotJson(str(error), text=text, line=1, column=1) from None
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f'key "{sorted(twice)[0]}" is written twice in one object')
    return dict(pairs)


def check_mirror(value: str) -> str:
    """A folder's path, or hf://USER/REPO."""
    if value.startswith("hf://"):
        if not re.fullmatch(r"hf://[\w.-]+/[\w.-]+", value):
            raise ValueError("is no repository of the hub; write hf://USER/REPO")
    elif "://" in value:
        raise ValueError("is no place for a copy; write a folder, or hf://USER/REPO")
    return value


def parse_switch(value: Any) -> Any:
    """A boolean from 1/0/true/false/yes/no."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() not in _TRUTH:
        raise ValueError("is neither yes nor no; write 1 or 0")
    return _TRUTH[value.strip().lower()]


def parse_checkpointing(value: Any) -> Any:
    """auto, or a boolean as "0" or "1"."""
    if isinstance(value, str) and value.strip().lower() in _TRUTH:
        return str(int(_TRUTH[value.strip().lower()]))
    return value


def parse_auto(value: Any) -> Any:
    """None for "auto": the program chooses."""
    return None if isinstance(value, str) and value.strip().lower() == "auto" else value


def parse_names(value: Any) -> Any:
    """The parts of a comma list, without the empty ones."""
    if not isinstance(value, str):
        return value
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise ValueError("is an empty list; write names with commas between, or leave it out for the default")
    return names


def parse_mix(value: Any) -> Any:
    """A JSON list of sources."""
    if not isinstance(value, str):
        return value
    mix = parse_json(value)
    if not isinstance(mix, list) or not mix:
        wanted = 'a list of sources is wanted, such as [{"id": "..."}]'
        raise NotJson(f"{wanted}, not {'an empty one' if mix == [] else 'one value'}", text=value, line=1, column=1)
    return mix


def parse_id_or_mix(value: Any) -> Any:
    """An id or path, or a JSON list of sources."""
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        return [{"id": value}]
    return parse_mix(value)


def parse_rules(value: Any) -> Any:
    """A JSON object of multipliers."""
    rules = parse_json(value) if isinstance(value, str) else value
    if not isinstance(rules, dict):
        raise ValueError('is no JSON object; write {"text_to_toml": 3.0}')
    for key, multiplier in rules.items():
        if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
            raise ValueError(
                f'rule "{key}" has {json.dumps(multiplier)[:40]}, which is no number; write one, for instance 2.0'
            )
    return rules


def parse_template_options(value: Any) -> Any:
    """A JSON object of options, none of which the program itself hands to chat templates."""
    options = parse_json(value) if isinstance(value, str) else value
    if not isinstance(options, dict):
        raise ValueError('is no JSON object; write {"enable_thinking": false}')
    for name in options:
        if not name.isidentifier():
            raise ValueError(f'"{name[:40]}" cannot be the name of an option; write {{"enable_thinking": false}}')
        if name in _TEMPLATE_ARGUMENTS:
            raise ValueError(f'"{name}" is not yours to choose: it is filled in for every row; leave it out')
    return options


def recordable(value: Any) -> Any:
    """JSON without the unset keys of objects, and without credentials in its texts."""
    if isinstance(value, list):
        return [recordable(item) for item in value]
    if isinstance(value, dict):
        return {key: recordable(item) for key, item in value.items() if item is not None}
    return hide_secrets(value) if isinstance(value, str) else value


def expand(value: Any, info: ValidationInfo) -> Any:
    """A path or id with ~ and $VAR replaced; what exists under its literal name is left alone."""
    text = str(value)
    if ("$" not in text and not text.startswith("~")) or is_there(Path(text)):
        return value
    variables = (info.context or {}).get("variables", {})
    expanded = _VARIABLE.sub(lambda match: _variable(match, variables), text)
    if expanded == "~" or expanded.startswith("~/"):
        expanded = variables.get("HOME", str(Path.home())) + expanded[1:]
    return expanded


def is_there(path: Path) -> bool:
    """Whether the path exists; False as well for one that no file system could hold or that cannot be looked at."""
    try:
        return path.exists()
    except OSError:
        return False


def _variable(match: re.Match[str], variables: Any) -> str:
    name, default = match[1] or match[2], match[3]
    found = variables.get(name) or default
    if found is None:
        raise ValueError(f"${name} is not set; set it, or write the path out")
    return str(found)


def check_off_or_count(value: int) -> int:
    """-1 for off, or a count from 1."""
    if value == 0 or value < -1:
        raise ValueError("is neither -1 nor a count; write -1 to leave it open, or a number from 1")
    return value


def check_encoding(value: str) -> str:
    """A text encoding Python knows."""
    try:
        "".encode(codecs.lookup(value).name)  # rot13 is known to Python as well, but no encoding of text
    except LookupError:
        raise ValueError("is no text encoding; write utf-8, cp932, latin-1 or another one Python knows") from None
    return value


def check_attention(value: str) -> str:
    """A known attention implementation whose package is installed, or a kernel of the hub (with a slash)."""
    if value not in ATTENTION and "/" not in value:
        raise ValueError(one_of(value, ATTENTION))
    package, distribution = FLASH_PACKAGES.get(value, ("kernels", "kernels") if "/" in value else ("", ""))
    if package and find_spec(package) is None and find_spec("kernels") is None:
        raise ValueError(f"{distribution} is not installed; pip install {distribution}, or take auto")
    return value


def check_optimizer(value: str) -> str:
    """One whose package is installed."""
    for prefix, (package, distribution) in OPTIMIZER_PACKAGES.items():
        if value.startswith(prefix) and find_spec(package) is None:
            text = f"{value} needs {distribution}, which is not installed"
            raise ValueError(f"{text}; pip install {distribution}, or take adamw_torch_fused")
    return value


def check_chat_template(value: str, info: ValidationInfo) -> str:
    """A template's name, or the path of a .jinja file that is there."""
    if value in CHAT_TEMPLATES:
        return value
    path = str(expand(value, info))
    if "/" not in path and not path.endswith(".jinja"):
        raise ValueError(one_of(value, CHAT_TEMPLATES, also="the path of a .jinja file"))
    if not (is_there(Path(path)) and Path(path).is_file()):
        raise ValueError("is no file; correct the path of the .jinja file")
    return path


def check_gen_eval(value: str, info: ValidationInfo) -> str:
    """A kind of evaluation, or file and function of a measure of one's own: the file is there."""
    found = parts_of(value)
    if found is None:
        if value in GEN_EVALS:
            return value
        raise ValueError(one_of(value, GEN_EVALS, also="path/to/metric.py:function"))
    path = Path(str(expand(str(found[0]), info)))
    if not (is_there(path) and path.is_file()):
        raise ValueError(f"there is no file {path}; write path/to/metric.py:function")
    return f"{path}:{found[1]}"


def check_json_schema(value: Any, info: ValidationInfo) -> Path:
    """A file that holds a JSON Schema."""
    path = Path(str(expand(value, info)))
    if not (is_there(path) and path.is_file()):
        raise ValueError("is no file; correct the path of the JSON Schema")
    from sft.scoring.own import load_schema  # imports parsers that --help does without

    load_schema(path)
    return path


def check_folder_name(value: Path) -> Path:
    """A path that `_stage1` can be appended to."""
    if value.name in ("", ".."):
        raise ValueError("names no folder; end it with a name, such as outputs/my_model")
    return value


def check_report_to(value: tuple[str, ...]) -> tuple[str, ...]:
    """Known trackers that are installed."""
    for tracker in value:
        if tracker not in TRACKERS:
            raise ValueError(f"{tracker} {one_of(tracker, TRACKERS)}")
        if tracker in ("tensorboard", "wandb") and find_spec(tracker) is None:
            raise ValueError(f"{tracker} is not installed; pip install {tracker}, or leave it out")
    if "none" in value and len(value) > 1:
        raise ValueError("asks for none beside others; leave one of them out")
    return value


def one_of(value: object, choices: tuple[str, ...], *, also: str = "") -> str:
    """Problem text for a value that is not among the choices, with the closest one."""
    near = closest(str(value), choices)
    listed = ", ".join(choices) if len(choices) <= 8 else "those listed in docs/settings.md"
    hint = f"did you mean {near}?" if near else "choose one of them"
    return f"is not one of {listed}{' or ' + also if also else ''}; {hint}"


# transformers' SchedulerType and OptimizerNames; a test compares, since importing transformers takes seconds.
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
]  # fmt: skip
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit",
    "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw",
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise",
    "stable_adamw",
]  # fmt: skip
Switch = Annotated[bool, BeforeValidator(parse_switch)]
Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]
AtLeastOne = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OffOrCount = Annotated[int, AfterValidator(check_off_or_count)]
AutoOrCount = Annotated[AtLeastOne | None, BeforeValidator(parse_auto)]
TokenBudget = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(parse_auto)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expand)]


class Source(BaseModel):
    """One data set of a mix: a hub id, a folder of `save_to_disk` or of data files, a data file, or a pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: PathText
    weight: Positive = 1.0
    split: Annotated[str, Field(min_length=1)] = "train"
    name: str | None = None
    revision: str | None = None
    limit: AtLeastOne | None = None
    repeat: Positive = 1.0
    columns: dict[str, str] | None = None
    encoding: Annotated[str, AfterValidator(check_encoding)] | None = None


# What a file of this program says; of whatever else stands there (of other versions) nothing is lost.
RECORD = ConfigDict(strict=True, extra="allow")


class SourceRecord(BaseModel):
    """A source as stage.json lists it: what was asked for, what was counted (None before), what it is known by."""

    model_config = RECORD

    id: str
    split: str = "train"
    weight: float = 1.0
    rows: int | None = None
    drawn: int | None = None
    fingerprint: str | None = None
    validation_rows: int | None = None


Mix = Annotated[tuple[Source, ...], BeforeValidator(parse_mix)]
IdOrMix = Annotated[tuple[Source, ...], BeforeValidator(parse_id_or_mix)]

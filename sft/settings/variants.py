"""Variants of a stage: one for every value, or pair of values, that `--try NAME=V1,V2` names. Texts and names only."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from sft.settings.env_file import attribute_of, closest, name_of

MARK = "--try"
"""The origin of a setting that was tried, in a manifest and in --check."""
FREELY = 8
"""Variants trained without asking back."""
WITH_OTHER_ROWS = ("SFT_DATASET_MIX_TOTAL_SIZE", "SFT_REPLAY", "SFT_SHUFFLE", "SFT_USE_UPSAMPLING")
"""What may be tried though variants then see other training rows, or see them in another order: the rows they are
scored on stay the same."""
TRIED = frozenset({
    *WITH_OTHER_ROWS, "SFT_USE_LORA", "SFT_LORA_R", "SFT_LORA_ALPHA", "SFT_LORA_DROPOUT", "SFT_LORA_RSLORA",
    "SFT_LORA_DORA", "SFT_PACKING", "SFT_MASKED_LOSS", "SFT_MASKED_LOSS_UNIT", "SFT_MASKED_LOSS_REDRAW",
    "SFT_MASKED_LOSS_MODE", "SFT_EPOCHS", "SFT_MAX_STEPS", "SFT_PER_DEVICE_TRAIN_BS", "SFT_GRAD_ACCUM", "SFT_LR",
    "SFT_LR_SCHEDULER", "SFT_MIN_LR_RATIO", "SFT_WARMUP_RATIO", "SFT_WARMUP_STEPS", "SFT_WEIGHT_DECAY",
    "SFT_ADAM_BETA1", "SFT_ADAM_BETA2", "SFT_ADAM_EPSILON", "SFT_MAX_GRAD_NORM", "SFT_OPTIM", "SFT_GROUP_BY_LENGTH",
    "SFT_NEFTUNE_NOISE_ALPHA", "SFT_EARLY_STOPPING_PATIENCE", "SFT_METRIC_FOR_BEST",
})  # fmt: skip
"""Settings that change how a stage learns and not what its variants are compared by: one base model, the same parents,
the same rows to be scored on, the same tokens of them."""
_LISTS = ("SFT_LORA_TARGET_MODULES", "SFT_LORA_MODULES_TO_SAVE", "SFT_UPSAMPLE_RULES", "SFT_OUTPUT_MARKERS")


def pairings(
    tries: Sequence[str], names: Iterable[str], overrides: Sequence[str]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Every combination of the values in the texts of `--try`, each as texts "NAME=VALUE", and what is wrong."""
    problems: list[str] = []
    choices: dict[str, list[str]] = {}
    known = tuple(names)
    for text in tries:
        name, _, listed = text.partition("=")
        name, values = name.strip(), [value.strip() for value in listed.split(",")]
        if problem := _refused(text, name, known):
            problems.append(problem)
        elif not all(values):
            problems.append(f"--try {text}: has no value{' between two commas' if listed else ''}; write {name}=V1,V2")
        elif name in choices:
            problems.append(f"--try {name}: is given twice; write all its values behind one, {name}=V1,V2")
        elif any(each.partition("=")[0].strip() == name for each in overrides):
            problems.append(f"--try {name}: --set names it as well; leave one of them out")
        else:
            choices[name] = values
    combined = itertools.product(*([f"{name}={value}" for value in values] for name, values in choices.items()))
    return ([] if problems else list(combined)), problems


def incomparable(settings: Any) -> str:
    """Why variants of a stage could not be ranked, "" where they can."""
    if settings.val_ratio or settings.eval_sources or settings.gen_eval not in ("none", "samples"):
        return ""
    what = "variants have nothing to be ranked by: no validation rows and no scored answers"
    return f"--try: {what}; raise SFT_VAL_RATIO, set SFT_EVAL_DATASET, or SFT_GEN_EVAL with SFT_GEN_EVAL_DATASET"


def _refused(text: str, name: str, known: Sequence[str]) -> str:
    """Why a name can't be tried, "" where it can."""
    if "=" not in text:
        return f"--try {text}: has no values; write NAME=V1,V2, such as SFT_LR=1e-5,5e-5,1e-4"
    if name not in known:
        near = name_of(closest(attribute_of(name), map(attribute_of, known)))
        hint = f"did you mean {near}?" if near in known else "docs/settings.md lists them all"
        return f"--try {name}: is not a setting; {hint}"
    if name in _LISTS:
        return f"--try {name}: its value is a list itself, whose commas can't be told from those between variants"
    if name not in TRIED:
        what = "it changes the model, the rows or tokens that variants are scored on, or no result at all"
        return f"--try {name}: variants could not be compared: {what}; train such stages under names of their own"
    return ""


def variant_name(tried: Mapping[str, Any]) -> str:
    """{"SFT_LR": 5e-05, "SFT_LORA_R": 8} -> "lr=5e-5+lora_r=8": the same for one value however it was written."""
    return "+".join(f"{attribute_of(name)}={value_text(value)}" for name, value in sorted(tried.items()))


def value_text(value: Any) -> str:
    """A value as people write it in an env file: 1e-5, 0.03, 16, cosine; switches as 1 and 0."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return f"{Decimal(repr(value)).normalize():e}"
    return f"{value:.17g}" if isinstance(value, float) and value == int(value) else str(value)


def chosen(text: str, names: Iterable[str]) -> list[str]:
    """The variants that a person means by `text`: a whole name, SFT_ or not, or the values alone (5e-5, 5e-5+8)."""
    wanted = "+".join(sorted(_plain(part) for part in text.strip().split("+")))
    return [
        name
        for name in names
        if wanted
        in ("+".join(sorted(name.split("+"))), "+".join(sorted(part.partition("=")[2] for part in name.split("+"))))
    ]


def _plain(part: str) -> str:
    """lr=5e-5 for SFT_LR=0.00005, 5e-5 for 0.00005."""
    name, equals, value = part.rpartition("=")
    try:
        number = value_text(int(value) if value.strip().isdigit() else float(value))
    except ValueError:
        number = value.strip()
    return f"{attribute_of(name.strip().upper())}{equals}{number}" if equals else number

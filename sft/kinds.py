"""The kinds of value a setting can have, each with its own reading from text; and `Source`, an entry of a mix."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sft import values

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
Switch = Annotated[bool, BeforeValidator(values.parse_switch)]
Names = Annotated[tuple[str, ...], BeforeValidator(values.parse_names)]
AtLeastOne = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OffOrCount = Annotated[int, AfterValidator(values.check_off_or_count)]
Processes = Annotated[AtLeastOne | None, BeforeValidator(values.parse_auto)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(values.expand)]


class Source(BaseModel):
    """One data set of a mix: a hub id, a folder of `save_to_disk`, or a .json, .jsonl, .csv or .parquet file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: PathText
    weight: Positive = 1.0
    split: Annotated[str, Field(min_length=1)] = "train"
    name: str | None = None
    revision: str | None = None
    limit: AtLeastOne | None = None
    repeat: Positive = 1.0
    columns: dict[str, str] | None = None
    encoding: Annotated[str, AfterValidator(values.check_encoding)] | None = None


Mix = Annotated[tuple[Source, ...], BeforeValidator(values.parse_mix)]
IdOrMix = Annotated[tuple[Source, ...], BeforeValidator(values.parse_id_or_mix)]

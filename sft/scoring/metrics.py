"""The names of all metrics a stage can be chosen by, and which way is better. Nothing else in the house lists them."""

from collections.abc import Collection

KINDS = ("none", "samples", "structured", "extraction")
"""What is built in of SFT_GEN_EVAL."""
LOSS_METRICS = ("loss", "perplexity")
"""What the trainer's `evaluate` makes of the validation rows; an evaluation without them lacks these."""
STRUCTURED_FIELDS = {
    "gen_parse_rate": "parses",
    "gen_format_rate": "in_format",
    "gen_key_rate": "key_rate",
    "gen_value_rate": "value_rate",
    "gen_exact_rate": "exact",
    "gen_only_rate": "only",
    "gen_score": "score",
    "gen_structeval_score": "structeval",
}
"""Metric -> the field of a StructuredScore that it is the mean of. Rates are columns of the report, in this order."""
EDGE_METRICS = ("gen_path_valid_rate", "gen_edge_precision", "gen_edge_recall", "gen_edge_f1")
STRUCTURED_METRICS = (*STRUCTURED_FIELDS, *EDGE_METRICS)
EXTRACTION_METRICS = (
    "gen_json_parse_rate", "gen_schema_ok_rate", "gen_offender_presence_precision", "gen_offender_presence_recall",
    "gen_offender_presence_f1", "gen_fp_rate_on_negative", "gen_offender_name_set_f1", "gen_field_exact_match_rate",
    "gen_all_fields_exact_match_rate",
)  # fmt: skip
# The fields of document 001's task (Japanese news about offences), "occured" spelt as there.
EXTRACTION_FIELDS = (
    "person_name", "person_age_at_published", "person_position_name", "person_belongs_company", "person_address",
    "person_violated_law", "occured_locations", "police_departments",
)  # fmt: skip
# Scores of 64 sampled answers move by about 0.03 between equally good models; less than this is not a loss.
FORGETTING_MARGIN = 0.05
SCHEMA_METRICS = ("gen_schema_rate",)
NAMES = (*LOSS_METRICS, *STRUCTURED_METRICS, *EXTRACTION_METRICS, *SCHEMA_METRICS)
"""Every metric that can choose the best model, without "eval_" and without a "/part"."""

_LOWER_IS_BETTER = {"loss", "perplexity", "gen_fp_rate_on_negative"}


def metric_direction(name: str, own_lower: Collection[str] | None = None) -> bool:
    """Whether greater is better for a metric we log, with or without "eval_" and a "/part".

    `own_lower`: where a measure of one's own is logged as well, those of its names for which less is better.

    Raises:
        ValueError: nothing logs a metric of that name.
    """
    plain, slash, part = name.removeprefix("eval_").partition("/")
    if own_lower is not None and name.startswith("gen_") and plain not in NAMES:
        return name not in own_lower
    parted = plain == "loss" or plain.startswith("gen_")
    if plain not in NAMES or (slash and not (part and parted)):
        raise ValueError(f"{name} is not a metric that is logged")
    return plain not in _LOWER_IS_BETTER


def logged_name(name: str) -> str:
    """The name under which an evaluation logs a metric that was named with or without "eval_"."""
    plain = name.removeprefix("eval_")
    return f"eval_{plain}" if plain.partition("/")[0] in LOSS_METRICS else plain

"""The metrics a stage can be chosen by, and which way is better."""

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
NAMES = (*LOSS_METRICS, *STRUCTURED_METRICS, *EXTRACTION_METRICS)
"""Every metric that can choose the best model, without "eval_" and without a "/part"."""


def metric_direction(name: str) -> bool:
    """Whether greater is better for a metric we log, with or without "eval_" and a "/part".

    Raises:
        ValueError: nothing logs a metric of that name.
    """
    plain = name.removeprefix("eval_").split("/")[0]
    if plain not in NAMES or (plain != name.removeprefix("eval_") and not plain.startswith("gen_")):
        raise ValueError(f"{name} is not a metric that is logged")
    return plain not in _LOWER_IS_BETTER


def logged_name(name: str) -> str:
    """The name under which an evaluation logs a metric that was named with or without "eval_"."""
    plain = name.removeprefix("eval_")
    return f"eval_{plain}" if plain in LOSS_METRICS else plain

"""What an evaluation of a stage will measure, and whether the best model can be chosen by what was asked for.

Both are known before the first step, from the rows alone: a run must not train for hours towards a metric that never
comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import datasets

from sft.data.mixture import load_questions
from sft.errors import Problems
from sft.evaluation.generation_evaluation import prompts_of, questions
from sft.scoring.metrics import LOSS_METRICS, logged_name
from sft.scoring.score import score
from sft.settings.rules import BY_EVALUATION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from transformers import PreTrainedTokenizerBase

    from sft.data.mixture import Mix
    from sft.settings import Settings

_BY_SOURCE = logged_name("loss")
_OF_LOSS = frozenset(map(logged_name, LOSS_METRICS))
_VALIDATION = "raise SFT_VAL_RATIO, or set SFT_EVAL_DATASET"


def asked_rows(settings: Settings, mix: Mix) -> list[dict[str, Any]]:
    """The questions of the generation evaluation, [] without one: from SFT_GEN_EVAL_DATASET, else validation rows.

    Raises:
        Problems: a data set of SFT_GEN_EVAL_DATASET can't be loaded.
    """
    if settings.gen_eval == "none":
        return []
    loaded = [dataset.select_columns(["messages", "extras", "task_key"]) for dataset in load_questions(settings)]
    return questions(datasets.concatenate_datasets(loaded) if loaded else mix.val, settings)


def measured(settings: Settings, val_rows: int, asked: list[dict[str, Any]], sources: Sequence[str] = ()) -> set[str]:
    """The names of the metrics an evaluation will log: what scoring the reference answers themselves gives, and the
    loss of each of the `sources` of the validation rows where they are several."""
    names = set(_OF_LOSS) if val_rows else set()
    names |= {logged_name(f"loss/{source}") for source in sources} if len(sources) > 1 else set()
    if asked:
        perfect = [row | {"answer": row["reference"]} for row in asked]
        fields, markers, schema = settings.extraction_fields, settings.output_markers, settings.json_schema
        names |= score(settings.gen_eval, perfect, fields=fields, markers=markers, schema=schema)[1].keys()
    return names


def require_metric(settings: Settings, mix: Mix, say: Callable[[str], None]) -> None:
    """Says where no best model will be kept though nobody asked for one.

    Raises:
        Problems: early stopping, SFT_METRIC_FOR_BEST or the learning rate go by what no evaluation will measure.
    """
    if settings.lr_scheduler in BY_EVALUATION and not len(mix.val):
        reason = f"goes by the loss on validation rows, and there are none of {len(mix.train):,}; {_VALIDATION}"
        raise Problems([f"SFT_LR_SCHEDULER={settings.lr_scheduler}: {reason}"])
    wanted = logged_name(settings.metric_for_best)
    there = sorted({mix.names[number] for number in mix.val["source"]}) if len(mix.names) > 1 else []
    names = measured(settings, len(mix.val), asked_rows(settings, mix), there)
    if wanted in names:
        return
    if len(mix.val) and wanted.startswith(f"{_BY_SOURCE}/"):
        losses = ", ".join(f"{_BY_SOURCE}/{source}" for source in there) if len(there) > 1 else ""
        one = "the validation rows are of one source alone; take eval_loss"
        reason = f"no source of that name has validation rows; take one of {losses}" if losses else one
    elif not names:
        reason = f"there is nothing to evaluate: no validation rows of {len(mix.train):,}; {_VALIDATION}"
    elif wanted.partition("/")[0] in _OF_LOSS:
        reason = f"{wanted} needs validation rows; {_VALIDATION}, or choose by one of {_listed(names)}"
    else:
        reason = f"the rows to answer do not give it; they give {_listed(names)}"
    patience = settings.early_stopping_patience
    if patience > 0:
        raise Problems([f"SFT_EARLY_STOPPING_PATIENCE={patience}: goes by SFT_METRIC_FOR_BEST={wanted}, but {reason}"])
    if settings.origins.get("SFT_METRIC_FOR_BEST", "default") != "default":
        raise Problems([f"SFT_METRIC_FOR_BEST={settings.metric_for_best}: {reason}"])
    say(f"[WARNING] No best model will be kept: {reason}")


def require_comparison(settings: Settings, mix: Mix, tokenizer: PreTrainedTokenizerBase) -> None:
    """Under SFT_GATE there is something a stage can be compared by.

    Raises:
        Problems: neither the answers will be scored nor general questions asked.
    """
    if not settings.gate or (settings.general_eval and tokenizer.chat_template):
        return
    if "gen_score" not in measured(settings, 0, asked_rows(settings, mix)):
        reason = f"SFT_GEN_EVAL={settings.gen_eval} gives these rows no gen_score, and no general questions are asked"
        remedy = "take rows that can be scored (--check lists what they give), or set SFT_GENERAL_EVAL=1"
        raise Problems([f"SFT_GATE=1: there is nothing to compare: {reason}; {remedy}"])


def require_prompts(settings: Settings, mix: Mix, tokenizer: PreTrainedTokenizerBase) -> None:
    """The chat template takes every question that will be asked: a run asks when it has begun to train.

    Raises:
        Problems: it refuses one.
    """
    if rows := asked_rows(settings, mix):
        prompts_of(rows, tokenizer, settings.template_options)


def _listed(names: set[str]) -> str:
    plain = sorted(name for name in names if "/" not in name and name != "gen_samples")
    parts = sorted(name for name in names if name.startswith("gen_score/"))
    return ", ".join([*plain, *parts]) or "none"

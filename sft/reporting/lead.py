"""The sentences on top of a report: what a stage did to its own tasks and to earlier ones, and which step was best."""

from sft.reporting.language import Say
from sft.reporting.text import figure, label
from sft.scoring.metrics import metric_direction
from sft.storage.json_files import Facts


def stage_lead(facts: Facts, say: Say) -> list[str]:
    """From the facts of one stage; nothing where nothing was measured."""
    found = [_outcome(facts, say), _best(facts, say)]
    return [sentence for sentence in found if sentence]


def _outcome(facts: Facts, say: Say) -> str:
    before, after = _own_scores(facts)
    if after is None:
        losses = facts["curves"].get("eval_loss")
        if not losses or facts["stage"] is None:
            return ""
        ends = {"before": figure(losses[0][1]), "after": figure(losses[-1][1])}
        text = "Stage {stage} brought the evaluation loss from {before} to {after}"
        return say(text, stage=facts["stage"], **ends) + say(".")
    if before is None or f"{before:.2f}" == f"{after:.2f}":
        sentence = say("Stage {stage} left its own tasks at {after}", stage=facts["stage"], after=f"{after:.2f}")
    else:
        verb = "lifted" if after > before else "lowered"
        text = f"Stage {{stage}} {verb} its own tasks from {{before}} to {{after}}"
        sentence = say(text, stage=facts["stage"], before=f"{before:.2f}", after=f"{after:.2f}")
    return sentence + (say(" (within noise)") if before != after and _is_chance(facts) else "") + _earlier(facts, say)


def _is_chance(facts: Facts) -> bool:
    """Whether the interval of what the stage did to its own tasks holds 0; False where no interval is known."""
    matrix, own = facts["forgetting"], f"stage {facts['stage']}"
    row = next((row["cells"] for row in matrix["rows"] if row["model"] == own), None) if matrix else None
    change = row[matrix["tasks"].index(own)]["change"] if row and own in matrix["tasks"] else None
    return change is not None and not change["real"]


def _own_scores(facts: Facts) -> tuple[float | None, float | None]:
    """The stage's own questions as answered before and after it: by the matrix, else by its evaluations."""
    matrix, own = facts["forgetting"], f"stage {facts['stage']}"
    if matrix and own in matrix["tasks"]:
        column = matrix["tasks"].index(own)
        scores = {row["model"]: row["cells"][column]["score"] for row in matrix["rows"]}
        if scores.get(own) is not None:
            models = list(scores)
            earlier = [score for name in models[: models.index(own)] if (score := scores[name]) is not None]
            return earlier[-1] if earlier else None, scores[own]
    curve = facts["curves"].get("gen_score")
    return (curve[0][1] if len(curve) > 1 else None, curve[-1][1]) if curve else (None, None)


def _earlier(facts: Facts, say: Say) -> str:
    """What became of the tasks of the stages before: the end of the sentence."""
    matrix, own = facts["forgetting"], f"stage {facts['stage']}"
    cells: list[Facts] = next((row["cells"] for row in matrix["rows"] if row["model"] == own), []) if matrix else []
    earlier = {name: cell for name, cell in zip(matrix["tasks"], cells, strict=True) if name != own} if cells else {}
    fell = {name: cell["drop"] for name, cell in earlier.items() if cell["drop"]}
    if fell:
        name, drop = max(fell.items(), key=lambda item: item[1]["lost"])
        return say("; on the tasks of {tasks} it fell by {lost}.", tasks=label(name, say), lost=f"{drop['lost']:.2f}")
    scored = any(cell["score"] is not None for cell in earlier.values())
    return say("; nothing earlier fell.") if scored else say(".")


def _best(facts: Facts, say: Say) -> str:
    """Which checkpoint was chosen, by what, and how it compares with the last evaluation."""
    best = facts["best"] or {}
    name, value, checkpoint = (best.get(key) for key in ("best_metric_name", "best_metric", "best_model_checkpoint"))
    if not isinstance(name, str) or value is None or not checkpoint:
        return ""
    greater = best.get("greater_is_better")
    try:  # records of before don't say which way is better
        way = "highest" if (metric_direction(name) if greater is None else greater) else "lowest"
    except ValueError:
        return ""
    text = f"Best model: {{checkpoint}}, where {{metric}} was {way} ({{value}})."
    sentence = say(text, checkpoint=str(checkpoint).split("/")[-1], metric=name, value=figure(value))
    last = (facts["curves"].get(name) or [[None, value]])[-1]
    if last[0] in (None, best.get("step")):
        return sentence
    sentence += " " + say("The last evaluation had {last}.", last=figure(last[1]))
    found = best.get("against_last")
    if not found:
        return sentence
    real = "The difference is real" if found["real"] else "The difference is within noise"
    text = f"{real} (95 % interval {{low}} to {{high}} over {{count}} questions)."
    ends = {name: f"{found[name]:+.3f}" for name in ("low", "high")}
    return f"{sentence} {say(text, **ends, count=found['questions'])}"

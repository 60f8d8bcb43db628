"""Reports of a stage and of a ladder: report.html to read, report.json with the same facts, terminal tables.

Everything comes from files on disk (facts.py), so a report can be made of a running, killed or copied stage.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sft.distributed.launch import launched
from sft.environment import person_language
from sft.errors import REPOSITORY, hide_secrets
from sft.reporting import plots
from sft.reporting.facts import ladder_facts, ladder_matrix, stage_facts
from sft.reporting.language import Say, say_in
from sft.reporting.lead import stage_lead
from sft.reporting.text import (
    aligned,
    counted,
    duration,
    figure,
    label,
    language_of,
    plain,
    score,
    scored,
    signed,
    spaces,
)
from sft.reporting.tracker import NOTE_TAG, Tracker
from sft.scoring import forgetting
from sft.stages import paths
from sft.storage.atomic import write_text
from sft.storage.json_files import Facts, write_json

if TYPE_CHECKING:
    from sft.settings import Settings
    from sft.stages.manifest import Manifest
    from sft.stages.stage import Stage


TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path, language: str = "auto", *, manifest: Manifest | None = None) -> Path:
    """Writes report.html and report.json into a stage's folder and returns the path of the page. `language`: that of
    the page's fixed texts, as in SFT_REPORT_LANGUAGE; report.json is the same in any. `manifest`: as in stage_facts."""
    facts = stage_facts(folder, manifest)
    shown = spoken(language)
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            facts
            | shown
            | {"lead": stage_lead(facts, shown["_"]), "charts": _stage_charts(facts["curves"], shown["_"])}
        )
    )
    write_json(folder / paths.REPORT_FACTS, facts)
    write_text(folder / paths.REPORT, page)
    return folder / paths.REPORT


def write_ladder_report(folders: Sequence[Path], target: Path, language: str = "auto") -> Path:
    """Writes the page that compares a ladder's stages, in order, to `target` and its facts beside it as .json."""
    facts = ladder_facts(folders)
    links = [quote(os.path.relpath(folder / paths.REPORT, target.parent)) for folder in folders]
    template = _environment().get_template("ladder.html.jinja")
    shown = spoken(language)
    lead = [sentence for folder in folders for sentence in stage_lead(stage_facts(folder), shown["_"])[:1]]
    page = template.render(facts | shown | {"lead": lead, "links": links, "charts": _ladder_charts(facts, shown["_"])})
    write_json(target.with_suffix(".json"), facts)
    write_text(target, page)
    return target


def score_table(folders: Sequence[Path]) -> str:
    """Plain text: base and the model of every stage by overall score and score per format; "" without scores."""
    matrix = ladder_matrix(folders)
    if not matrix:
        return ""
    columns, scores = forgetting.format_scores(matrix)
    rows = [[model, *(score(scores[model].get(column)) for column in columns)] for model in matrix.models]
    return aligned([["model", *columns], *rows])


def forgetting_table(manifest: Manifest) -> str:
    """Plain text: models by stages' tasks, "!" at what fell by more than the margin, then what it was; "" without."""
    matrix = forgetting.Matrix.read(manifest.forgetting)
    if not matrix:
        return ""
    found = forgetting.drops(matrix)
    lost = {(drop.model, drop.tasks) for drop in found}
    rows = [["model", *(tasks if tasks == forgetting.GENERAL else f"{tasks} tasks" for tasks in matrix.tasks)]]
    for model in matrix.models:
        scores = {tasks: score(matrix.cell(model, tasks)) for tasks in matrix.tasks}
        rows.append([model, *(f"{text}{'!' if (model, tasks) in lost else ' '}" for tasks, text in scores.items())])
    return "\n".join([aligned(rows), *(f"! {drop.sentence()}" for drop in found)])


def html_page(template: str, facts: Mapping[str, Any], language: str = "en") -> str:
    """A page of the house's look from one of the templates here, for what is neither a stage nor a ladder."""
    return _environment().get_template(template).render(dict(facts) | spoken(language))


def spoken(language: str) -> Facts:
    """What a template needs to speak: the language's code and the function for its fixed texts."""
    code = person_language() if language == "auto" else language
    return {"lang": code, "_": say_in(code)}


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES, encoding="utf-8")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = {
        "figure": figure,
        "score": score,
        "signed": signed,
        "plain": plain,
        "duration": duration,
        "language": language_of,
        "label": label,
        "spaces": spaces,
        "scored": scored,
        "counted": counted,
    }
    environment.filters |= filters | {"format_of": forgetting.format_of}
    return environment


def _chart(svg: str, title: str, legend: Sequence[tuple[str, float | None, int]]) -> Facts:
    """A figure for the template: `legend` has name, last value and number (from 1) of every series."""
    return {"svg": Markup(svg), "title": title, "legend": legend}


def lines_chart(curves: Mapping[str, plots.Curve], title: str, **options: Any) -> list[Facts]:
    """A figure of the curves for the template, none where there are none. `options`: as of `plots.line_chart`."""
    if not curves:
        return []
    return [_chart(plots.line_chart(curves, title=title, **options), title, _legend(curves))]


def _legend(curves: Mapping[str, plots.Curve]) -> list[tuple[str, float | None, int]]:
    return [(name, curve[-1][1], number) for number, (name, curve) in enumerate(curves.items(), 1)]


def _stage_charts(curves: Mapping[str, plots.Curve], say: Say) -> list[Facts]:
    losses = {name: curve for name, curve in curves.items() if name.endswith("loss")}
    scores = {name: curve for name, curve in curves.items() if name.startswith("gen_")}
    rate = {"learning_rate": curves["learning_rate"]} if "learning_rate" in curves else {}
    speed = {"tokens_per_second": curves["tokens_per_second"]} if "tokens_per_second" in curves else {}
    unit = all(0 <= value <= 1 for curve in scores.values() for _, value in curve)
    step = say("step")
    charts = lines_chart(losses, say("Loss"), label=step)
    charts += lines_chart(scores, say("Scores of generated answers"), unit=unit, label=step)
    charts += lines_chart(rate, say("Learning rate"), zero=True, label=step)
    return charts + lines_chart(speed, say("Trained tokens per second"), zero=True, label=step)


def _ladder_charts(facts: Facts, say: Say) -> list[Facts]:
    charts = _matrix_charts(facts["forgetting"], say) if facts["forgetting"] else []
    for name, text in (("loss", "Training loss"), ("eval_loss", "Evaluation loss")):
        curves = {label(f"stage {s['stage']}", say): s["curves"][name] for s in facts["stages"] if name in s["curves"]}
        if curves:
            svg = plots.ladder_chart(list(curves.values()), title=say(text), label=say("steps of the whole ladder"))
            charts.append(_chart(svg, say(text), _legend(curves)))
    return charts


def _matrix_charts(matrix: Facts, say: Say) -> list[Facts]:
    """The matrix read down its columns, and the overall figures and formats of every model."""
    models = [label(row["model"], say) for row in matrix["rows"]]
    tasks = {
        say("tasks of {tasks}", tasks=label(name, say)): [row["cells"][place]["score"] for row in matrix["rows"]]
        for place, name in enumerate(matrix["tasks"])
    }
    title = say("Scores of each stage's tasks, from model to model")
    last = [next((score for score in reversed(scores) if score is not None), None) for scores in tasks.values()]
    legend = [(name, end, place % plots.COLOURS + 1) for place, (name, end) in enumerate(zip(tasks, last, strict=True))]
    charts = [_chart(plots.model_chart(tasks, models, title=title), title, legend)]
    columns, scores = matrix["columns"], matrix["format_scores"]
    bars = [[row.get(column) for column in columns] for row in scores.values()]
    # A stage has the colour of its curves below, the base the grey that is left.
    numbers = [(forgetting.stage_number(model) - 1) % plots.COLOURS + 1 for model in scores]
    title = say("Score of each model")
    legend = [(name, None, number) for name, number in zip(models, numbers, strict=True)]
    return [*charts, _chart(plots.bar_chart(bars, columns, title=title, numbers=numbers), title, legend)]


def close_stage(stage: Stage, tracker: Tracker | None) -> None:
    """Sends the report of a completed stage to MLflow and prints the summary."""
    manifest, report = stage.manifest, stage.folder / paths.REPORT
    if tracker:
        headline = stage_lead(stage_facts(stage.folder), spoken(stage.settings.report_language)["_"])
        tracker.log_tags({"lineage.adapter": str(manifest.adapter_sha256), NOTE_TAG: " ".join(headline)})
        for path in (stage.folder / paths.MANIFEST, report, stage.folder / paths.REPORT_FACTS):
            tracker.log_artifact(path)
    metrics = manifest.metrics
    figures = [f"{manifest.steps} steps", f"{metrics.get('tokens', 0):,} tokens"]
    shown = {"loss": "loss", "eval_loss": "eval loss", "gen_score": "gen_score"}
    figures += [f"{text} {metrics[name]:.4f}" for name, text in shown.items() if metrics.get(name) is not None]
    print(f"\nStage {stage.number} is complete: {', '.join(figures)}")
    if table := forgetting_table(manifest):
        print(f"\nForgetting matrix (gen_score; rows: models, columns: each stage's validation rows)\n{table}")
    best = stage.folder / paths.BEST_MODEL
    kept = f"  best     {best}\n" if best.is_dir() else ""
    print(f"\n  adapter  {stage.folder}\n{kept}  report   {report}\n")


def stage_folders(ladder: Sequence[Settings]) -> list[Path]:
    return [paths.stage_folder(settings.out_lora_dir, settings.stage) for settings in ladder]


def close_ladder(ladder: Sequence[Settings]) -> None:
    """Writes the report that compares the stages and prints score table, report and how to open MLflow."""
    if launched().rank > 0:
        return
    folders = [folder for folder in stage_folders(ladder) if (folder / paths.MANIFEST).is_file()]
    report = write_ladder_report(folders, Path(f"{ladder[-1].out_lora_dir}_report.html"), ladder[-1].report_language)
    store = hide_secrets(ladder[-1].mlflow_tracking_uri)
    if table := score_table(folders):
        print(f"\nScores of base model and stages (gen_score, 0 to 1, on rows never trained on)\n{table}\n")
    print(f"Report: {report}")
    if not any("mlflow" in settings.report_to for settings in ladder):
        return
    show = "official_content/mlflow_ui.sh" if REPOSITORY else f"mlflow ui --port 58000 --backend-store-uri {store}"
    print(f"MLflow: {show}   (then open http://127.0.0.1:58000/#/experiments?workflowType=machine_learning)")

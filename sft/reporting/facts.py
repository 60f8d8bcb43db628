"""What the files of a finished, running or killed stage say: every figure of its report, read from disk only.

Whatever is missing or unreadable is left out (None or empty), and named in ``notices`` when it was there but broken.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft.reporting.differences import ladder_changes
from sft.reporting.language import english
from sft.reporting.lead import stage_lead
from sft.reporting.scores import (
    best_against_last,
    compared_scores,
    matrix_facts,
    read_answers,
    read_evaluations,
    score_names,
)
from sft.reporting.text import printable
from sft.scoring import forgetting
from sft.settings.values import recordable
from sft.stages import paths
from sft.stages.manifest import Manifest, readable_parts
from sft.storage.json_files import Facts, is_number, read_object, read_records

LONGEST_CURVE = 400  # points, about the pixels of a figure; more are averaged in equal groups
SECRET_WORDS = {"TOKEN", "KEY", "PASSWORD", "PASSWD", "SECRET", "CREDENTIAL", "CREDENTIALS", "APIKEY"}


def stage_facts(folder: Path, manifest: Manifest | None = None) -> Facts:
    """Everything report.json holds about one stage. `manifest`: that of a stage about to be complete, else the file."""
    notices: list[str] = []
    if manifest is None:
        manifest = _manifest(folder, notices)
    records = read_records(folder / paths.METRICS, notices)
    lines = [record for record in records if isinstance(record.get("step"), int)]
    evaluations = read_evaluations(folder, lines, notices)
    settings = _settings(manifest)
    facts = _header(folder, manifest, lines) | {
        "best": _best(folder, notices),
        "curves": _curves(lines, evaluations),
        "scores": compared_scores(evaluations),
        "forgetting": matrix_facts(forgetting.Matrix.read(manifest.forgetting)),
        "gate": manifest.gate,
        "mix": _mix(manifest),
        "masked_loss": manifest.masked_loss or None,
        "answers": read_answers(folder, notices),
        "lineage": _lineage(manifest),
        "changed_settings": _changed_settings(folder, settings),
        "settings": settings,
        "versions": manifest.versions,
        "notices": notices,
    }
    return printable(facts | {"lead": stage_lead(facts, english)})


def _manifest(folder: Path, notices: list[str]) -> Manifest:
    return readable_parts(read_object(folder / paths.MANIFEST, notices))


def _best(folder: Path, notices: list[str]) -> Facts | None:
    best = read_object(folder / paths.BEST_MODEL / paths.BEST_RECORD, notices)
    found = best_against_last(folder, best)
    return best | ({"against_last": found._asdict() | {"real": found.real}} if found else {}) or None


def ladder_facts(folders: Sequence[Path]) -> Facts:
    """What a ladder's report holds: its stages in order, one matrix of all of them, and the settings they differ in."""
    stages = [stage_facts(folder) for folder in folders]
    matrix = ladder_matrix(folders)
    facts = {
        "lead": [sentence for stage in stages for sentence in stage["lead"][:1]],
        "base_model": next((stage["base_model"] for stage in stages if stage["base_model"]), None),
        "seconds": sum(stage["seconds"] or 0 for stage in stages),
        "stages": [_summary(stage) for stage in stages],
        "forgetting": matrix_facts(matrix),
        "answers": ladder_changes({stage["stage"]: folder for stage, folder in zip(stages, folders, strict=True)}),
        "differing_settings": differing({f"stage {stage['stage']}": stage["settings"] for stage in stages}),
        "notices": [f"Stage {stage['stage']}: {text}" for stage in stages for text in stage["notices"]],
    }
    return printable(facts)


def ladder_matrix(folders: Sequence[Path]) -> forgetting.Matrix | None:
    """One matrix of all that the stages recorded."""
    records = (_manifest(folder, []).forgetting for folder in folders)
    return forgetting.joined(forgetting.Matrix.read(record) for record in records)


def _summary(stage: Facts) -> Facts:
    kept = (
        "stage",
        "gate",
        "folder",
        "status",
        "seconds",
        "steps",
        "train_rows",
        "val_rows",
        "tokens",
        "curves",
        "scores",
    )
    return {name: stage[name] for name in kept} | {
        "loss": _ends(stage["curves"].get("loss")),
        "eval_loss": _ends(stage["curves"].get("eval_loss")),
        "learning_rate": stage["settings"].get("SFT_LR", {}).get("value"),
        "best": stage["best"],
        "gated": bool(stage["settings"].get("SFT_GATE", {}).get("value")),
    }


def _ends(curve: list[list[float]] | None) -> list[float] | None:
    return [curve[0][1], curve[-1][1]] if curve else None


def _header(folder: Path, manifest: Manifest, lines: list[Facts]) -> Facts:
    number = re.search(r"_stage(\d+)$", paths.stage_name(folder))
    started, finished = _moment(manifest.started), _moment(manifest.finished)
    ended = finished or _moment(next((line["time"] for line in reversed(lines) if "time" in line), None))
    return {
        "base_model": manifest.base_model or None,
        "train_rows": manifest.train_rows,
        "val_rows": manifest.val_rows,
        "mlflow_run_id": manifest.mlflow_run_id,
        "stage": manifest.stage or (int(number.group(1)) if number else None),
        "folder": folder.name,
        "status": manifest.status if "status" in manifest.model_fields_set else "unknown",
        "started": started.isoformat() if started else None,
        "finished": finished.isoformat() if finished else None,
        "seconds": round((ended - started).total_seconds(), 1) if started and ended else None,
        "tokens": _picked(manifest.tokens, ("total", "trained")),
        "steps": manifest.steps,
        "last_step": lines[-1]["step"] if lines else None,
        "metrics": manifest.metrics,
    }


def _picked(record: Mapping[str, Any] | None, names: Sequence[str]) -> Facts | None:
    return {name: record.get(name) for name in names} if record else None


def _moment(value: Any) -> datetime | None:
    """ISO text or Unix seconds -> UTC, None for anything else."""
    try:
        moment = datetime.fromtimestamp(value, UTC) if is_number(value) else datetime.fromisoformat(str(value))
    except (ValueError, OverflowError, OSError):
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).replace(microsecond=0)


def _curves(lines: list[Facts], evaluations: Mapping[int, Mapping[str, float]]) -> dict[str, list[list[float]]]:
    """metric -> [step, value] pairs of what is plotted; a step logged twice (a resumed run) keeps the later value."""
    losses = sorted({name for line in lines for name in line if re.fullmatch(r"eval_(\w+_)?loss", name)})
    plotted = ["loss", *losses, "learning_rate", "grad_norm", "tokens_per_second"]
    curves = {name: {line["step"]: line[name] for line in lines if is_number(line.get(name))} for name in plotted}
    for name in score_names(evaluations):
        curves[name] = {step: metrics[name] for step, metrics in evaluations.items() if name in metrics}
    return {name: _thinned(sorted(points.items())) for name, points in curves.items() if points}


def _thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    group = -(-len(points) // LONGEST_CURVE)
    groups = (points[start : start + group] for start in range(0, len(points), group))
    return [[chunk[-1][0], sum(value for _, value in chunk) / len(chunk)] for chunk in groups]


def _mix(manifest: Manifest) -> Facts:
    wanted = ("id", "split", "weight", "rows", "validation_rows", "drawn", "fingerprint")
    sources = [{name: getattr(source, name) for name in wanted} for source in manifest.sources]
    dropped = {reason: rows for reason, rows in manifest.dropped.items() if rows}
    return {"sources": sources, "dropped": dropped, "upsampling": manifest.upsampling, "replay": manifest.replay}


def _lineage(manifest: Manifest) -> Facts:
    parents = [{"stage": parent.stage, "adapter_sha256": parent.adapter_sha256} for parent in manifest.parents]
    merge = _picked(manifest.merge, ("max_abs_diff", "kl", "seconds", "peak_rss_bytes"))
    return {"parents": parents, "merge": merge, "adapter_sha256": manifest.adapter_sha256}


def _settings(manifest: Manifest) -> dict[str, Facts]:
    """Every recorded setting but those whose name says secret (HF_TOKEN, not SFT_GEN_MAX_NEW_TOKENS)."""
    return {
        name: {"value": recordable(record.value), "origin": record.origin}
        for name, record in sorted(manifest.settings.items())
        if not SECRET_WORDS & set(name.upper().split("_"))
    }


def _changed_settings(folder: Path, settings: dict[str, Facts]) -> list[Facts] | None:
    """Settings that differ from the stage before, read from its own manifest; None for stage 1 or without one."""
    found = re.fullmatch(r"(.*_stage)(\d+)", paths.stage_name(folder))
    if not found:
        return None
    before = _settings(_manifest(folder.with_name(f"{found.group(1)}{int(found.group(2)) - 1}"), []))
    return differing({"before": before, "now": settings}) if before else None


def differing(by_label: Mapping[str, dict[str, Facts]]) -> list[Facts]:
    """Rows {"name", "values": {label: value}} of the settings that are not the same under every label."""
    rows = []
    for name in sorted({name for settings in by_label.values() for name in settings}):
        values = {label: settings.get(name, {}).get("value") for label, settings in by_label.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            rows.append({"name": name, "values": values})
    return rows

"""Who is asked what when a stage ends: models and questions of all stages before it, whatever they trained."""

import json
from types import SimpleNamespace

import pytest

from sft.evaluation import ladder_scores
from sft.scoring.forgetting import Matrix
from sft.stages.manifest import blank_manifest
from sft.storage.json_files import write_json


class Parrot:
    """Answers every question with its reference, and scores by task."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def of_stage(self, manifest):
        return self

    def answer(self, model, rows, *, accelerator):
        self.asked.append((model, [row["task"] for row in rows]))
        return [row["reference"] for row in rows]

    def score(self, rows, answers):
        return [{"score": 1.0} for _ in rows], {"gen_score": 1.0} | {f"gen_score/{row['task']}": 1.0 for row in rows}


@pytest.fixture
def fourth(tmp_path):
    """Stage 4 of a ladder whose stage 2 was trained in full and whose stage 3 stopped evaluating; tasks by number."""

    def folder(number):
        return tmp_path / f"out_stage{number}"

    for number in (1, 2, 3):
        folder(number).mkdir()
        record = blank_manifest().record() | {
            "stage": number,
            "status": "complete",
            "base_model": "b",
            "adapter_sha256": "a",
        }
        matrix = Matrix({"base": {"stage 1": {"": 0.1}}, "stage 1": {"stage 1": {"": 0.8, "task 1": 0.8}}})
        write_json(folder(number) / "stage.json", record | ({"forgetting": matrix.record()} if number == 1 else {}))
        row = {"task": f"task {number}", "prompt": [], "reference": "r", "kind": "structured"}
        (folder(number) / "gen_rows.jsonl").write_text(json.dumps(row) + "\n")
        holder = folder(number) if number == 2 else tmp_path / f"out_stage{number}_merged_base"
        holder.mkdir(exist_ok=True)
        (holder / "config.json").write_text("{}")
        if number != 2:
            (folder(number) / "adapter_config.json").write_text("{}")
    (tmp_path / "out_stage2_merged_base").mkdir()
    (tmp_path / "out_stage2_merged_base" / "config.json").write_text("{}")
    folder(4).mkdir()
    lines = [
        {"step": 0, "gen_score": 0.2, "gen_score/odd (easy)": 0.2},
        {"step": 9, "gen_score": 0.9, "eval_loss": 1.0},
    ]
    (folder(4) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(
        number=4,
        folder=folder(4),
        settings=SimpleNamespace(out_lora_dir=tmp_path / "out", base_model="base/model", forgetting_margin=0.05),
        parents=(
            SimpleNamespace(stage=2, folder=folder(2), kind="model"),
            SimpleNamespace(stage=3, folder=folder(3), kind="adapter"),
        ),
    )


def test_models_before_a_fully_trained_stage_are_still_asked(fourth, tmp_path):
    """The base, stage 1 (what stage 2 started from), stage 2 (its own folder); stage 3 is this stage's step 0."""
    assert ladder_scores.earlier_models(fourth) == {
        "base": "base/model",
        "stage 1": str(tmp_path / "out_stage2_merged_base"),
        "stage 2": str(tmp_path / "out_stage2"),
    }


def test_questions_before_a_fully_trained_stage_are_still_asked(fourth):
    """Every earlier stage's questions, each score under its task key whatever it looks like; old cells are kept."""
    rows = [{"task": "odd (easy)", "prompt": [], "reference": "r"}]
    evaluation = Parrot(rows)
    earlier = Matrix({"stage 1": {"stage 4": {"": 0.3}}})
    record = ladder_scores.ladder_scores(
        fourth, evaluation, earlier, general=Matrix(), model="m", accelerator=None, step=9
    )
    assert evaluation.asked == [("m", ["task 1"]), ("m", ["task 2"]), ("m", ["task 3"])]
    assert (record["models"], record["tasks"]) == (
        ["base", "stage 1", "stage 3", "stage 4"],
        ["stage 1", "stage 2", "stage 3", "stage 4"],
    )
    assert record["scores"] == [
        [0.1, None, None, None],
        [0.8, None, None, 0.3],
        [None, None, None, 0.2],
        [1.0, 1.0, 1.0, 0.9],
    ]
    assert record["by_question"]["stage 4"] == {"stage 1": [1.0], "stage 2": [1.0], "stage 3": [1.0]}
    assert record["by_task"]["stage 4"]["stage 1"] == {"task 1": 1.0}
    assert record["by_task"]["stage 3"]["stage 4"] == {"odd (easy)": 0.2}


def test_a_damaged_or_unfinished_stage_is_not_asked(fourth, tmp_path):
    """Nor does it end the run: what it says can't be trusted."""
    (tmp_path / "out_stage1" / "stage.json").write_text("{")
    assert list(ladder_scores.earlier_stages(fourth)) == [2, 3]

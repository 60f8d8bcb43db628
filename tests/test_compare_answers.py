"""compare_answers.py: what changed in the answers from stage to stage, per format, task and key."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from official_content import compare_answers
from sft.reporting.differences import answers_of, compare_stages, ladder_changes
from sft.scoring.differences import Key, changes, counted, differing_keys, is_right
from sft.scoring.score import score
from tests.ladders import make_settings


def samples(*answers: str, task: str = "text_to_json", wanted: str = '{"a": 1, "b": {"c": [2, 3]}}') -> list[dict]:
    """Answers to as many questions, judged as a run judges them."""
    rows: list[dict[str, Any]] = [
        {"task": task, "prompt": [{"role": "user", "content": f"question {n}"}], "reference": wanted, "answer": answer}
        for n, answer in enumerate(answers)
    ]
    return [row | found for row, found in zip(rows, score("structured", rows)[0], strict=True)]


RIGHT, WRONG, BROKEN = '{"a": 1, "b": {"c": [2, 3]}}', '{"a": "1", "b": {"c": [2]}, "d": 5}', '{"a": 1'


def test_an_answer_is_right_by_its_content_else_its_score_else_its_text():
    """All keys with another value score 1.0 and are wrong; without a reading of the reference the score decides."""
    (right, other) = samples(RIGHT, RIGHT.replace("3", "4"))
    assert (other["score"], is_right(right), is_right(other)) == (1.0, True, False)
    assert is_right({"score": 1.0, "answer": "x", "reference": "y"})
    assert not is_right({"score": 0.9, "exact": None, "answer": "y", "reference": "y"})
    assert is_right({"score": None, "answer": " y\n", "reference": "y"})


def test_the_four_ways_an_answer_can_change():
    """Four questions, one of each; counted over all, per format and per task."""
    found = changes(samples(WRONG, RIGHT, WRONG, RIGHT), samples(RIGHT, BROKEN, BROKEN, RIGHT))
    assert [change.kind for change in found] == ["repaired", "broken", "both wrong", "both right"]
    once = {"repaired": 1, "broken": 1, "both wrong": 1, "both right": 1}
    assert counted(found) == {"": once, "json": once, "text_to_json": once}
    assert found[3].keys == ()
    assert found[0].prompt == "question 0"
    with pytest.raises(ValueError, match="not asked the same"):
        changes(samples(RIGHT), samples(RIGHT, wanted="{}"))


def test_keys_in_which_an_answer_is_not_as_wanted():
    """Another type, a missing item, one too many; what both have right is not listed; unreadable lacks all."""
    reference = '{"a": 1, "b": {"c": [2, 3]}, "e": "x"}'
    before = '{"a": "1", "b": {"c": [2]}, "e": "x", "d": null}'
    assert list(differing_keys("text_to_json", reference, before, BROKEN)) == [
        Key("a", 1, "1", "(missing)"), Key("b.c[0]", 2, 2, "(missing)"), Key("b.c[1]", 3, "(missing)", "(missing)"),
        Key("e", "x", "x", "(missing)"), Key("d", "(missing)", None, "(missing)"),
    ]  # fmt: skip
    assert list(differing_keys("text_to_yaml", "a: 1\nb: x", "a: 1\nb: y", "a: 1\nb: x")) == [Key("b", "x", "y", "x")]
    assert list(differing_keys("", "no data", "a", "b")) == []


def ladder(folder: Path) -> dict[int, Path]:
    """Three stages that kept their answers, as a run leaves them."""
    for number in (1, 2, 3):
        make_settings(folder, number)
    folders = {number: folder / f"out_stage{number}" for number in (1, 2, 3)}
    table = "csv_to_json"
    files = {
        (1, "step9"): samples(RIGHT, RIGHT),
        (2, "of_stage1"): samples(RIGHT, WRONG),
        (2, "step0"): samples(WRONG, WRONG, task=table),
        (2, "step4"): samples(WRONG, WRONG, task=table),
        (2, "step12"): samples(RIGHT, WRONG, task=table),
        (3, "of_stage1"): samples(WRONG, WRONG),
        (3, "of_stage2"): samples(BROKEN, WRONG, task=table),
        (3, "by_stage1"): samples(BROKEN),
        (3, "step0"): samples(WRONG),
        (3, "step8"): samples(RIGHT),
    }
    for (number, name), kept in files.items():
        folders[number].mkdir(exist_ok=True)
        lines = "".join(json.dumps(sample) + "\n" for sample in kept)
        (folders[number] / f"gen_samples_{name}.jsonl").write_text(lines)
    return folders


def test_each_models_answers_are_found(tmp_path: Path):
    """A model's own questions at its last step; earlier ones beside them; later ones with the stage that asked."""
    folders = ladder(tmp_path)
    names = {
        (model, questions): str(answers_of(folders, model, questions).relative_to(tmp_path))
        for model in (1, 2, 3)
        for questions in (1, 2, 3)
    }
    assert names == {
        (1, 1): "out_stage1/gen_samples_step9.jsonl", (1, 2): "out_stage2/gen_samples_step0.jsonl",
        (1, 3): "out_stage3/gen_samples_by_stage1.jsonl", (2, 1): "out_stage2/gen_samples_of_stage1.jsonl",
        (2, 2): "out_stage2/gen_samples_step12.jsonl", (2, 3): "out_stage3/gen_samples_step0.jsonl",
        (3, 1): "out_stage3/gen_samples_of_stage1.jsonl", (3, 2): "out_stage3/gen_samples_of_stage2.jsonl",
        (3, 3): "out_stage3/gen_samples_step8.jsonl",
    }  # fmt: skip
    kinds = {each.questions: [change.kind for change in each.found] for each in compare_stages(folders, 2, 3)}
    assert kinds == {1: ["broken", "both wrong"], 2: ["broken", "both wrong"], 3: ["repaired"]}
    back = {each.questions: [change.kind for change in each.found] for each in compare_stages(folders, 3, 2)}
    assert back == {1: ["repaired", "both wrong"], 2: ["repaired", "both wrong"], 3: ["broken"]}


def test_the_ladders_report_goes_from_stage_to_stage(tmp_path: Path):
    """1 to 2 on the questions of 1 and 2, 2 to 3 on those of all; the broken ones with their keys."""
    found = ladder_changes(ladder(tmp_path))
    assert [(each["before"], each["after"], each["questions"]) for each in found] == [
        (1, 2, 1), (1, 2, 2), (2, 3, 1), (2, 3, 2), (2, 3, 3),
    ]  # fmt: skip
    (broken,) = found[0]["broken"]
    assert broken["keys"][0] == {"path": "a", "wanted": 1, "before": 1, "after": "1"}
    assert found[1]["counts"][0] == {"name": "", "repaired": 1, "broken": 0, "both wrong": 1, "both right": 0}


def run(monkeypatch: Any, folder: Path, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_answers.py", "--env-dir", str(folder), *map(str, arguments)])
    return compare_answers.program()


def test_people_read_tables_and_keys(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    """A section per stage asked; the interval of the score; before, after and wanted of each key."""
    ladder(tmp_path)
    assert run(monkeypatch, tmp_path, "--stage", 1, "--with", 2) == 0
    page = capsys.readouterr().out
    assert "From stage 1 to stage 2, on the 2 questions of stage 1" in page
    assert "repaired  broken  both wrong  both right" in page
    assert "text_to_json         0       1           0           1" in page
    assert 'a: 1 -> "1" (wanted 1)' in page
    assert "b.c[1]: 3 -> (missing) (wanted 3)" in page
    assert "over 2 questions: within noise" in page


def test_programs_read_one_document(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    """Every answer of every stage's questions, with counts and interval."""
    ladder(tmp_path)
    assert run(monkeypatch, tmp_path, "--stage", 2, "--with", 3, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["stage"], document["with"]) == (2, 3)
    first, second, third = document["questions"]
    assert (first["of_stage"], first["missing"], first["counts"]["json"]["broken"]) == (1, None, 1)
    assert second["answers"][0]["kind"] == "broken"
    assert (third["difference"]["mean"] > 0, third["answers"][0]["reference"]) == (True, RIGHT)


def test_missing_answers_are_named_with_what_makes_them(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
):
    """One set missing is a warning beside the others, all of them exit 2; a stage with itself, or none, as well."""
    folders = ladder(tmp_path)
    (folders[3] / "gen_samples_of_stage1.jsonl").unlink()
    assert run(monkeypatch, tmp_path, "--stage", 2, "--with", 3) == 0
    said = capsys.readouterr()
    assert "questions of stage 2" in said.out
    assert "[WARNING] no answers of stage 3 to the questions of stage 1 (" in said.err
    assert "--stage 3 " in said.err
    assert "--fresh leaves them" in said.err
    for folder in folders.values():
        for file in folder.glob("gen_samples_*"):
            file.unlink()
    assert run(monkeypatch, tmp_path, "--stage", 1, "--with", 2) == 2
    assert "[ERROR] no answers of stage 1 to the questions of stage 1" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path, "--stage", 2, "--with", 2) == 2
    assert run(monkeypatch, tmp_path, "--stage", 2, "--with", 7) == 2
    assert "stage7.env" in capsys.readouterr().err

"""Gates: exit code 3 where a stage is no better or forgot something, with the reasons; nothing is deleted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft.errors import Problems
from sft.reporting.gate import exit_code, judge_stage, passed
from sft.scoring.forgetting import GENERAL, Matrix
from sft.scoring.gates import NOTHING_COMPARED, judge
from sft.settings import load_settings
from sft.stages.stage import Stage
from tests import ladders
from tests.test_plan import run_check
from tests.tiny import run_train, write_model, write_rows, write_stage

ALL, HALF, NONE = [1.0] * 40, [1.0, 0.0] * 20, [0.0] * 40


def matrix(margin: float = 0.05, **cells: list[float] | float) -> Matrix:
    """Cells named model_tasks: base_1 is the base model on stage 1's tasks, g are the general questions."""
    names = {"base": "base", "g": GENERAL}
    found = Matrix(margin=margin)
    for name, scores in cells.items():
        model, tasks = (names.get(part, f"stage {part}") for part in name.lstrip("s").split("_"))
        each = scores if isinstance(scores, list) else []
        mean = sum(scores) / len(scores) if isinstance(scores, list) else scores
        found.put(model, tasks, {"": mean}, each)
    return found


def test_a_stage_that_rose_and_forgot_nothing_passes():
    """Its own score against the model before it, stage 1's and the general questions against the best before."""
    found = judge(matrix(base_1=NONE, s1_1=ALL, s2_1=ALL, s1_2=NONE, s2_2=HALF, base_g=HALF, s1_g=HALF, s2_g=HALF), 2)
    assert (found.passed, found.reasons) == (True, [])
    assert [(check.tasks, check.since, check.before, check.after) for check in found.checks] == [
        ("stage 1", "stage 1", 1.0, 1.0), ("stage 2", "stage 1", 0.0, 0.5), (GENERAL, "base", 0.5, 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(("after", "fails"), [(HALF, True), (NONE, True), (0.5, True), ([*HALF[:-1], 1.0], False)])
def test_its_own_score_must_rise(after: Any, fails: bool):
    """As good as before is not better; one answer more of 40 is."""
    found = judge(matrix(base_1=HALF, s1_1=after), 1)
    assert found.passed is not fails
    assert [
        reason.startswith("stage 1 did not raise its own tasks of stage 1: 0.500 -> ") for reason in found.reasons
    ] == [True] * fails


def falls(count: int) -> Matrix:
    """A second stage that rose, and lost `count` of 40 answers of the first."""
    return matrix(base_1=NONE, s1_1=ALL, s2_1=[0.0] * count + [1.0] * (40 - count), s1_2=NONE, s2_2=ALL)


@pytest.mark.parametrize(("lost", "passes"), [(0, True), (2, True), (8, False), (40, False)])
def test_an_earlier_stage_may_fall_within_the_margin(lost: int, passes: bool):
    """2 of 40 are 0.05, the margin; 8 are 0.2, and no chance."""
    found = judge(falls(lost), 2)
    assert found.passed is passes
    if not passes:
        (reason,) = found.reasons
        assert reason.startswith(f"stage 2 lost {lost / 40:.3f} on the tasks of stage 1 (stage 1 scored 1.000, now ")
        assert "95 % interval of the loss" in reason


def test_a_fall_that_may_be_chance_does_not_fail():
    """0.1 on ten questions, one answer: beyond the margin, within noise; unpaired the margin decides."""
    before, after = [1.0] * 10, [0.0] + [1.0] * 9
    own = {"base_1": [0.0] * 10, "s1_2": [0.0] * 10, "s2_2": before}
    assert judge(matrix(s1_1=before, s2_1=after, **own), 2).passed
    assert not judge(matrix(s1_1=1.0, s2_1=0.9, **own), 2).passed
    assert judge(matrix(s1_1=1.0, s2_1=0.9, **own, margin=0.2), 2).passed


def test_general_questions_that_fell_fail():
    """Against the best model before, the base: 0.9 to 0.4 of 40."""
    general = {"base_g": [1.0] * 36 + [0.0] * 4, "s1_g": [1.0] * 16 + [0.0] * 24}
    (reason,) = judge(matrix(base_1=NONE, s1_1=ALL, **general), 1).reasons
    assert reason.startswith("stage 1 lost 0.500 on the general questions (base scored 0.900, now 0.400; 95 % interval")


def test_later_stages_and_other_models_do_not_count():
    """Stage 1's gate is about stage 1, also where stage 2 has forgotten everything since."""
    whole = falls(40)
    assert judge(whole, 1).passed
    assert [check.tasks for check in judge(whole, 1).checks] == ["stage 1"]


def test_what_was_not_compared_does_not_pass():
    """No matrix, or none of its cells is this stage's beside another's: said so."""
    assert judge(None, 1).reasons == [NOTHING_COMPARED]
    assert judge(matrix(s1_1=ALL), 1).reasons == [NOTHING_COMPARED]


def test_the_record_is_plain_json():
    """What pipelines read: passed, the reasons, and every comparison with its interval."""
    record = json.loads(json.dumps(judge(falls(8), 2).record()))
    assert (record["passed"], len(record["reasons"])) == (False, 1)
    first, second = record["checks"]
    assert (first["tasks"], first["failed"], first["difference"]["mean"]) == ("stage 1", True, -0.2)
    assert first["difference"]["high"] < 0.0
    assert first["difference"]["real"] is True
    assert (second["tasks"], second["failed"], second["reason"]) == ("stage 2", False, "")


def complete(folder: Path, scores: Matrix | None, number: int = 1) -> None:
    with Stage.open(ladders.make_settings(folder, number)) as stage:
        stage.begin()
        ladders.add_adapter(stage.folder, b"adapter %d" % number)
        stage.complete(forgetting=scores and scores.record())


def test_a_complete_stage_is_judged_by_what_it_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With the margin of now; people read it on stderr, pipelines one line of JSON on stdout."""
    complete(tmp_path, matrix(base_1=NONE, s1_1=ALL))
    complete(tmp_path, falls(8), 2)
    first = judge_stage(ladders.make_settings(tmp_path))
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()[0]) == ("", "Gate of stage 1: passed")
    assert "held: tasks of stage 1: 0.000 -> 1.000 (+1.000, 95 % interval" in said.err
    second = judge_stage(ladders.make_settings(tmp_path, 2))
    assert second["gate"]["reasons"][0] in capsys.readouterr().err
    assert [passed(each) for each in (first, second)] == [True, False]
    assert passed(judge_stage(ladders.make_settings(tmp_path, 2, forgetting_margin=0.3)))
    assert (exit_code([], as_json=False), exit_code([first], as_json=False)) == (0, 0)
    capsys.readouterr()
    assert (exit_code([first, second], as_json=True), exit_code([second], as_json=True)) == (3, 3)
    both, alone = map(json.loads, capsys.readouterr().out.splitlines())
    assert (both, alone) == ([first, second], second)


def test_nothing_to_compare_is_refused_by_the_settings(tmp_path: Path):
    """Exit 2 before anything is looked at; with general questions, or scored answers, there is something."""
    for mode in ("none", "samples"):
        with pytest.raises(Problems, match=f"SFT_GATE=1: there is nothing to compare: SFT_GEN_EVAL={mode} scores no"):
            ladders.make_settings(tmp_path, gate=1, gen_eval=mode, general_eval=0)
    assert ladders.make_settings(tmp_path, gate=1, gen_eval="none").gate
    ladders.make_settings(tmp_path, gen_eval="none", general_eval=0)
    with pytest.raises(Problems, match=r"SFT_GATE=1: .* SFT_GENERAL_EVAL=1 \(--gate\)"):
        load_settings(1, env_dir=tmp_path, environ={}, gate=True)
    assert ladders.make_settings(tmp_path, gate=1, gen_eval="structured", general_eval=0).gate


# The ladder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    base, rows = write_model(folder / "base"), write_rows(folder / "rows.jsonl", 40)
    common = {
        "SFT_BASE_MODEL": base, "SFT_OUT_LORA_DIR": folder / "out", "SFT_DATASET_ID": rows,
        "SFT_GEN_EVAL": "structured", "SFT_GEN_EVAL_SAMPLES": 3, "SFT_GEN_MAX_NEW_TOKENS": 4, "SFT_MAX_STEPS": 1,
    }  # fmt: skip
    for number in (1, 2):
        write_stage(folder, number, common)
    return folder


@pytest.mark.slow
def test_a_ladder_stops_at_the_rung_whose_gate_fails(place: Path, capsys: pytest.CaptureFixture[str]):
    """A random model answers nothing right, so its score did not rise: exit 3, stage 1 complete, stage 2 not begun;
    asked again the complete stage gives the same answer, without --gate 0."""
    command = ("--stage", "all", "--env-dir", place)
    assert run_train(*command, "--gate", "--json") == 3
    said = capsys.readouterr()
    reason = "stage 1 did not raise its own tasks of stage 1: 0.000 -> 0.000"
    assert reason in said.err
    last = json.loads(said.out.splitlines()[-1])
    assert (last["stage"], last["gate"]["passed"]) == (1, False)
    manifest, report = (json.loads((place / "out_stage1" / f"{n}.json").read_text()) for n in ("stage", "report"))
    assert manifest["status"] == "complete"
    assert manifest["gate"] == report["gate"]
    assert manifest["gate"]["reasons"][0].startswith(reason)
    assert "Gate failed." in (place / "out_stage1" / "report.html").read_text()
    assert (manifest["settings"]["SFT_GATE"]["origin"], (place / "out_stage2").exists()) == ("--gate", False)
    assert (place / "out_stage1" / "adapter_model.safetensors").is_file()
    assert run_train("--stage", 1, "--env-dir", place, "--gate") == 3
    assert reason in capsys.readouterr().err
    assert run_train("--stage", 1, "--env-dir", place) == 0


@pytest.mark.slow
def test_check_says_what_a_gated_run_would_refuse(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By the settings, and by rows that no score can be given for; the same words, exit 2, nothing written."""
    folder = tmp_path / "ladder"
    shutil.copytree(place, folder, ignore=shutil.ignore_patterns("out*"))
    plain = [json.dumps({"prompt": f"q{number}", "completion": f"a{number}"}) for number in range(30)]
    (folder / "plain.jsonl").write_text("\n".join(plain))
    rows = ("--set", f"SFT_DATASET_ID={folder / 'plain.jsonl'}")
    for more, words in (
        (("--set", "SFT_GEN_EVAL=none"), "SFT_GEN_EVAL=none scores no answers"),
        (rows, "no gen_score"),
    ):
        asked = ("--stage", 1, "--gate", *more, "--set", f"SFT_OUT_LORA_DIR={folder / 'out'}")
        code, document, _ = run_check(folder, capsys, *asked)
        assert (code, len(document["problems"])) == (2, 1)
        assert words in document["problems"][0]
        assert run_train(*asked, "--env-dir", folder) == 2
        assert f"[ERROR] {document['problems'][0]}" in capsys.readouterr().err
        assert not list(folder.glob("out*"))

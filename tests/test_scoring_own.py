"""Measures of a person's own (SFT_GEN_EVAL=metric.py:function) and answers held to a JSON Schema."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sft.evaluation import generation_evaluation
from sft.evaluation.answers import Answer
from sft.evaluation.generation_evaluation import GenerationEvaluation
from sft.scoring.metrics import metric_direction
from sft.scoring.own import (
    MeasureError,
    first_error,
    load_own,
    load_schema,
    lower_is_better,
    measure,
    metric_name,
    parts_of,
)
from sft.scoring.score import score
from sft.training.callbacks import StageRhythm
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

ROWS = [{"task": "t", "prompt": [{"role": "user", "content": f"q{n}"}], "reference": f"a{n}"} for n in range(3)]
ANSWERS = ["a0", "no", "a2"]


def own(folder: Path, text: str, name: str = "score") -> Any:
    path = folder / "own.py"
    path.write_text(text)
    found = load_own(f"{path}:{name}")
    assert found is not None
    return found


def test_what_a_function_gets_and_gives(tmp_path: Path):
    """Texts and rows in the same order; a dict gives gen_<name>, a number the function's own name."""
    text = """
def score(answers, rows):
    assert [type(a) for a in answers] == [str] * 3 and rows[1]["prompt"][-1]["content"] == "q1"
    right = [a == row["reference"] for a, row in zip(answers, rows)]
    rows.clear()
    return {"right": sum(right) / len(right), "gen_long": 7, "two words": True}

def plain(answers, rows):
    return 0.25
"""
    assert measure(own(tmp_path, text), ANSWERS, ROWS) == (
        {"gen_right": pytest.approx(2 / 3), "gen_long": 7.0, "gen_two_words": 1.0}, [],
    )  # fmt: skip
    assert measure(own(tmp_path, text, "plain"), ANSWERS, ROWS).metrics == {"gen_plain": 0.25}
    assert len(ROWS) == 3


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5)])
def test_numbers_of_other_libraries_are_numbers(tmp_path: Path, value: Any):
    """numpy's and torch's scalars are taken as they are."""
    found = own(tmp_path, "def score(answers, rows): return VALUE")
    found.function.__globals__["VALUE"] = value
    assert measure(found, ANSWERS, ROWS) == ({"gen_score": 0.5}, [])


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        ("'good'", "score is str 'good', which is no number"),
        ("'0.5'", "score is str '0.5', which is no number"),
        ("None", "score is NoneType 'None', which is no number"),
        ("[1, 2]", "score is list '[1, 2]', which is no number"),
        ("float('nan')", "score is nan"),
        ("{}", "it gave no numbers"),
        ("1 / 0", "ZeroDivisionError in line 1: division by zero (row 1: 'a0')"),
        ("int(answers[1])", "ValueError in line 1: invalid literal for int() with base 10: 'no'"),
        (
            "1 / (answers != ['no'] and len(answers) == 1)",
            "ZeroDivisionError in line 1: division by zero (row 2: 'no')",
        ),
        ("1 / (len(answers) - 3)", "ZeroDivisionError in line 1: division by zero"),
        ("exit(4)", "SystemExit in line 1: 4 (row 1: 'a0')"),
    ],
)
def test_what_is_wrong_is_said_with_its_row_and_raises_nothing(tmp_path: Path, returned: str, complaint: str):
    """The line of the file, and the first row that fails alone; where each alone is fine, none."""
    assert measure(own(tmp_path, f"def score(answers, rows): return {returned}"), ANSWERS, ROWS) == ({}, [complaint])


def test_numbers_beside_what_is_none_are_kept(tmp_path: Path):
    """One entry of three is text."""
    found = measure(own(tmp_path, "def score(a, r): return {'x': 1, 'y': 'two', 'z': 3}"), ANSWERS, ROWS)
    assert found == ({"gen_x": 1.0, "gen_z": 3.0}, ["y is str 'two', which is no number"])


def test_which_way_is_better_is_the_functions_word(tmp_path: Path):
    """Higher, unless lower_is_better names it, with or without gen_; nothing built in may be turned round."""
    path = tmp_path / "own.py"
    path.write_text("def f(a, r): return 1\nf.lower_is_better = ['errors', 'gen_cost']\n")
    lower = lower_is_better(f"{path}:f")
    assert lower == {"gen_errors", "gen_cost"}
    assert [metric_direction(name, lower) for name in ("gen_errors", "gen_cost", "gen_other", "gen_score")] == [
        False, False, True, True,
    ]  # fmt: skip
    assert lower_is_better("structured") is None
    with pytest.raises(ValueError, match="gen_errors is not a metric that is logged"):
        metric_direction("gen_errors")
    rhythm = StageRhythm("gen_errors", -1, lower)
    for step, value in enumerate((3.0, 5.0, 2.0)):
        rhythm.count({"gen_errors": value}, step)
    assert (rhythm.best, rhythm.best_step) == (2.0, 2)
    path.write_text("def f(a, r): return 1\nf.lower_is_better = 'parse_rate'\n# changed\n")
    with pytest.raises(MeasureError, match="gen_parse_rate, for which more is better everywhere"):
        load_own(f"{path}:f")


def test_files_that_can_not_be_used_say_why(tmp_path: Path):
    """With the line, or the functions there are."""
    for text, said in (
        ("def one(): pass\ndef two(): pass\n_x = 1", "has no function score; it has one, two"),
        ("score = 3", "has no function score; it has none"),
        ("\ndef score(:", r"can't be run: SyntaxError in line 2"),
        ("a = 1\nb = a.c", "can't be run: AttributeError in line 2: 'int' object has no attribute 'c'"),
    ):
        with pytest.raises(MeasureError, match=said):
            own(tmp_path, text)
        (tmp_path / "own.py").unlink()
    with pytest.raises(MeasureError, match="can't be read"):
        load_own(f"{tmp_path / 'own.py'}:score")
    assert load_own("structured") is None
    assert parts_of("a/b.py:f") == (Path("a/b.py"), "f")
    assert (parts_of("structured"), parts_of(":f"), parts_of("a.py:")) == (None, None, None)
    assert metric_name("gen_a b") == metric_name("a b") == "gen_a_b"


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path):
    """Also when the run was started elsewhere."""
    (tmp_path / "beside_own_measure.py").write_text("VALUE = 4\n")
    text = "def score(answers, rows):\n    from beside_own_measure import VALUE\n    return VALUE\n"
    assert measure(own(tmp_path, text), ANSWERS, ROWS).metrics == {"gen_score": 4.0}


def test_complaints_are_warnings_and_the_rest_is_scored(tmp_path: Path):
    """The setting is named; a file that has vanished since is one as well."""
    said: list[str] = []
    (tmp_path / "own.py").write_text("def f(answers, rows): return 'much'")
    rows = [row | {"answer": answer, "cut": False} for row, answer in zip(ROWS, ANSWERS, strict=True)]
    kind = f"{tmp_path / 'own.py'}:f"
    assert score(kind, rows, complain=said.append) == ([{"score": None}] * 3, {})
    (tmp_path / "own.py").unlink()
    assert score(kind, rows, complain=said.append)[1] == {}
    assert said == [
        f"[WARNING] SFT_GEN_EVAL={kind}: f is str 'much', which is no number; left out of this evaluation",
        f"[WARNING] SFT_GEN_EVAL={kind}: {tmp_path / 'own.py'} can't be read (No such file or directory); correct the "
        "path; left out of this evaluation",
    ]


# JSON Schema

SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "sizes": {"type": "array", "items": {"type": "integer"}}},
}


def schema_file(folder: Path, content: Any = None) -> Path:
    path = folder / "schema.json"
    path.write_text(json.dumps(SCHEMA if content is None else content))
    return path


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ('{"name": "a", "sizes": [1, 2]}', None),
        ('Here it is:\n```json\n{"name": "a"}\n```', None),
        ('Output: {"name": "a"}', None),
        ('{"sizes": [1]}', "$: 'name' is a required property"),
        ('{"name": "a", "sizes": [1, "x", 2.5]}', "$.sizes[1]: 'x' is not of type 'integer'"),
        ("7", "$: 7 is not of type 'object'"),
        ("null", "$: None is not of type 'object'"),
        ('{"name": ', "does not parse as JSON: "),
        ("I can't", "does not parse as JSON: "),
    ],
)
def test_the_first_error_is_named_with_its_place(tmp_path: Path, answer: str, error: str | None):
    """The payload is found as for the other scores."""
    found = first_error(load_schema(schema_file(tmp_path)), answer, ("Output:",))
    assert found == error or ((found or "").startswith(error or "none") and (error or "").endswith(": "))


def test_schemas_that_are_none_are_refused(tmp_path: Path):
    """Other JSON, text, and schemas that their own schema does not allow; a $ref is never fetched."""
    for content, said in (
        (b"{", "is no JSON"),
        (b"[]", "a list"),
        (b'{"type": 3}', r"is no schema: \$\.type: 3 is not"),
    ):
        path = tmp_path / f"wrong{len(content)}.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load_schema(path)
    far = schema_file(tmp_path, {"$ref": "https://host.invalid/schema.json"})
    assert first_error(load_schema(far), "{}", ()) == "the schema's $ref https://host.invalid/schema.json leads nowhere"


def test_the_rate_is_over_the_rows_that_ask_for_json(tmp_path: Path):
    """By task too; a YAML task is not held to it; each sample has its error."""
    rows = [
        {"answer": '{"name": "a"}', "reference": '{"name": "a"}', "task": "text_to_json"},
        {"answer": '{"name": 1}', "reference": '{"name": "a"}', "task": "text_to_json"},
        {"answer": "name: a", "reference": "name: a", "task": "text_to_yaml"},
        {"answer": '{"name": "b"}', "reference": "x", "task": ""},
    ]
    scores, metrics = score("structured", rows, schema=schema_file(tmp_path))
    assert (metrics["gen_schema_rate"], metrics["gen_schema_rate/text_to_json"]) == (pytest.approx(2 / 3), 0.5)
    assert [each.get("schema_error", "not held") for each in scores] == [
        None, "$.name: 1 is not of type 'string'", "not held", None,
    ]  # fmt: skip
    assert score("samples", rows, schema=schema_file(tmp_path))[1]["gen_schema_rate"] == pytest.approx(2 / 3)
    assert metric_direction("gen_schema_rate")


def test_an_evaluation_keeps_own_numbers_and_errors_against_the_schema(tmp_path: Path, monkeypatch: Any):
    """In gen_metrics and gen_samples of the step; the warning is printed, the run goes on."""
    (tmp_path / "own.py").write_text("def f(answers, rows): return {'length': len(answers[0]), 'bad': 'x'}")
    settings = SimpleNamespace(
        gen_eval=f"{tmp_path / 'own.py'}:f", json_schema=schema_file(tmp_path), extraction_fields=(),
        output_markers=(), gen_max_new_tokens=1, gen_batch_size=1, template_options={},
    )  # fmt: skip
    monkeypatch.setattr(generation_evaluation, "generate_answers", lambda *a, **k: [Answer("{}")] * 3)
    monkeypatch.setattr(generation_evaluation, "prompts_of", lambda *a: [""] * 3)
    said: list[str] = []
    monkeypatch.setattr(generation_evaluation.tqdm, "write", said.append)
    evaluation: Any = GenerationEvaluation(settings, tmp_path, None, [row | {"task": ""} for row in ROWS])  # type: ignore
    main: Any = SimpleNamespace(is_main_process=True)
    metrics = evaluation.run(None, main, step=1, interrupted=lambda: None)
    assert metrics == {"gen_length": 2.0, "gen_schema_rate": 0.0}
    samples = [json.loads(line) for line in (tmp_path / "gen_samples_step1.jsonl").read_text().splitlines()]
    assert {sample["schema_error"] for sample in samples} == {"$: 'name' is a required property"}
    assert len(said) == 1
    assert "bad is str 'x', which is no number" in said[0]


@pytest.mark.slow
def test_a_stage_chooses_its_best_by_an_own_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Less is better where the function says so: of 5, 3, 4 the second evaluation is kept; the third fails in part and
    the run ends well."""
    (tmp_path / "own.py").write_text(
        "calls = []\n"
        "def errors(answers, rows):\n"
        "    calls.append(1)\n"
        "    values = [9, 5, 3, 4]\n"  # the first call is made with the references, before training
        "    return {'errors': values[min(len(calls), 4) - 1], 'note': 'text' if len(calls) > 3 else 1}\n"
        "errors.lower_is_better = ('errors',)\n"
    )
    common = {
        "SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_OUT_LORA_DIR": tmp_path / "out", "SFT_MAX_STEPS": 2,
        "SFT_DATASET_ID": write_rows(tmp_path / "rows.jsonl", 20), "SFT_GEN_EVAL": f"{tmp_path / 'own.py'}:errors",
        "SFT_GEN_EVAL_SAMPLES": 2, "SFT_GEN_MAX_NEW_TOKENS": 2, "SFT_METRIC_FOR_BEST": "gen_errors",
        "SFT_EVAL_STEPS": 1, "SFT_JSON_SCHEMA": schema_file(tmp_path),
    }  # fmt: skip
    write_stage(tmp_path, 1, common)
    assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
    stage = tmp_path / "out_stage1"
    assert metric_lines(stage, "gen_errors")[:3] == [5.0, 3.0, 4.0]
    best = json.loads((stage / "best_model" / "best_model_info.json").read_text())
    assert (best["best_metric"], best["step"], best["greater_is_better"]) == (3.0, 1, False)
    captured = capsys.readouterr()
    assert "note is str 'text', which is no number; left out of this evaluation" in captured.out + captured.err
    assert "where gen_errors was lowest (3" in (stage / "report.html").read_text()
    assert metric_lines(stage, "gen_schema_rate")[0] == 0.0

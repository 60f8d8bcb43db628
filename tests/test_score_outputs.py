"""official_content/score_outputs.py: tables and JSON for good files, one plain message and exit code 2 for bad ones."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "official_content" / "score_outputs.py"

TASKS = [
    {
        "task_id": "000501",
        "task_name": "Text to JSON",
        "output_type": "JSON",
        "raw_output_metric": ["名.b", "l.*.k", "c"],
    },
    {"task_id": "001002", "task_name": "Text to TOML"},
    {"task_id": "050203", "output_type": "CSV", "input_type": "JSON", "raw_output_metric": ["csv::a"]},
    {"task_id": "000404", "output_type": "HTML", "raw_output_metric": []},
]
OUTPUTS = [
    {"task_id": "000501", "generation": '```json\n{"名": {"b": 0}, "l": [{"k": 1}]}\n```'},
    {"task_id": "001002", "generation": "a = 1"},
    {"task_id": "050203", "generation": "prose"},
    {"task_id": "999999", "generation": "nobody asked"},
]


def run(*arguments, cwd):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def score(tmp_path):
    """Run the program in another folder on two files, given as values or as bytes."""

    def scored(tasks, outputs, *options):
        for name, content in (("tasks.json", tasks), ("outputs.json", outputs)):
            whole = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / name).write_bytes(whole)
        return run("tasks.json", "outputs.json", *options, cwd=tmp_path)

    return scored


def test_json_document(score):
    """Two of three paths give 0.73, a task without paths its parsing, prose as CSV 0 here and 0.2 in StructEval."""
    result = score(TASKS, OUTPUTS, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    metrics = document["metrics"]
    assert metrics.items() <= document.items()  # at the top level too, where the contract has them
    assert document["answers"] == 3
    assert document["faults"] == {"fence": 1, "syntax": 1, "wrong key": 1}
    assert document["left_out"] == {"tasks of format HTML": 1, "answers to none of the tasks scored": 1}
    assert metrics["gen_parse_rate"] == pytest.approx(2 / 3)
    assert metrics["gen_score"] == pytest.approx((0.73 + 1.0 + 0.0) / 3)
    assert metrics["gen_score/text_to_json"] == 0.73
    assert metrics["gen_score/toml"] == metrics["gen_score/text_to_toml"] == 1.0
    assert metrics["gen_structeval_score/json_to_csv"] == 0.2
    assert [(row["task_id"], row["score"], row["only"]) for row in document["scores"]] == [
        ("000501", 0.73, False),
        ("001002", 1.0, True),
        ("050203", 0.0, False),
    ]


def test_table(score):
    """One line overall, one per format, one per task, and what was left out."""
    result = score(TASKS, OUTPUTS)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["answers", "parses", "format", "only", "keys", "score", "StructEval"]
    assert lines[1] == ["all", "tasks", "3", "0.667", "0.667", "0.333", "0.333", "0.577", "0.335"]
    assert ["toml", "1", "1.000", "1.000", "1.000", "-", "1.000", "-"] in lines
    assert ["json_to_csv", "1", "0.000", "0.000", "0.000", "0.000", "0.000", "0.200"] in lines
    assert "1 tasks have no raw_output_metric: their score is whether they parse." in result.stdout
    assert "       1  fence           it stands in a code fence\n" in result.stdout
    assert result.stdout.endswith("Left out: 1 tasks of format HTML, 1 answers to none of the tasks scored\n")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_json_knows(score, encoding):
    """Byte order marks, UTF-16 and UTF-32 are read like UTF-8."""
    tasks = json.dumps(TASKS[:1], ensure_ascii=False).encode(encoding)
    result = score(tasks, OUTPUTS, "--json")
    assert json.loads(result.stdout)["metrics"]["gen_score"] == 0.73


@pytest.mark.parametrize(
    ("tasks", "outputs", "message"),
    [
        (TASKS, OUTPUTS[1:], "outputs.json: no answer to 000501; every task needs one"),
        (TASKS, [*OUTPUTS, OUTPUTS[1]], "outputs.json: more than one entry for 001002; keep one"),
        ([*TASKS, TASKS[0]], OUTPUTS, "tasks.json: more than one entry for 000501; keep one"),
        (TASKS, {"000501": "x"}, "outputs.json: must be a JSON list of objects"),
        ([], OUTPUTS, "tasks.json: must be a JSON list of objects with at least one entry"),
        (TASKS, ["x"], "outputs.json, entry 1: must be an object with a task_id in quotes"),
        (
            TASKS,
            [{"task_id": [], "generation": ""}],
            "outputs.json, entry 1: must be an object with a task_id in quotes",
        ),
        (TASKS, [{"task_id": "000501"}], "outputs.json, task 000501: generation=None is not text"),
        ([{"task_id": "1"}], OUTPUTS, "tasks.json, task 1: needs output_type (JSON, ...) or task_name"),
        ([TASKS[0] | {"raw_output_metric": "a.b"}], OUTPUTS, "raw_output_metric must be a list of key paths"),
        ([TASKS[3]], OUTPUTS, "tasks.json: no task asks for one of JSON, YAML, TOML, XML, CSV"),
        (b'[{"task_id": "1"},\n oops]', OUTPUTS, "tasks.json, line 2, column 2: is not JSON: Expecting value"),
        ('[{"task_id": "名"}]'.encode("shift_jis"), OUTPUTS, "tasks.json: is not UTF-8 (at byte 14)"),
        (TASKS, b"[" * 100_000, "outputs.json: is not usable JSON"),
        (TASKS, b"", "outputs.json, line 1, column 1: is not JSON"),
        ([{"task_id": "\ud800", "output_type": "JSON"}], OUTPUTS, "outputs.json: no answer to \\ud800"),
    ],
)
def test_bad_files_end_with_one_message(score, tasks, outputs, message):
    """Exit code 2, nothing on stdout, the file and entry named, no traceback."""
    result = score(tasks, outputs)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("[ERROR] ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr


def test_missing_file(tmp_path):
    """A file that is not there, or is a folder, is named."""
    missing = run("no.json", "no.json", cwd=tmp_path)
    assert (missing.returncode, missing.stderr) == (2, "[ERROR] no.json: cannot be read: No such file or directory\n")
    folder = run(tmp_path, "no.json", cwd=tmp_path)
    assert (folder.returncode, folder.stderr) == (2, f"[ERROR] {tmp_path}: cannot be read: Is a directory\n")


def test_help_answers_at_once(tmp_path):
    """Best of three under half a second: nothing heavy is imported."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0 and "TASKS.json OUTPUTS.json" in result.stdout
    assert min(seconds) < 0.5


def test_two_models_are_compared_on_the_same_tasks(tmp_path):
    """Ten tasks, eight of them answered better and two not at all: too few to tell; per format too."""
    tasks = [
        {"task_id": str(number), "task_name": "Text to JSON", "raw_output_metric": ["a", "b"]} for number in range(10)
    ]
    poor = [{"task_id": str(number), "generation": '{"a": 1}'} for number in range(10)]
    good = [
        {"task_id": str(number), "generation": '{"a": 1, "b": 2}' if number < 8 else "{"}
        for number in reversed(range(10))
    ]
    for name, content in (("tasks", tasks), ("poor", poor), ("good", good)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    result = run("tasks.json", "poor.json", "--with", "good.json", "--json", cwd=tmp_path)
    found = json.loads(result.stdout)["difference"]
    assert found["json"] == found["all tasks"]
    assert (found["json"]["questions"], found["json"]["real"]) == (10, False)
    assert found["json"]["mean"] == pytest.approx((8 * 0.4 - 2 * 0.6) / 10)
    shown = run("tasks.json", "good.json", "--with", "good.json", cwd=tmp_path).stdout
    assert "all tasks   +0.000, 95 % interval +0.000 to +0.000 over 10 questions: within noise" in shown
    broken = run("tasks.json", "poor.json", "--with", "absent.json", cwd=tmp_path)
    assert (broken.returncode, "absent.json: cannot be read" in broken.stderr) == (2, True)

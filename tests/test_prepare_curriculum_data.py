"""Positives several times over, then the first negatives: exact rows, named mistakes, nothing overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "official_content" / "prepare_curriculum_data.py"
POSITIVES = [{"instruction": "誰?", "output": "甲"}, {"instruction": "who?", "output": "A"}]
NEGATIVES = [{"instruction": f"news {number}", "output": ""} for number in range(5)]


def merge(folder: Path, *more: str, output: str = "merged.json") -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), "--positives", "pos.json", "--negatives", "neg.jsonl", "--output", output]
    return subprocess.run([*command, *more], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pos.json").write_text(json.dumps(POSITIVES, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "neg.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NEGATIVES), encoding="utf-8")
    return tmp_path


def test_positives_are_repeated_and_the_first_negatives_follow(folder):
    """Two positives x 3 and 4 negatives are ten rows in this order, at 6 to 4 = 1 : 0.67."""
    result = merge(folder, "--copies", "3", "--first", "4")
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "merged.json").read_text(encoding="utf-8")) == POSITIVES * 3 + NEGATIVES[:4]
    assert "1 : 0.67" in result.stdout
    assert "SFT_DATASET_MIX_TOTAL_SIZE=10" in result.stdout


def test_jsonl_is_written_where_the_name_says_so(folder):
    """One object per line, Japanese unescaped."""
    assert merge(folder, "--copies", "1", "--first", "1", output="deep/merged.jsonl").returncode == 0
    lines = (folder / "deep" / "merged.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [*POSITIVES, NEGATIVES[0]]
    assert "誰" in lines[0]


def test_fewer_negatives_than_asked_for_is_said(folder):
    """All five are taken and the shortage is named."""
    result = merge(folder, "--first", "96000")
    assert "has only 5 of the 96,000 rows" in result.stdout
    assert len(json.loads((folder / "merged.json").read_text(encoding="utf-8"))) == 11


def test_an_output_that_exists_is_refused(folder):
    """Exit 2, and the file is as it was."""
    (folder / "merged.json").write_text("mine", encoding="utf-8")
    result = merge(folder)
    assert result.returncode == 2
    assert "exists already" in result.stderr
    assert (folder / "merged.json").read_text(encoding="utf-8") == "mine"


def test_a_broken_line_leaves_no_output(folder):
    """The file and line are named, exit 2, and nothing half-written stays."""
    (folder / "neg.jsonl").write_text('{"a": 1}\n{"b": \n', encoding="utf-8")
    result = merge(folder)
    assert result.returncode == 2
    assert "neg.jsonl, line 2" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["neg.jsonl", "pos.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ('{"rows": []}', "where a list of rows belongs"),
        ('{\n "rows": []\n}', "where a list of rows belongs"),
        ('[{"a": 1},\n {"b": 2}', "line 2: broken JSON (a comma or the end of the list belongs here)"),
        ('[{"a": 1},\n\n {"b": }]', "line 3: broken JSON"),
        ('[{"a": 1} {"b": 2}]', "line 1: broken JSON (a comma or the end"),
        ('[{"a": 1}, 7]', "row 2: a row is an object"),
        ('[{"a": 1}]\ntrailing', "line 2: broken JSON (text after the end of the list)"),
        ('// pos.json\n[{"a": 1}]', "line 1: a comment (column 1), which JSON does not have; remove it"),
        ('[{"a": 1},\n # more\n {"a": 2}]', "line 2: a comment (column 2)"),
    ],
)
def test_a_bad_file_is_named(folder, content, message):
    """Exit 2 with the reason."""
    (folder / "pos.json").write_text(content, encoding="utf-8")
    result = merge(folder)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert message in result.stderr


def test_a_list_is_read_under_the_name_of_lines_too(folder):
    """Both forms are found under either name; another ending is refused with its name."""
    (folder / "neg.jsonl").write_text(" \n" + json.dumps(NEGATIVES, indent=1), encoding="utf-8")
    assert merge(folder, "--copies", "1").returncode == 0
    assert json.loads((folder / "merged.json").read_text(encoding="utf-8")) == POSITIVES + NEGATIVES
    (folder / "neg.jsonl").rename(folder / "neg.csv")
    result = merge(folder, "--negatives", "neg.csv", output="other.json")
    assert (result.returncode, "neg.csv: a .json or .jsonl file is needed" in result.stderr) == (2, True)


def test_both_missing_inputs_are_named_at_once(folder):
    """Before the positives are copied for minutes."""
    (folder / "pos.json").unlink()
    (folder / "neg.jsonl").unlink()
    result = merge(folder)
    assert result.returncode == 2
    assert result.stderr.count("no such file") == 2


def test_another_encoding_is_named(folder):
    """Shift-JIS is refused as UTF-8 and read when it is named."""
    (folder / "pos.json").write_text(json.dumps(POSITIVES, ensure_ascii=False), encoding="shift_jis")
    (folder / "neg.jsonl").write_text('{"instruction": "無"}\n', encoding="shift_jis")
    assert 'pos.json: byte 18 is not utf-8; add --encoding "cp932"' in merge(folder).stderr
    assert "'shift' is no text encoding" in merge(folder, "--encoding", "shift").stderr
    assert merge(folder, "--copies", "1", "--encoding", "shift_jis").returncode == 0
    assert json.loads((folder / "merged.json").read_text(encoding="utf-8"))[0] == POSITIVES[0]

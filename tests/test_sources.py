"""Sources: every file type, every row shape, every way a file can be broken."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.sources.load import Rows, load_source
from sft.data.sources.readers import SourceError
from sft.data.sources.shapes import content_hash, read_messages, shape_of, task_key, tools_of
from sft.data.sources.turns import Dropped
from sft.errors import Problems
from sft.settings import Source
from sft.stages.changes import source_fingerprint

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}]


def load(path: object, **options: Any) -> Rows:
    return load_source(Source(id=str(path), **options))


def messages(rows: Rows) -> list[list[dict[str, str]]]:
    return list(rows.dataset["messages"])


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def reason(path: object, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        load(path, **options)
    return str(caught.value)


# Row shapes


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": PAIR}, PAIR),
        ({"messages": json.dumps(PAIR)}, PAIR),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "model", "content": "Bye"}]}, PAIR),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, PAIR[1]]}, PAIR),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Bye"}]}, PAIR),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Bye"}], "system": "S"},
            [{"role": "system", "content": "S"}, *PAIR],
        ),
        ({"instruction": "Hi", "input": "", "output": "Bye"}, PAIR),
        ({"instruction": "Hi", "input": None, "response": "Bye"}, PAIR),
        (
            {"instruction": "Hi", "input": "x=1", "output": "Bye"},
            [{"role": "user", "content": "Hi\n\nx=1"}, PAIR[1]],
        ),
        ({"instruction": "Hi", "output": "Bye", "history": [["Hi", "Bye"]]}, PAIR + PAIR),
        ({"instruction": "Hi", "output": "Bye", "history": PAIR}, PAIR + PAIR),
        ({"instruction": "Hi", "output": "Bye", "history": [{"question": "Hi", "answer": "Bye"}]}, PAIR + PAIR),
        (
            {"instruction": "Hi", "context": "In 1895.", "response": "Bye"},
            [{"role": "user", "content": "Hi\n\nIn 1895."}, PAIR[1]],
        ),
        ({"messages": [PAIR[0], {"role": "AI", "content": "Bye"}, PAIR[0]]}, PAIR),
        ({"messages": PAIR, "system": "S"}, [{"role": "system", "content": "S"}, *PAIR]),
        ({"prompt": "Hi", "completion": "Bye", "system": "S"}, [{"role": "system", "content": "S"}, *PAIR]),
        (
            {"messages": [{"role": "system", "content": "T"}, *PAIR], "system": "S"},
            [{"role": "system", "content": "S\n\nT"}, *PAIR],
        ),
        ({"messages": PAIR, "images": []}, PAIR),
        ({"prompt": "Hi", "completion": "Bye"}, PAIR),
        ({"prompt": [PAIR[0]], "completion": [PAIR[1]]}, PAIR),
        ({"prompt": [PAIR[0]], "completion": "Bye"}, PAIR),
        (
            {"title": "T", "abstract": "A b.", "paths": [["x", "y"], ["x", "z -> w", "v"]]},
            [
                {"role": "user", "content": "Title: T\nA b."},
                {"role": "assistant", "content": "x -> y\nx -> z -> w -> v\n"},
            ],
        ),
        ({"text": "Hi Bye"}, [{"role": "text", "content": "Hi Bye"}]),
    ],
)
def test_each_shape_becomes_messages(row: dict[str, Any], expected: list[dict[str, str]]):
    """The row shapes of the contract, recognised from the columns alone."""
    shape = shape_of(list(row))
    assert shape is not None
    assert read_messages(row, shape) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": []}, "no answer"),
        ({"messages": None}, "no answer"),
        ({"messages": PAIR[:1]}, "no answer"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": " \n"}]}, "empty answer"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": None}]}, "empty answer"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": 7}]}, "the content of a turn is a number"),
        ({"messages": [{"role": "user", "content": None}, PAIR[1]]}, "the content of a turn is missing"),
        ({"messages": [{"role": None, "content": "Hi"}, PAIR[1]]}, "the role of a turn is missing"),
        ({"messages": [PAIR[0], {"role": "assistent", "content": "Bye"}]}, 'unknown role "assistent"'),
        ({"messages": ["Hi", "Bye"]}, "a turn of messages is text, no object with role and content"),
        ({"messages": "Hi"}, "messages is text that is no JSON"),
        ({"messages": str(PAIR)}, "messages is text that is no JSON but Python's repr: use json.dumps"),
        ({"messages": {"role": "user"}}, "messages is an object and no list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, PAIR[1]]},
            'the content of a turn has a part of type "image_url", which is no text',
        ),
        ({"messages": PAIR, "images": ["a.png"]}, 'it has "images", and only text is trained'),
        ({"conversations": "x"}, "conversations is text that is no JSON"),
        ({"prompt": "Hi", "completion": None}, "empty answer"),
        ({"prompt": "Hi", "completion": 2}, "completion is a number"),
        ({"prompt": "Hi", "completion": True}, "completion is true or false"),
        ({"prompt": {"a": 1}, "completion": "Bye"}, "prompt is an object"),
        ({"instruction": 5, "output": "Bye"}, "instruction is a number"),
        ({"instruction": "Hi", "input": float("nan"), "output": "Bye"}, "input is NaN"),
        ({"instruction": "Hi", "output": "Bye", "system": 3}, "system is a number"),
        (
            {"instruction": "Hi", "output": "Bye", "history": ["Hi"]},
            "an entry of history is text, no pair of question and answer",
        ),
        ({"title": "T", "abstract": "A", "paths": []}, "empty answer"),
        ({"title": "T", "abstract": "A", "paths": [[]]}, "empty answer"),
        ({"title": "T", "abstract": "A", "paths": ["x"]}, "a path is text that is no JSON"),
        ({"title": "T", "abstract": "A", "paths": [[1]]}, "a name in paths is a number"),
        ({"text": ""}, "empty answer"),
        ({"text": 1}, "text is a number"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": "<think>\nr\n</think>\n\n"}]}, "empty answer"),
        ({"messages": PAIR, "tools": "[{'name': 'f'}]"}, "tools that are no JSON but Python's repr: use json.dumps"),
    ],
)
def test_a_row_without_an_answer_is_dropped_with_its_reason(row: dict[str, Any], expected: str):
    """Empty, missing and unreadable answers are told apart."""
    shape = shape_of(list(row))
    assert shape is not None
    with pytest.raises(Dropped) as caught:
        read_messages(row, shape)
        tools_of(row, shape)
    assert str(caught.value) == expected


def test_dropped_rows_are_counted(tmp_path: Path):
    """Two of four rows have no answer: two are kept, two counted, nothing else is said."""
    path = write_lines(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
        {"prompt": "c", "completion": "d"},
    )
    rows = load(path)
    assert [chat[-1]["content"] for chat in messages(rows)] == ["b", "d"]
    assert rows.dropped == {"empty answer": 2}


def test_half_a_surrogate_pair_is_unreadable(tmp_path: Path):
    """JSON may hold what is no Unicode text; the row is counted, not the program ended."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "\\ud83d"}\n{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    rows = load(path)
    assert (len(rows.dataset), rows.dropped) == (1, {"half of a character that is no Unicode text": 1})


def test_every_loss_names_its_first_row(tmp_path: Path):
    """Rows are counted from 1; a row that lacks a column the others have is lost alone, the source goes on."""
    good = {"prompt": "a", "completion": "b"}
    bad = [{"prompt": "a"}, {"prompt": "a", "completion": 3}, {"prompt": "a", "completion": 4}, {"x": 1}]
    rows = load(write_lines(tmp_path / "rows.jsonl", bad[0], good, *bad, good))
    assert len(rows.dataset) == 2
    assert rows.dropped == {'no "completion"': 2, "completion is a number": 2, 'no "completion" and no "prompt"': 1}
    assert rows.first == {'no "completion"': 3, "completion is a number": 4, 'no "completion" and no "prompt"': 6}


def test_turns_after_the_last_answer_are_left_out_and_counted(tmp_path: Path):
    """The answers of a conversation that ends with the user are trained."""
    rows = load(write_lines(tmp_path / "rows.jsonl", {"messages": [*PAIR, PAIR[0]]}, {"messages": PAIR}))
    assert messages(rows) == [PAIR, PAIR]
    assert rows.noted == {"turns after the last answer left out": 1}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "folder"])
def test_what_nobody_reads_is_named(tmp_path: Path, ending: str):
    """Columns and keys of turns with text or that may be flags; not other numbers, not empty text, not what is read."""
    turns = [PAIR[0] | {"thoughts": "T", "id": 1}, PAIR[1] | {"thoughts": "", "id": 2}]
    row = {"messages": turns, "source": "web", "score": 0.5, "note": " ", "tags": ["x"], "pack": "hard", "system": "S"}
    row |= {"label": False, "loss_weight": 0, "": "7"}  # preferences, weights of rows, the numbers of pandas' rows
    table = [row | {"source": ""}, row]
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        write_lines(path, *table)
    elif ending == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(table), path)
    else:
        datasets.Dataset.from_list(table).save_to_disk(path)
    unread = load(path).unread
    assert set(unread) - {"note"} == {"label", "loss_weight", "messages.thoughts", "source", "tags"}


def test_a_text_column_beside_an_answer_is_no_plain_text(tmp_path: Path):
    """text and label: a problem with both remedies; each of them is accepted."""
    path = write_lines(tmp_path / "rows.jsonl", {"text": "Nice.", "label": "good"})
    with pytest.raises(Problems) as caught:
        load(path)
    assert caught.value.problems == [
        f'{path}: the column text stands beside label; say in SFT_DATASET_MIX whether it asks for that ("columns":'
        ' {"prompt": "text", "completion": "label"}) or is trained whole ("columns": {"text": "text"})'
    ]
    asked = load(path, columns={"prompt": "text", "completion": "label"})
    assert [turn["content"] for turn in messages(asked)[0]] == ["Nice.", "good"]
    whole = load(path, columns={"text": "text"})
    assert (messages(whole)[0][0]["content"], whole.unread) == ("Nice.", ("label",))


def test_a_mapped_column_that_is_not_read_is_a_problem(tmp_path: Path):
    """prompt/completion rows have no input; a row without a mapped column is lost alone."""
    table = [{"q": "a", "c": "x", "a": "b"}, {"q": "a"}]
    path = write_lines(tmp_path / "rows.jsonl", *table)
    with pytest.raises(Problems, match='"columns" maps input, which rows of prompt/completion do not have; leave it'):
        load(path, columns={"prompt": "q", "completion": "a", "input": "c"})
    rows = load(path, columns={"instruction": "q", "output": "a", "input": "c"})
    assert (messages(rows)[0][0]["content"], rows.dropped) == ("a\n\nx", {'no "a"': 1})


def test_preferences_are_named(tmp_path: Path):
    """chosen and rejected are no answer; the remedy maps the chosen ones."""
    pairs = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert '"columns": {"completion": "chosen"} trains the chosen answers' in reason(
        write_lines(tmp_path / "a.jsonl", pairs)
    )
    rows = load(write_lines(tmp_path / "b.jsonl", {"conversations": PAIR[:1], "chosen": {}, "rejected": {}}))
    assert rows.dropped == {"no answer but chosen and rejected, which are preferences and not trained on": 1}


def test_unknown_columns_name_what_there_is_and_what_is_known(tmp_path: Path):
    """The remedy is in the message: the columns, the shapes, and how to map."""
    text = reason(write_lines(tmp_path / "rows.jsonl", {"question": "a", "answer": "b"}))
    assert "its columns are question, answer" in text
    assert "messages; conversations; instruction/input/output" in text
    assert '"columns": {"prompt": "question", "completion": "answer"}' in text


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        (
            {"Instruction": "a", "Input": "", "OUTPUT": "b"},
            '{"input": "Input", "instruction": "Instruction", "output": ',
        ),
        ({"query": "a", "response": "b"}, '{"prompt": "query", "completion": "response"}'),
        ({"Problem": "a", "steps": "b", "Solution": "c"}, '{"prompt": "Problem", "completion": "Solution"}'),
        ({"id": "x", "dialogue": PAIR}, '{"messages": "dialogue"}'),
        ({"source": "a", "label": 1}, '{"prompt": "source", "completion": "..."}'),
    ],
)
def test_unknown_columns_get_the_mapping_that_is_likely(row: dict[str, Any], mapping: str, tmp_path: Path):
    """Ours in capitals, turns under another name, and names that others use for question and answer."""
    assert f'with "columns": {mapping}' in reason(write_lines(tmp_path / "rows.jsonl", row))


def test_columns_are_mapped(tmp_path: Path):
    """{ours: theirs}, in JSON lines and in Parquet, and before a column that already has our name."""
    rows = {"question": "Hi", "answer": "Bye", "prompt": "no", "text": "no"}
    columns = {"prompt": "question", "completion": "answer"}
    lines = write_lines(tmp_path / "rows.jsonl", rows)
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([rows]), table)
    assert messages(load(lines, columns=columns)) == [PAIR]
    assert messages(load(table, columns=columns)) == [PAIR]
    assert '"columns" names reply, but the columns are' in reason(lines, columns={"completion": "reply"})


# Task keys

CONVERSION = {"metadata": {"format": "json", "type": "conversion"}}


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({"subcategory": "text_to_toml", "metadata": {"format": "json", "type": "generation"}}, "", "text_to_toml"),
        ({"metadata": {"format": "json", "type": "generation"}}, "Create a JSON from CSV", "text_to_json"),
        (CONVERSION | {"subcategory": None}, "Convert the following XML to JSON:\nCSV", "xml_to_json"),
        (CONVERSION, "Transform this CSV data into JSON format:", "csv_to_json"),
        ({"metadata": {"format": "YAML", "type": "conversion"}}, "Reformat the data below from TOML to YAML:",
         "toml_to_yaml"),
        ({"metadata": '{"format": "xml", "type": "conversion"}'}, "csv to xml", "csv_to_xml"),
        ({"metadata": {"format": "xml", "type": "conversion"}}, "Rewrite this", "text_to_xml"),
        ({"metadata": {"source": "web"}}, "Convert the following XML to JSON:", ""),
        ({"metadata": "broken {"}, "", ""),
        ({}, "", ""),
    ],
)  # fmt: skip
def test_task_keys(row: dict[str, Any], prompt: str, expected: str):
    """subcategory first, else the formats of metadata and of the prompt's first line."""
    assert task_key(row, [{"role": "user", "content": prompt}, PAIR[1]]) == expected


def test_equal_messages_have_equal_hashes():
    """Different texts, roles and borders between messages give different hashes."""
    user, answer = PAIR
    assert content_hash(PAIR) == content_hash([dict(user), dict(answer)])
    others = [
        [answer, user],
        [{**user, "content": "HiBye"}],
        [{**user, "content": "H"}, {**answer, "content": "iBye"}],
        [{**user, "role": "system"}, answer],
    ]
    assert len({content_hash(PAIR), *map(content_hash, others)}) == 5


# File types


@pytest.fixture
def table() -> list[dict[str, Any]]:
    return [{"prompt": f"question {number}", "completion": f"答え {number}"} for number in range(3)]


def expected_answers(table: list[dict[str, Any]]) -> list[str]:
    return [row["completion"] for row in table]


def test_every_file_type_gives_the_same_rows(tmp_path: Path, table: list[dict[str, Any]]):
    """json, JSON lines, csv, parquet, and a folder written by save_to_disk with and without splits."""
    lines = write_lines(tmp_path / "rows.jsonl", *table)
    (tmp_path / "array.json").write_text(json.dumps(table, indent=2), encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines.read_text(encoding="utf-8"), encoding="utf-8")
    pyarrow.parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    text = "prompt,completion\n" + "".join(f'"{row["prompt"]}",{row["completion"]}\r\n' for row in table)
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8-sig", newline="")
    dataset = datasets.Dataset.from_list(table)
    dataset.save_to_disk(tmp_path / "flat")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("rows.jsonl", "array.json", "lines.json", "rows.parquet", "rows.csv", "flat", "splits"):
        assert [chat[-1]["content"] for chat in messages(load(tmp_path / name))] == expected_answers(table), name
    assert len(load(tmp_path / "splits", split="test").dataset) == 1
    assert 'no split "val"; there are train, test' in reason(tmp_path / "splits", split="val")


def packed(path: Path, content: bytes) -> Path:
    kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    with pa.output_stream(str(path), compression=kind) as stream:
        stream.write(content)
    return path


def test_packed_files_and_other_endings(tmp_path: Path, table: list[dict[str, Any]]):
    """jsonl.gz, jsonl.zst, json.gz, csv.zst, ndjson, tsv; also of several packed parts, as pigz and zstd write."""
    lines = write_lines(tmp_path / "rows.ndjson", *table).read_bytes()
    found = [tmp_path / "rows.ndjson", packed(tmp_path / "a.jsonl.gz", lines), packed(tmp_path / "a.JSONL.zst", lines)]
    found.append(packed(tmp_path / "a.json.gz", json.dumps(table).encode()))
    text = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in table)
    found.append(packed(tmp_path / "a.csv.zst", text.encode()))
    (tmp_path / "rows.tsv").write_text(text.replace(",", "\t"), encoding="utf-8")
    parts = [packed(tmp_path / f"{number}.zst", lines[:75] if number else lines[75:]).read_bytes() for number in (1, 0)]
    (tmp_path / "parts.jsonl.zst").write_bytes(b"".join(parts))
    for path in (*found, tmp_path / "rows.tsv", tmp_path / "parts.jsonl.zst"):
        assert [chat[-1]["content"] for chat in messages(load(path))] == expected_answers(table), path.name


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_cut_packed_file_is_named(tmp_path: Path, ending: str):
    """Half a download is not half a data set."""
    path = packed(tmp_path / f"rows{ending}", b"".join(b'{"text": "%d"}\n' % number for number in range(9000)))
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in reason(path)
    path.write_bytes(b"no archive at all")
    assert str(path) in reason(path)


def test_a_pattern_is_its_files_in_order(tmp_path: Path, table: list[dict[str, Any]]):
    """Rows come file by file; they are known by content, so another folder is the same and an edit is not."""
    for number, row in enumerate(table):
        write_lines(tmp_path / f"part-{number}.jsonl", row)
        (tmp_path / "copy").mkdir(exist_ok=True)
        write_lines(tmp_path / "copy" / f"part-{number}.jsonl", row)
    rows, copy = load(tmp_path / "part-*.jsonl"), load(tmp_path / "copy" / "p*.jsonl")
    assert [chat[-1]["content"] for chat in messages(rows)] == expected_answers(table)
    assert rows.fingerprint == copy.fingerprint
    before = source_fingerprint(Source(id=str(tmp_path / "part-*.jsonl")))
    assert before == source_fingerprint(Source(id=str(tmp_path / "copy" / "part-*.jsonl")))
    write_lines(tmp_path / "copy" / "part-2.jsonl", table[0])
    assert load(tmp_path / "copy" / "p*.jsonl").fingerprint != copy.fingerprint
    assert before != source_fingerprint(Source(id=str(tmp_path / "copy" / "part-*.jsonl")))
    assert reason(tmp_path / "none-*.jsonl") == f"no file matches {tmp_path / 'none-*.jsonl'}"


def test_a_folder_is_the_files_of_its_split(tmp_path: Path, table: list[dict[str, Any]]):
    """As on the hub: data/train-00000-of-00002.parquet; what is hidden or describes the set is no data."""
    (tmp_path / "data").mkdir()
    for number, part in enumerate((table[:2], table[2:])):
        path = tmp_path / "data" / f"train-{number:05}-of-00002.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist(part), path)
    pyarrow.parquet.write_table(pa.Table.from_pylist(table[:1]), tmp_path / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\n---\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [chat[-1]["content"] for chat in messages(load(tmp_path))] == expected_answers(table)
    assert len(load(tmp_path, split="test").dataset) == 1
    assert reason(tmp_path, split="dev") == f'{tmp_path}: no split "dev"; there are test, train'
    write_lines(tmp_path / "more.jsonl", *table)
    assert "it has files of several types (.jsonl, .parquet); name those to read" in reason(tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_lines(plain / "a.jsonl", table[0])
    write_lines(plain / "b.jsonl", *table[1:])
    assert [chat[-1]["content"] for chat in messages(load(plain))] == expected_answers(table)
    write_lines(plain / "valid.jsonl", table[0])
    assert "some files tell their split (validation), others (a.jsonl, b.jsonl) do not" in reason(plain)


def test_files_that_are_something_else_are_told_apart(tmp_path: Path):
    """A Git LFS pointer, semicolons, tabs, no line of names, a split asked of a file: each with its remedy."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt;completion\na;b\n")
    assert reason(path) == f"{path}: its columns stand between semicolons; put commas there"
    path.write_text("prompt\tcompletion\na\tb\n")
    assert reason(path).endswith("its columns stand between tabs; put commas there; or name it .tsv")
    path.write_text("What is it?,A cat.\nWhat?,That.\n")
    assert reason(path).endswith("; the first line of the file must name the columns")
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    assert '"split" asks for train[:6], but a file has no splits; leave it out ("limit"' in reason(
        path, split="train[:6]"
    )
    path.write_text("version https://" + "git-lfs.example/spec/v1\noid sha256:00\nsize 12\n")
    assert reason(path) == f"{path}: a Git LFS pointer and not the data; run git lfs pull in that folder"


def test_limit_takes_the_first_rows(tmp_path: Path, table: list[dict[str, Any]]):
    """Counted before rows are dropped; more than there are is all of them."""
    path = write_lines(tmp_path / "rows.jsonl", *table)
    assert [len(load(path, limit=limit).dataset) for limit in (1, 2, 9)] == [1, 2, 3]


def test_an_edited_file_is_noticed(tmp_path: Path):
    """The cache goes by content: the same path with another text gives the other rows, the old text the old key."""
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    before = load(path)
    write_lines(path, {"prompt": "a", "completion": "c"})
    after = load(path)
    assert [messages(rows)[0][-1]["content"] for rows in (before, after)] == ["b", "c"]
    assert before.fingerprint != after.fingerprint
    write_lines(path, {"prompt": "a", "completion": "b"})
    assert load(path).fingerprint == before.fingerprint


def test_an_empty_file_has_no_rows(tmp_path: Path):
    """Nothing to read is no error of the file; the mix says that nothing is left."""
    for name in ("empty.jsonl", "empty.json", "empty.csv"):
        (tmp_path / name).write_text("\n", encoding="utf-8")
        assert len(load(tmp_path / name).dataset) == 0


def test_columns_of_any_kind_beside_the_wanted_ones(tmp_path: Path):
    """Metadata whose fields change their type from row to row breaks Arrow's own JSON reader, not this one."""
    path = write_lines(
        tmp_path / "rows.jsonl",
        {"messages": PAIR, "metadata": {"format": "json", "score": 1, "type": "generation"}},
        {"messages": PAIR, "metadata": {"format": "csv", "score": "high", "tags": [1, "a"]}, "extra": None},
        {"messages": PAIR, "metadata": None, "pack": 3},
    )
    rows = load(path)
    assert rows.dataset["task_key"][:] == ["text_to_json", "text_to_csv", ""]
    assert rows.dataset["pack"][:] == ["", "", "3"]


# Broken files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n\n[1]\n', "line 4: a row is an object with columns, this is list"),
        ("a.jsonl", b'{"text": "a"}\n\x00\n', "line 2: broken JSON"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', "line 2: broken JSON"),
        ("a.json", b'[{"text": "a"}\n {"text": "b"}]', "line 2: broken JSON (a comma or the end"),
        ("a.json", b'[{"text": "a"},\n', "line 2: broken JSON"),
        ("a.json", b'[{"text": "a"}', "broken JSON (a comma or the end"),
        ("a.json", b"[1, 2]", "row 1: a row is an object with columns, this is int"),
        (
            "a.json",
            b'{"data": [{"text": "a"}]}',
            "one JSON value where a list of rows belongs: [{...}, {...}]; the list",
        ),
        ("a.json", b'{"version": 1, "data": [{"text": "a"}]}', 'the list under "data" may be it'),
        ("a.json", b'{"prompt": {"0": "q"}, "completion": {"0": "a"}}', 'with to_json(orient="records")'),
        ("a.json", b'{"prompt": ["q"], "completion": ["a"]}', "these are columns: pandas writes rows with to_json"),
        ("a.jsonl", b'{\n "text": "a"\n}\n', "column 2); a row of .jsonl stands on one line"),
        ("a.jsonl", b'{"text": "a"},\n{"text": "b"}\n', "lines of rows have no commas between them: remove it"),
        ("a.jsonl", b"{'text': 'a'}\n", "it is Python's repr; write it with json.dumps"),
        ("a.jsonl", b"\n\n <html>", "a web page and not the data; download the file itself"),
        ("a.json", b"<!doctype HTML>", "a web page and not the data; download the file itself"),
        ("a.json", b'{"text": "a"}\n{"text": \n', "line 2: broken JSON"),
        ("a.csv", b'prompt,completion\na,b\na,"b\n', "line 3: broken CSV"),
        ("a.csv", b"prompt,completion\na,b\na,b,c\n", "line 3: more fields than the 2 columns"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.txt", b"text", "the file types known are .csv, .json, .jsonl, .ndjson, .parquet, .tsv"),
    ],
)
def test_a_broken_file_names_file_and_line(tmp_path: Path, name: str, content: bytes, expected: str):
    """One line that says where and what, for every file type."""
    path = tmp_path / name
    path.write_bytes(content)
    text = reason(path)
    assert str(path) in text
    assert expected in text
    assert "\n" not in text


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_another_encoding_is_named_and_can_be_given(tmp_path: Path, suffix: str):
    """A cp932 file: the byte, the encoding that would read it, and then it is read with it."""
    rows = {".jsonl": '{"text": "日本語"}\n', ".json": '[{"text": "日本語"}]', ".csv": "text\n日本語\n"}
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(rows[suffix].encode("cp932"))
    offset = rows[suffix].index("日")
    assert f'byte {offset} is not utf-8; give the source "encoding": "cp932"' in reason(path)
    assert messages(load(path, encoding="cp932")) == [[{"role": "text", "content": "日本語"}]]
    path.write_bytes(rows[suffix].encode("utf-16"))
    assert '"encoding": "utf-16"' in reason(path)
    assert messages(load(path, encoding="utf-16")) == [[{"role": "text", "content": "日本語"}]]


def test_a_byte_order_mark_is_read_over(tmp_path: Path):
    """Files from Windows begin with one."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    assert messages(load(path)) == [[{"role": "text", "content": "a"}]]


def test_missing_things_are_told_apart(tmp_path: Path):
    """A file's ending or a path's beginning make it a path; a folder must be one of save_to_disk."""
    assert reason(tmp_path / "none.jsonl") == f"there is no file {tmp_path / 'none.jsonl'}"
    assert reason("none.csv") == "there is no file none.csv"
    assert reason(tmp_path / "none") == f"there is no file or folder {tmp_path / 'none'}"
    assert "neither a folder written by save_to_disk nor one with data files" in reason(tmp_path)


# The hub


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "no such data set on the hub"),
        (datasets.exceptions.DatasetNotFoundError("'a/b' is a gated dataset. Log in"), "it is gated or private"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "there is no such file or folder here and the hub cannot"),
        (ValueError('Unknown split "x". There is [train].\nmore'), 'Unknown split "x". There is [train].'),
    ],
)  # fmt: skip
def test_hub_errors_in_plain_words(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str):
    """Not found, gated and unreachable are three different things to do."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert expected in reason("a/b")


def test_hub_options_reach_load_dataset(monkeypatch: pytest.MonkeyPatch):
    """id, name, revision and split are passed on as they are."""
    asked = []

    def answer(source: str, **options: object) -> datasets.Dataset:
        asked.append((source, options))
        return datasets.Dataset.from_list([{"messages": PAIR}])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert messages(load("a/b", name="en", revision="v1", split="test")) == [PAIR]
    assert asked == [("a/b", {"name": "en", "revision": "v1", "split": "test"})]


# Properties

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6))
def test_no_row_is_lost_silently(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]):
    """Rows kept and rows counted as dropped are together the rows of the file; kept texts are unchanged."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = load(write_lines(path, *({"prompt": prompt, "completion": answer} for prompt, answer in pairs)))
    assert len(rows.dataset) + rows.dropped.total() == len(pairs)
    assert [(chat[0]["content"], chat[1]["content"]) for chat in messages(rows)] == [
        pair for pair in pairs if pair[1].strip()
    ]


# Real data


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_data_sets_are_read_whole():
    """Row counts and conversions of the data sets the source documents name."""
    columns = {"prompt": "question", "completion": "answer"}
    kept = {
        "structured_cot_512_v2.jsonl": 3933, "structured_cot_512.jsonl": 3445, "doid_paths_train.jsonl": 2808,
        "socratic_ja_dialogues.json": 2660, "gpteacher_roleplay.json": 1923, "ner_wikipedia_ja.json": 5343,
    }  # fmt: skip
    loaded = {name: load(SHARED / name) for name in kept}
    assert {name: len(rows.dataset) for name, rows in loaded.items()} == kept
    assert loaded["socratic_ja_dialogues.json"].dropped == {"empty answer": 2}
    assert len(load(SHARED / "gsm8k_train.jsonl", columns=columns).dataset) == 7473
    keys = loaded["structured_cot_512_v2.jsonl"].dataset["task_key"][:]
    assert sum(not key.startswith("text_to_") for key in keys) == 1485
    assert (keys.count("text_to_toml"), keys.count("toml_to_yaml"), keys.count("csv_to_json")) == (500, 39, 23)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", gzip.compress(b"{}"), "packed by gzip; name it rows.jsonl.gz"),
        ("rows.jsonl", b"\x28\xb5\x2f\xfd...", "packed by zstd; name it rows.jsonl.zst"),
        ("rows.csv", b"PK\x03\x04...", "a zip archive or a spreadsheet; unpack it, or save it as CSV"),
        ("rows.json", b"PAR1...", "a Parquet file; name it .parquet"),
        ("rows.jsonl", b"<!DOCTYPE html>", "a web page and not the data; download the file itself"),
        ("rows.jsonl.gz", gzip.compress(b"\x91" * 9 + bytes(range(256)) * 4000)[:400], "Truncated compressed stream"),
        (
            "rows.csv",
            b"prompt,prompt,completion\na,b,c\n",
            "the column prompt stands there twice; rename or remove one",
        ),
        ("rows.csv", b"prompt;completion;a, b\nq;a;c\n", "its columns stand between semicolons; put commas there"),
    ],
)
def test_a_file_that_is_something_else_than_its_name_says(tmp_path, name, content, said):
    """By its first bytes, or its line of names: no column is lost, and the message has a remedy."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError) as error:
        load_source(Source(id=str(path)))
    assert str(error.value) == f"{path}: {said}"


def test_spaces_around_the_names_of_columns_are_none_of_them(tmp_path):
    """`prompt, completion` as people type it."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt, completion\nq,a\n", encoding="utf-8")
    assert load_source(Source(id=str(path))).dataset["messages"][0][1]["content"] == "a"

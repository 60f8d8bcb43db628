"""Whatever is written in env files, on the command line, in mixes and in data files, the outcome is settings and rows
to train on, or problems listed for a person (exit code 2): never a traceback.

FUZZ_CASES=10000 runs so many cases, all tests together, instead of the few of the suite.
"""

import csv
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example
from hypothesis import given as examples
from hypothesis import settings as effort
from hypothesis import strategies as st

from sft import cli
from sft.data.labels.template import chat_template_for
from sft.data.mixture import prepare_mix
from sft.errors import Problems
from sft.settings import load_settings
from sft.settings.schema import NAMES
from tests.tiny import CHATML, tokenizer

CASES = int(os.environ.get("FUZZ_CASES", "240"))
# capsys is read out after every example, so that examples share it is no harm.
QUIET = [
    HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture,
]  # fmt: skip


def share(tenths: int) -> Any:
    """How many tenths of all cases a test has."""
    return effort(max_examples=max(CASES * tenths // 10, 1), deadline=None, suppress_health_check=QUIET)


NASTY = st.sampled_from([
    "", " ", "'", '"', "'[", "\\", "\x00", "\ufeff", "\u2028", "\r", "=", "==", "#", "$", "${", "$HOME", "~", "~root",
    "%s", "{}", "[]", "null", "nan", "inf", "-1", "0", "1e999", "9" * 400, "-0.0", "0x10", "1_000", "True", "no",
    "../../etc/passwd", "/", "/dev/null", "/proc/self/mem", ".", "a" * 5000, "\ud83d", "日本語", "\u202e", "<|im_end|>",
    "!!python/object/apply:os.system ['true']", "`true`", "$(true)", "; true", '{"id": "x"}', '[{"id": "x"}]',
])  # fmt: skip
WORDS = st.one_of(NASTY, st.text(max_size=20), st.from_regex(r"[-+]?\d*\.?\d*(e[-+]?\d{1,4})?", fullmatch=True))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


def text_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def misspelt(name: str, place: int, letter: str) -> str:
    place %= len(name)
    return name[:place] + letter + name[place + 1 :]


NAME = st.one_of(
    st.sampled_from(list(NAMES)),
    st.builds(misspelt, st.sampled_from(list(NAMES)), st.integers(0, 40), st.sampled_from("ABCX_ =\n")),
    st.builds("SFT_{}".format, WORDS),
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fuzz"))
    (path / "base").mkdir()
    (path / "base" / "config.json").write_text('{"model_type": "qwen3"}')
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = path / "cache"
    yield path
    datasets.config.HF_DATASETS_CACHE = before
    shutil.rmtree(path)


def outcome(folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Loads a ladder as train.py does; checks exit code and what is said."""

    def load(options: Any) -> int:
        return 0 if cli.load_ladder(options) else 1

    try:
        code = cli.command_line(load, ["--env-dir", str(folder), *arguments])
    except SystemExit as end:  # the command line itself is refused
        code = end.code
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    if code == 2:
        assert said.strip(), "refused without a word"


# Env files and command lines

LINE = st.one_of(
    st.builds("{}={}".format, NAME, WORDS),
    st.builds("{}='{}'".format, NAME, st.one_of(WORDS, VALUES.map(text_of))),
    st.builds('export {} = "{}" # {}'.format, NAME, WORDS, WORDS),
    st.builds("{}='[\n  {}\n]'".format, NAME, WORDS),
    WORDS,
)


@share(4)
@example(lines=[], raw=b"", overrides=[], stage="\ud83d")  # no stream that is strict can show it
@examples(
    lines=st.lists(LINE, max_size=12),
    raw=st.one_of(st.just(b""), st.binary(max_size=40)),
    overrides=st.lists(st.one_of(WORDS, st.builds("{}={}".format, NAME, WORDS)), max_size=3),
    stage=st.one_of(st.just("1"), st.sampled_from(["all", "1-1", "0", "2-1", "1-", "x", "-1", "99999", ""]), WORDS),
)
def test_env_files_and_command_lines(folder, capsys, lines, raw, overrides, stage):
    """Any lines, bytes and overrides end with exit 0 or 2, never with a traceback."""
    usual = f"SFT_BASE_MODEL={folder / 'base'}\nSFT_OUT_LORA_DIR={folder / 'out'}\nSFT_DATASET_ID=org/rows\n"
    content = (usual + "\n".join(lines)).encode("utf-8", "surrogatepass") + raw
    (folder / "stage1.env").write_bytes(content)
    sets = [part for text in overrides for part in ("--set", text)]
    outcome(folder, [f"--stage={stage}", *sets], capsys)


# Mixes

SOURCE_KEY = st.sampled_from("id weight split name revision limit repeat columns encoding wieght".split())
SOURCE = st.one_of(
    st.dictionaries(SOURCE_KEY, st.one_of(VALUES, st.just("org/rows"), st.floats(0, 5)), max_size=5),
    st.builds(lambda more: {"id": "org/rows"} | more, st.dictionaries(SOURCE_KEY, VALUES, max_size=2)),
    VALUES,
)


@share(3)
@examples(
    mix=st.one_of(st.lists(SOURCE, max_size=4), VALUES),
    name=st.sampled_from(["SFT_DATASET_MIX", "SFT_EVAL_DATASET", "SFT_GEN_EVAL_DATASET", "SFT_UPSAMPLE_RULES"]),
    cut=st.one_of(st.none(), st.integers(0, 200)),
)
def test_mixes(folder, capsys, mix, name, cut):
    """Any text as a mix, by --set or in a file, ends with exit 0 or 2, never with a traceback."""
    usual = f"SFT_BASE_MODEL={folder / 'base'}\nSFT_OUT_LORA_DIR={folder / 'out'}\nSFT_DATASET_ID=org/rows\n"
    text = text_of(mix)[:cut]
    (folder / "stage1.env").write_text(usual, encoding="utf-8")
    if "\x00" not in text:
        outcome(folder, ["--stage=1", "--set", f"{name}={text}"], capsys)
    (folder / "stage1.env").write_bytes((usual + f"{name}='{text}'\n").encode("utf-8", "surrogatepass"))
    outcome(folder, ["--stage=1"], capsys)


# Data files

PART = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image"]), "text": VALUES, "value": VALUES})
CALL = st.one_of(
    st.builds(lambda arguments: {"function": {"name": "f", "arguments": arguments}}, VALUES),
    st.builds(lambda given: {"name": "f", "arguments": text_of(given)}, st.dictionaries(WORDS, VALUES, max_size=2)),
    VALUES,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from("user assistant system human gpt ai tool function_call".split()), VALUES),
        "content": st.one_of(st.just("Answer: {\"a\": 1}"), st.lists(PART, max_size=2), VALUES),
        "from": st.sampled_from(["human", "gpt", "observation", "function_call"]), "value": VALUES,
        "tool_calls": st.one_of(VALUES, st.lists(CALL, max_size=2)), "function_call": CALL,
        "tool_call_id": VALUES, "name": VALUES, "reasoning_content": VALUES, "thinking": VALUES, "thoughts": VALUES,
        "train": VALUES, "weight": VALUES, "loss": VALUES,
    },
)  # fmt: skip
GOOD_TURNS = st.lists(WORDS, min_size=1, max_size=3).map(
    lambda texts: [{"role": role, "content": text} for text in texts for role in ("user", "assistant")]
)
CALLING_TURNS = st.builds(
    lambda calls, text: [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": text, "tool_calls": calls},
        {"role": "tool", "content": text}, {"role": "assistant", "content": "So.", "reasoning_content": text},
    ],
    st.lists(CALL, min_size=1, max_size=2), WORDS,
)  # fmt: skip
CELL = st.one_of(VALUES, st.just("What is it?"), st.just('Output: {"a": [1, 2]}'))
OF_MESSAGES = {"messages": st.one_of(GOOD_TURNS, CALLING_TURNS, st.lists(TURN, max_size=4), VALUES)}
MORE = {
    "system": CELL,
    "tools": st.one_of(st.lists(CALL, max_size=2), CELL),
    "images": CELL,
    "context": CELL,
    "label": CELL,
    "": CELL,
}
KEYS = {"subcategory": CELL, "metadata": CELL, "pack": CELL} | MORE
ROW = st.one_of(
    st.fixed_dictionaries(OF_MESSAGES, optional=KEYS),
    st.fixed_dictionaries({"conversations": st.one_of(st.lists(TURN, max_size=4), VALUES)}, optional=MORE),
    st.fixed_dictionaries({"instruction": CELL, "output": CELL}, optional={"input": CELL, "history": CELL} | MORE),
    st.fixed_dictionaries({"instruction": CELL}, optional={"response": CELL} | MORE),
    st.fixed_dictionaries({"prompt": CELL}, optional={"completion": CELL, "chosen": CELL, "rejected": CELL} | MORE),
    st.fixed_dictionaries({"text": CELL}, optional=MORE),
    st.fixed_dictionaries({"title": CELL, "abstract": CELL, "paths": CELL}, optional=MORE),
    VALUES,
)  # fmt: skip
SWITCHES = st.fixed_dictionaries(
    {},
    optional={
        "SFT_OVERLONG": st.sampled_from(["drop", "truncate", "error"]), "SFT_MASK_COT": st.just("1"),
        "SFT_MASKED_LOSS": st.just("inverse_frequency"),
        "SFT_MASKED_LOSS_UNIT": st.sampled_from(["path_edge", "json_edge"]),
        "SFT_TRAIN_TURNS": st.just("last"), "SFT_CHAT_TEMPLATE": st.sampled_from(["chatml", "mistral"]),
        "SFT_TRAIN_ON_PROMPT": st.just("1"), "SFT_DEDUPLICATE": st.just("1"),
        "SFT_VAL_RATIO": st.sampled_from(["0", "0.5"]),
        "SFT_MAX_SEQ_LEN": st.sampled_from(["16", "64", "256"]),
        "SFT_DATASET_MIX_TOTAL_SIZE": st.sampled_from(["1", "7"]), "SFT_SHUFFLE": st.sampled_from(["sources", "none"]),
    },
)  # fmt: skip


def file_bytes(rows: list[Any], ending: str) -> bytes | None:
    """The rows in that format; None where it can't hold them."""
    if ending == "jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode()
    if ending == "json":
        return json.dumps(rows).encode()
    tables = [row for row in rows if isinstance(row, dict)]
    if ending == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(
            stream, list(dict.fromkeys(key for row in tables for key in row)), extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(tables)
        return stream.getvalue().encode("utf-8", "surrogatepass")
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(pa.Table.from_pylist(tables), sink)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return None
    return sink.getvalue().to_pybytes()


@share(3)
@examples(
    rows=st.lists(ROW, max_size=6),
    ending=st.sampled_from(["jsonl", "json", "csv", "parquet"]),
    repeat=st.sampled_from([1, 1, 4]),
    spoil=st.one_of(st.none(), st.tuples(st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 30))),
    switches=SWITCHES,
)
def test_data_files(folder, rows, ending, repeat, spoil, switches):
    """Rows have at least one trained token each and are within the length asked for, or problems are listed."""
    content = file_bytes(rows * repeat, ending)
    if content is None:
        return
    if spoil is not None:
        place, added, lost = spoil
        place %= len(content) + 1
        content = content[:place] + added + content[place + lost :]
    path = folder / f"rows.{ending}"
    path.write_bytes(content)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    lines = {"SFT_BASE_MODEL": folder / "base", "SFT_OUT_LORA_DIR": folder / "out", "SFT_DATASET_ID": path} | switches
    (folder / "stage1.env").write_text("".join(f"{name}='{value}'\n" for name, value in lines.items()))
    said: list[str] = []
    try:
        settings = load_settings(1, env_dir=folder, environ={})
        WORDS_TOKENIZER.chat_template = chat_template_for(settings.chat_template) if settings.chat_template else CHATML
        mix = prepare_mix(settings, WORDS_TOKENIZER, say=said.append)
    except Problems as found:
        assert found.problems
        assert all(text.strip() for text in found.problems)
        return
    for row in mix.train:
        assert len(row["input_ids"]) == len(row["labels"]) <= settings.max_seq_len
        assert any(label != -100 for label in row["labels"])


CALLING = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": "Hi"}}]}
DEEP = {"a": [{"b": "text"}] * 9}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "x" * 10_000_000}, {"role": "assistant", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x " * 5_000_000}]},
        {"prompt": "Hi", "completion": "Bye"} | {f"column {number}": f"{number}" for number in range(1000)},
        {"prompt": "Hi", "completion": "Bye"} | {f"column {number}": DEEP for number in range(1000)},
        {"messages": [{"role": role, "content": "Hi"} for role in ("assistant", "tool", "system", "user") * 100]},
        {"messages": [CALLING, {"role": "tool", "content": "Hi"}] * 1000 + [{"role": "assistant", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi"} | {f"key {number}": "a" for number in range(5000)}]},
    ],
    ids=[
        "10 MB asked",
        "10 MB answered",
        "1,000 columns",
        "1,000 deep columns",
        "roles out of order",
        "1,000 calls",
        "5,000 keys",
    ],
)
def test_no_row_takes_a_second(folder, row):
    """Of odd rows beside usual ones each is trained on or dropped and counted, in a second of processor time."""
    path = folder / "odd.jsonl"
    usual = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}]}
    path.write_text("".join(json.dumps(each) + "\n" for each in (*[usual] * 30, row, row)), encoding="utf-8")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    lines = {"SFT_BASE_MODEL": folder / "base", "SFT_OUT_LORA_DIR": folder / "out", "SFT_DATASET_ID": path}
    (folder / "stage1.env").write_text("".join(f"{name}='{value}'\n" for name, value in lines.items()))
    begun = time.process_time()
    mix = prepare_mix(load_settings(1, env_dir=folder, environ={}), WORDS_TOKENIZER)
    assert time.process_time() - begun < 2 * 1.0 + 1.0  # two odd rows, and a second for everything else
    assert mix.sources[0].rows + mix.dropped.total() >= 32


WORDS_TOKENIZER = tokenizer()

"""Own and public rows become a folder training can name: exact texts, counted losses, named mistakes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from sft.data.labels.template import chat_template_for
from sft.data.sources.load import load_source
from sft.programs.command_line import run_program
from sft.programs.prepare_dataset import HUB_SOURCES, histogram
from sft.settings import Source

PROGRAM = Path(__file__).resolve().parents[1] / "official_content" / "prepare_custom_dataset.py"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS = [
    {"instruction": "東京の人口は?", "input": "", "output": "約1400万人です"},
    {"instruction": "Sum up.", "input": "Long, long text", "output": "Short."},
    {"instruction": "Sum up.", "input": "Long, long text", "output": "Short."},
    {"instruction": "No answer", "input": "", "output": " "},
]
MESSAGES = [
    [{"role": "user", "content": "東京の人口は?"}, {"role": "assistant", "content": "約1400万人です"}],
    [{"role": "user", "content": "Sum up.\n\n### Input:\nLong, long text"}, {"role": "assistant", "content": "Short."}],
]


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("prepare_custom_dataset", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepare(program, tmp_path, monkeypatch, capsys):
    """Runs the program in an empty folder with rows.json; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prepare_custom_dataset.py", *arguments])
        code = run_program(program.main)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def train_rows(folder: str) -> list[dict]:
    from datasets import load_from_disk

    return load_from_disk(folder)["train"].to_list()


def word_tokenizer(folder: Path) -> str:
    """A tokenizer that counts words, so that lengths can be checked by eye."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "words")
    return "words"


def test_rows_are_kept_once_and_losses_are_counted(prepare):
    """Four rows: one duplicate and one empty answer leave two, under the name <source>_<model>_<rows>."""
    code, out, _ = prepare("--model", "org/tiny", "--source", "json", "--source-path", "rows.json", "--max-length", "0")
    assert code == 0
    assert "2 rows written; lost: duplicate 1, empty answer 1" in out
    assert [row["messages"] for row in train_rows("datasets/json_tiny_2")] == MESSAGES
    metadata = json.loads(Path("datasets/json_tiny_2/metadata.json").read_text(encoding="utf-8"))
    assert metadata["dropped"] == {"duplicate": 1, "empty answer": 1}
    assert (metadata["num_samples"], metadata["format"], metadata["model_name"]) == (2, "alpaca", "org/tiny")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alpaca", "### Instruction:\nSum up.\n\n### Input:\nLong, long text\n\n### Response:\nShort."),
        (
            "chatml",
            "<|im_start|>user\nSum up.\n\nLong, long text<|im_end|>\n<|im_start|>assistant\nShort.<|im_end|>\n",
        ),
        ("llama2", "<s>[INST] Sum up.\n\nLong, long text [/INST] Short. </s>"),
    ],
)
def test_text_is_in_the_chosen_format(prepare, name, text):
    """The second row, which has an input, in each of the three formats."""
    prepare("--model", "m", "--source", "json", "--source-path", "rows.json", "--max-length", "0", "--format", name)
    assert train_rows("datasets/json_m_2")[1]["text"] == text


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama2"])
def test_training_sees_the_text_with_the_template_that_is_named(prepare, name):
    """The last line names SFT_CHAT_TEMPLATE; rendered with it, the messages hold the words and headings of `text`."""
    arguments = ["--source", "json", "--source-path", "rows.json", "--max-length", "0", "--format", name]
    lines = prepare("--model", "m", *arguments)[1].splitlines()
    assert lines[-2:] == ["SFT_DATASET_ID=datasets/json_m_2", f"SFT_CHAT_TEMPLATE={name}"]
    for row in train_rows("datasets/json_m_2"):
        rendered = render_jinja_template([row["messages"]], chat_template=chat_template_for(name), eos_token="")[0][0]
        assert rendered.replace("<s>", "").split() == row["text"].replace("<s>", "").replace("</s>", "").split()


def test_a_model_with_a_template_needs_no_other(program, tmp_path):
    """The line that would change the format is only a comment."""
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / word_tokenizer(tmp_path))
    assert program.template_line("alpaca", tokenizer) == "SFT_CHAT_TEMPLATE=alpaca"
    tokenizer.chat_template = "{{ messages }}"
    assert program.template_line("alpaca", tokenizer).startswith("# SFT_CHAT_TEMPLATE=alpaca would train the text")


def test_an_empty_input_has_no_heading(prepare):
    """The first row has no input, so the Alpaca text has no ### Input."""
    prepare("--model", "m", "--source", "json", "--source-path", "rows.json", "--max-length", "0")
    assert (
        train_rows("datasets/json_m_2")[0]["text"] == "### Instruction:\n東京の人口は?\n\n### Response:\n約1400万人です"
    )


def test_the_folder_is_a_source_without_further_settings(prepare):
    """load_source reads the messages from it, not the text."""
    prepare("--model", "m", "--source", "json", "--source-path", "rows.json", "--max-length", "0", "--output", "made")
    assert load_source(Source(id="made")).dataset["messages"][:] == MESSAGES


def test_over_long_rows_are_counted_by_the_models_tokenizer(prepare, tmp_path):
    """The first text has 6 words, the second 12: with a limit of 6 only the first is kept."""
    prepared = ["--model", word_tokenizer(tmp_path), "--source", "json", "--source-path", "rows.json"]
    code, out, _ = prepare(*prepared, "--max-length", "6")
    assert code == 0
    assert "over-long 1" in out
    metadata = json.loads(Path("datasets/json_words_1/metadata.json").read_text(encoding="utf-8"))
    assert metadata["histogram"][-1] == [6, 1]


def test_num_samples_keeps_the_first_rows_and_says_when_there_are_fewer(prepare):
    """One row of two with K = 1; with K = 9 both, the shortage named and the folder named as asked for."""
    base = ["--model", "m", "--source", "json", "--source-path", "rows.json", "--max-length", "0"]
    assert prepare(*base, "--num-samples", "1")[0] == 0
    assert len(train_rows("datasets/json_m_1")) == 1
    assert "only 2 of the 9 rows" in prepare(*base, "--num-samples", "9")[1]
    assert len(train_rows("datasets/json_m_9")) == 2


def test_csv_with_quoted_commas_and_japanese(prepare, tmp_path):
    """The document's CSV, read through the public program's names for the same flags."""
    lines = 'instruction,input,output\n"東京の人口は?","","約1400万人です"\n"Sum up.","Long, long text","Short."\n'
    (tmp_path / "rows.csv").write_text(lines, encoding="utf-8")
    code, _, err = prepare("--model", "m", "--input", "rows.csv", "--input-type", "csv", "--max-length", "0")
    assert (code, err) == (0, "")
    assert [row["messages"] for row in train_rows("datasets/csv_m_2")] == MESSAGES


def test_inspect_shows_rows_columns_lengths_and_the_first_row(prepare):
    """Everything document 004's validation snippet printed."""
    prepare("--model", "m", "--source", "json", "--source-path", "rows.json", "--max-length", "0", "--output", "made")
    code, out, _ = prepare("--inspect", "made")
    assert code == 0
    assert "train: 2 rows, columns messages, text" in out
    assert "東京の人口は?" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--source is missing"),
        (["--source", "json"], "--source json needs --source-path"),
        (["--source", "csv", "--source-path", "rows.json"], "reads .csv files"),
        (["--source", "alpaca", "--source-path", "rows.json"], "is read from the hub"),
        (["--source", "json", "--source-path", "none.json"], "none.json"),
        (["--source", "json", "--source-path", "object.json"], "where a list of rows belongs"),
        (["--source", "json", "--source-path", "empty.json"], "no row is left (empty answer 1)"),
        (["--source", "json", "--source-path", "sjis.json"], 'add --encoding "cp932"'),
        (["--source", "csv", "--source-path", "missing.csv"], "none of the known shapes"),
        (["--source", "csv", "--source-path", "missing.csv"], "name the file itself in SFT_DATASET_MIX"),
        (["--source", "json", "--source-path", "rows.json", "--max-length", "-1"], "--max-length -1"),
        (["--source", "json", "--source-path", "rows.json", "--output", "taken"], "is not overwritten"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(prepare, tmp_path, arguments, message):
    """Exit 2, one plain message, no output folder."""
    (tmp_path / "object.json").write_text('{"rows": []}', encoding="utf-8")
    (tmp_path / "empty.json").write_text('[{"instruction": "a", "output": ""}]', encoding="utf-8")
    (tmp_path / "sjis.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="cp932")
    (tmp_path / "missing.csv").write_text("instruction,input\na,b\n", encoding="utf-8")
    (tmp_path / "taken").mkdir()
    code, _, err = prepare("--model", "m", "--max-length", "0", *arguments)
    assert (code, message in err, "Traceback" in err) == (2, True, False), err
    assert not (tmp_path / "datasets").exists()
    assert list((tmp_path / "taken").iterdir()) == []


def test_a_model_that_can_only_be_a_path_is_no_hub_id(prepare):
    """The hub is not asked, nor blamed."""
    code, _, err = prepare("--model", "./gone", "--source", "json", "--source-path", "rows.json")
    assert (code, err) == (
        2,
        "[ERROR] --model ./gone: there is no such folder; correct the path, or give a hub id such as org/model\n",
    )


def test_all_missing_arguments_are_named_at_once():
    """--help and mistakes in the arguments need no heavy library; an unknown source is refused."""
    result = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("[ERROR]") == 2
    for mistake in (["--source", "reddit"], ["--encoding", "reddit"], ["--num-samples", "reddit"]):
        unknown = subprocess.run([sys.executable, PROGRAM, *mistake], capture_output=True, text=True, check=False)
        assert (unknown.returncode, "'reddit'" in unknown.stderr, "Traceback" in unknown.stderr) == (2, True, False)


def test_the_hub_sources_are_the_real_ids():
    """As they stand on the hub; dolly calls the input `context`."""
    assert {name: source.id for name, source in HUB_SOURCES.items()} == {
        "alpaca": "tatsu-lab/alpaca",
        "dolly": "databricks/databricks-dolly-15k",
        "wizardlm": "WizardLMTeam/WizardLM_evol_instruct_V2_196k",
    }
    assert HUB_SOURCES["dolly"].columns == {"input": "context"}


def test_histogram_counts_every_value_once():
    """1, 5, 10 and 95 in bins of 10: three in the first, one in the last."""
    counted = histogram([1, 5, 10, 95, 100])
    assert (counted[0], counted[-1], sum(number for _, number in counted)) == ((10, 3), (100, 2), 5)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")
def test_gpteacher_rows_are_instruction_rows(prepare):
    """All 1,923 real rows are distinct and kept."""
    path = str(SHARED / "gpteacher_roleplay.json")
    assert prepare("--model", "m", "--source", "json", "--source-path", path, "--max-length", "0")[0] == 0
    assert len(train_rows("datasets/json_m_1923")) == 1923

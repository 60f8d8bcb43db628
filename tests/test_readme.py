"""What the pages say can be typed: every command, flag, setting, file and link exists; the quick ones are run."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from sft import cli
from sft.data.draws import shares
from sft.data.sources.shapes import SHAPES, read_messages, shape_of
from sft.scoring.extraction import score_rows
from sft.settings import load_settings
from sft.settings.schema import NAMES

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The programs of the installed commands but staged-sft itself, which is train.py.
INSTALLED = {
    name: target.partition(":")[0].removeprefix("staged_sft.").replace(".", "/") + ".py"
    for name, target in PROJECT["scripts"].items()
    if name != "staged-sft"
}
SHARED = ROOT.parent / "shared" / "data"
GUIDE = ROOT / "official_content" / "TRAINING_GUIDE.md"
TYPED = [ROOT / "README.md", GUIDE, ROOT / "CONTRIBUTING.md", ROOT / "docs" / "guide.md"]
PAGES = [*TYPED, ROOT / "docs" / "gpu_machines.md", ROOT / "CHANGELOG.md", ROOT / "docs" / "log.md"]
ASSIGNMENT = re.compile(r"^([A-Z][A-Z0-9_]*)=", re.MULTILINE)
HEREDOC = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF\n", re.MULTILINE | re.DOTALL)
# Written for the reader's own files and results.
THEIRS = ("my/", "outputs/", "datasets/", "data/", "results/", "mlruns/", ".venv/")
NEEDED = {"SFT_BASE_MODEL": "some/model", "SFT_OUT_LORA_DIR": "out", "SFT_DATASET_ID": "rows.jsonl"}
ACCELERATE_FLAGS = {
    "--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port",
}  # fmt: skip


@dataclass(frozen=True)
class Page:
    """The shell blocks of a page: commands as lists of words, and env files as texts."""

    commands: list[list[str]] = field(default_factory=list)
    env_files: dict[str, str] = field(default_factory=dict)


def blocks(path: Path, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@cache
def page(path: Path) -> Page:
    found = Page()
    for number, block in enumerate(blocks(path, "bash")):
        for name, text in HEREDOC.findall(block):
            found.env_files[f"block {number}: {name}"] = text
        rest = HEREDOC.sub("", block)
        if ASSIGNMENT.search(rest):
            found.env_files[f"block {number}"] = rest
        else:
            found.commands.extend(words for line in lines_of(rest) if (words := shlex.split(line, comments=True)))
    return found


def lines_of(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def all_commands() -> list[list[str]]:
    return [words for path in TYPED for words in page(path).commands]


def after(words: list[str], name: str) -> list[str]:
    """The arguments that follow a program."""
    return words[words.index(name) + 1 :] if name in words else []


def flags_of(parser: object) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}  # type: ignore[attr-defined]


@cache
def help_of(program: str) -> str:
    """What a program prints for --help, within the time it takes to be useful."""
    start = [sys.executable] if program.endswith(".py") else ["bash"]
    done = subprocess.run(
        [*start, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def programs() -> list[str]:
    """The programs of official_content; store_token.py is a part of configure_huggingface.sh."""
    folder = ROOT / "official_content"
    found = {str(path.relative_to(ROOT)) for kind in ("*.py", "*.sh") for path in folder.glob(kind)}
    return sorted(found - {"official_content/store_token.py"})


def test_there_is_something_to_check():
    """Guards the parsing: the README's and the guide's blocks are found."""
    assert len(all_commands()) > 40
    assert len(page(GUIDE).env_files) > 15


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_command_starts_a_program_that_is_there(words: list[str]):
    """make targets, python and shell programs, accelerate; the few words of the shell itself."""
    head, *rest = words
    if head == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif Path(head).name == "python":
        named = rest[1] if rest[0] == "-m" else rest[0]
        assert rest[0] == "-m" or (ROOT / named).is_file() or named == "entities_to_rows.py"
    elif head == "accelerate":
        assert rest[0] == "launch"
        assert "train.py" in rest
    elif head.endswith(".sh"):
        assert os.access(ROOT / head, os.X_OK)
    elif head == "pip":
        (what,) = after(words, "install")
        assert what.startswith(".[")
        assert set(re.findall(r"\w+", what)) <= set(PROJECT["optional-dependencies"])
    else:
        assert head in ("source", "mkdir", "mlflow", *PROJECT["scripts"])


def test_every_flag_of_train_py_exists():
    """Also values: settings named by --set, folders by --env-dir, a stage's number, a range or all."""
    known = flags_of(cli.parser())
    starts = ("train.py", "staged-sft")
    seen = [after(words, start) for words in all_commands() for start in starts if start in words]
    assert len(seen) > 15
    assert {word for words in seen for word in words if word.startswith("--")} <= known
    for words in seen:
        options = cli.parser().parse_args(words)
        assert options.stage is None or re.fullmatch(r"all|\d+(-\d+)?", options.stage)
        assert {override.partition("=")[0] for override in options.overrides} <= set(NAMES)
        assert str(options.env_dir) == "my" or (ROOT / options.env_dir).is_dir()


def test_every_flag_of_accelerate_is_one_we_know_and_its_file_is_there():
    """accelerate's own parser takes seconds to import; these are all its flags that the pages use."""
    launches = [words[2 : words.index("train.py")] for words in all_commands() if words[0] == "accelerate"]
    assert launches
    assert {word for words in launches for word in words if word.startswith("--")} <= ACCELERATE_FLAGS
    assert all((ROOT / words[words.index("--config_file") + 1]).is_file() for words in launches)


def test_every_flag_of_the_other_programs_is_in_their_help():
    """For instance --source-path of prepare_custom_dataset.py."""
    used = set()
    for words in all_commands():
        for name in set(words) & {*programs(), *INSTALLED}:
            program = INSTALLED.get(name, name)
            used |= {(program, word) for word in after(words, name) if word.startswith("--")}
    assert len(used) > 10
    assert [(program, flag) for program, flag in sorted(used) if flag not in help_of(program)] == []


@pytest.mark.parametrize("program", programs())
def test_every_program_answers_help(program: str):
    """At once and on stdout, and by its own name."""
    assert Path(program).name in help_of(program)


ENV_FILES = [(path.name, place, text) for path in TYPED for place, text in page(path).env_files.items()]


@pytest.mark.parametrize(
    "text", [text for *_, text in ENV_FILES], ids=[f"{name} {place}" for name, place, _ in ENV_FILES]
)
def test_every_env_file_of_the_pages_is_read_without_a_problem(text: str, tmp_path: Path):
    """Names, values and JSON; what a fragment leaves out is added."""
    missing = {name: value for name, value in NEEDED.items() if name not in ASSIGNMENT.findall(text)}
    lines = "".join(f"{name}={value}\n" for name, value in missing.items())
    (tmp_path / "stage1.env").write_text(lines + text, encoding="utf-8")
    settings = load_settings(1, env_dir=tmp_path, environ={})
    written = [name for name in ASSIGNMENT.findall(text) if name in NAMES]
    assert {settings.origins[name].split()[0] for name in written} == {"stage1.env"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_setting_named_in_a_page_exists(path: Path):
    """Anywhere in it, not only in commands."""
    named = set(re.findall(r"\b(?:SFT|MLFLOW)_[A-Z0-9_]*[A-Z0-9]\b", path.read_text(encoding="utf-8")))
    assert named <= set(NAMES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_of_ours_named_in_a_page_exists(path: Path):
    """Programs, launch files, recipes, pages, modules; by their path from the root."""
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])((?:official_content|configs|docs|tests|sft)/[\w/.-]*\w)(?![\w<*])", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path):
    """Files from where the page stands, headings by the anchor GitHub makes of them."""
    text = path.read_text(encoding="utf-8")
    headings = {anchor(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, hash_mark, fragment = target.partition("#")
        if target.startswith("https://"):
            continue
        if (name and not (path.parent / name).exists()) or (hash_mark and not name and fragment not in headings):
            broken.append(target)
    assert broken == []


def anchor(title: str) -> str:
    """GitHub's: lower case, punctuation away, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_recipe_named_in_a_page_is_shipped(path: Path):
    """The names in code quotes that look like one."""
    shipped = {folder.name for folder in (ROOT / "configs" / "recipes").iterdir()}
    models = r"structeval|offender|ontology|socratic|instruct|smollm2|debug"
    named = set(re.findall(rf"\b((?:{models})_\w+)", path.read_text(encoding="utf-8")))
    assert named <= shipped


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "official_content/TRAINING_GUIDE.md"])
def test_every_shape_of_rows_is_listed(page: str):
    """Each page names the columns that a shape is recognised by."""
    named = set(re.findall(r"`(\w+)`", (ROOT / page).read_text(encoding="utf-8")))
    assert [shape.name for shape in SHAPES if not shape.required <= named] == []


def test_the_mixture_of_1000_and_500_rows_is_as_the_pages_say():
    """Weights 1 and 2: 333 + 667 of 1,000; after 5 % for validation 317 + 633 of 950."""
    assert shares([1.0, 2.0], 1000) == [333, 667]
    assert shares([1.0, 2.0], max(1000 - 50, 500 - 25)) == [317, 633]
    assert "333 + 667 = 1,000" in PAGES[0].read_text(encoding="utf-8")
    assert "317 + 633 = 950" in GUIDE.read_text(encoding="utf-8")


def test_the_readmes_exit_codes_are_those_of_the_program():
    """The numbers of the table and of --help."""
    numbers = {"0", "1", "2", "3", "143", "130"}
    assert numbers <= set(re.findall(r"\d+", cli.EPILOG))
    table = re.findall(r"^\| ([\d, ]+) \|", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE)
    assert {number for cell in table for number in cell.split(", ")} == numbers


# The script of the guide that makes an extraction task of entities --------------------------------------------------


def convert(folder: Path, entities: Path) -> dict[str, list[dict[str, str]]]:
    """Saves the guide's script, runs it, returns the rows of its three files."""
    (script,) = (block for block in blocks(GUIDE, "python") if "entities_to_rows.py" in block)
    (folder / "entities_to_rows.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "entities_to_rows.py", str(entities), "out"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    return {
        name: [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("positives", "negatives", "val")
    }


def entity_row(text: str, **names: str) -> dict[str, object]:
    kinds = {"person": "人名", "place": "地名", "office": "政治的組織名", "company": "法人名"}
    found = [{"name": name, "span": [0, len(name)], "type": kinds[kind]} for kind, name in names.items()]
    return {"curid": "1", "text": text, "entities": found}


def test_the_guides_script_writes_answers_of_document_001s_shape(tmp_path: Path):
    """One positive and one negative by hand; both are rows that training reads and answers the scorer takes."""
    rows = [
        entity_row("佐藤は大阪府警に大阪で話した。", person="佐藤", place="大阪", office="大阪府警"),
        entity_row("大阪は広い。", place="大阪"),
    ]
    (tmp_path / "entities.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    made = convert(tmp_path, tmp_path / "entities.json")
    assert [len(made[name]) for name in ("positives", "negatives", "val")] == [1, 1, 0]
    (positive,), (negative,) = made["positives"], made["negatives"]
    answer = json.loads(positive["output"])
    assert [(person["name"], person["is_offender"]) for person in answer["persons"]] == [("佐藤", True)]
    assert (answer["occured_locations"], answer["police_departments"]) == (["大阪"], ["大阪府警"])
    assert json.loads(negative["output"]) == {"persons": [], "occured_locations": [], "police_departments": []}
    for row in (positive, negative):
        shape = shape_of(tuple(row))
        assert shape is not None
        assert read_messages(row, shape)[-1] == {"role": "assistant", "content": row["output"]}
    _, metrics = score_rows([(row["output"], row["output"]) for row in (positive, negative)])
    assert metrics["gen_all_fields_exact_match_rate"] == metrics["gen_offender_presence_f1"] == 1.0


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")
def test_the_guides_script_reads_the_real_entities(tmp_path: Path):
    """5,343 rows, 1,739 of them with a person; a twentieth of either kind is held back, no row is lost or doubled."""
    made = convert(tmp_path, SHARED / "ner_wikipedia_ja.json")
    assert {name: len(rows) for name, rows in made.items()} == {"positives": 1653, "negatives": 3424, "val": 266}
    assert 1653 + 1739 // 20 == 1739
    assert 3424 + (5343 - 1739) // 20 == 5343 - 1739


# Really run ---------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=550)


def test_help_of_train_py_answers_with_every_flag_of_the_readme():
    """No torch is imported for it."""
    done = run("train.py", "--help")
    assert done.returncode == 0
    assert [
        flag for flag in ("--check", "--env-dir", "--set", "--fresh", "--strict", "--gate") if flag not in done.stdout
    ] == []


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "official_content" / "demo" / "model").is_dir(), reason="the demo model is not here")
def test_check_of_the_embedded_ladder():
    """The guide's command that loads tokenizer and rows of all three stages; it trains nothing and finds no problem."""
    done = run("train.py", "--check", "--stage", "all", "--set", "SFT_REPORT_TO=none")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^Stage (\d):", done.stdout, re.MULTILINE) == ["1", "2", "3"]


def test_the_pictures_are_small_and_of_one_width():
    """Made by docs/pictures/take.py; under 200 kB each, so that the page loads at once."""
    pictures = sorted((ROOT / "docs" / "pictures").glob("*.png"))
    assert [path.name for path in pictures] == ["matrix.png", "report.png"]
    assert [path.name for path in pictures if path.stat().st_size >= 200_000] == []
    widths = {int.from_bytes(path.read_bytes()[16:20], "big") for path in pictures}
    assert len(widths) == 1


@pytest.mark.slow
def test_the_first_screen_of_the_readme_is_typed(commands: Path, tmp_path: Path):
    """Its block line by line in an empty folder but for the installation, with the embedded model in place of a 4B one
    and three steps; `staged-sft-demo` writes what the next block trains."""
    rows = (ROOT / "official_content" / "demo" / "data" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "rows.jsonl").write_text("\n".join(rows[:60]) + "\n", encoding="utf-8")
    first, second = (each for each in blocks(PAGES[0], "bash") if "staged-sft" in each)
    script = "set -ex\n" + first.replace("pip install '.[gpu]'\n", "") + second.partition("\n")[0]
    chosen = {"SFT_BASE_MODEL": str(ROOT / "official_content" / "demo" / "model"), "SFT_MAX_STEPS": "3"}
    chosen |= {"SFT_GENERAL_EVAL": "0", "SFT_REPORT_TO": "none", "SFT_MAX_SEQ_LEN": "512"}
    paths = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{commands}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=550, input="name is Sora\n",
        env=os.environ | chosen | paths,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "my_stage1" / "report.html").is_file()
    assert (tmp_path / "outputs" / "my_stage1" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "stage3.env").is_file()

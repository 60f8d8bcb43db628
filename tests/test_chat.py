"""chat.py: messages from lines, what is remembered, what is loaded, how it ends."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sft.errors import Problems
from sft.evaluation.answers import generate_answers, prompt_texts
from sft.settings import load_settings
from sft.stages.manifest import with_digest
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "official_content" / "chat.py"
specification = importlib.util.spec_from_file_location("chat_program", PROGRAM)
assert specification and specification.loader
chat = importlib.util.module_from_spec(specification)
specification.loader.exec_module(chat)


class Model:
    """As much of a model as `fitting` looks at."""

    config = SimpleNamespace(max_position_embeddings=60)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_line_is_a_message_and_a_backslash_goes_on_in_the_next():
    """Blank lines are none; the last line needs no newline."""
    lines = ["one\n", "\n", "a,b\\\n", "1,2\\\n", "\n", "  \n", "last"]
    assert list(chat.spoken(lines)) == ["one", "a,b\n1,2\n", "last"]


def test_a_backslash_before_the_end_keeps_what_was_said():
    """Nothing typed is lost."""
    assert list(chat.spoken(["half\\\n"])) == ["half"]


def test_the_oldest_exchanges_are_forgotten_when_the_positions_are_used_up(capsys: pytest.CaptureFixture[str]):
    """The system message and the last question stay."""
    tokenizer = tiny.tokenizer()
    talk = [
        turn("system", "red"), turn("user", "blue"), turn("assistant", "green"), turn("user", "small"),
        turn("assistant", "large"), turn("user", "name"),
    ]  # fmt: skip
    lengths = [chat.prompt_ids(tokenizer, [talk[0], *talk[start:]]).shape[1] for start in (1, 3, 5)]
    room = Model.config.max_position_embeddings - lengths[1]
    assert lengths[0] > lengths[1] > lengths[2]
    assert chat.fitting(Model, tokenizer, talk, room) == [talk[0], *talk[3:]]
    assert capsys.readouterr().err.count("forgotten") == 1
    assert chat.fitting(Model, tokenizer, talk, 1000) == [talk[0], talk[5]]


def test_a_tokenizer_without_template_is_a_problem():
    """Trained on plain text: there is nobody to talk to."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(Problems, match="no chat template"):
        chat.prompt_ids(tokenizer, [turn("user", "name")])


def test_a_template_that_refuses_the_conversation_is_a_problem():
    """Gemma's, for instance, refuses a system message."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(Problems, match="no system role"):
        chat.prompt_ids(tokenizer, [turn("system", "red"), turn("user", "name")])


def start(folder: Path, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), "--env-dir", str(folder), *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=300, cwd=folder)


def test_a_stage_that_was_not_trained_is_exit_2_and_names_the_command(tmp_path: Path):
    """One line, no traceback, nothing on stdout."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    tiny.write_stage(tmp_path, 2, {"SFT_BASE_MODEL": "some/model", "SFT_OUT_LORA_DIR": "out", "SFT_DATASET_ID": rows})
    done = start(tmp_path, "--stage", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"[ERROR] out_stage2: holds no trained stage; train it with python train.py --stage 2 --env-dir {tmp_path}, "
        "or name its folder by --env-dir or --set"
    ]


def test_a_missing_env_file_is_exit_2(tmp_path: Path):
    """Found before anything heavy is imported."""
    done = start(tmp_path, "--stage", "1")
    assert done.returncode == 2
    assert "stage1.env" in done.stderr


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained stages of the tiny model."""
    folder = tmp_path_factory.mktemp("chat")
    settings = {
        "SFT_BASE_MODEL": tiny.write_model(folder / "base"),
        "SFT_OUT_LORA_DIR": folder / "out",
        "SFT_DATASET_ID": tiny.write_rows(folder / "rows.jsonl", 20),
        "SFT_MAX_STEPS": 3,
    }
    for number in (1, 2):
        tiny.write_stage(folder, number, settings)
    assert tiny.run_train("--stage", "all", "--env-dir", folder) == 0
    return folder


def expected_answer(folder: Path, messages: list[dict[str, str]]) -> str:
    """By PEFT alone: base + adapter 1 merged + adapter 2."""
    tokenizer = tiny.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(model, folder / "out_stage1").merge_and_unload()
    model = PeftModel.from_pretrained(model, folder / "out_stage2").eval()
    texts = prompt_texts([messages], tokenizer)
    return generate_answers(model, tokenizer, texts, max_new_tokens=8, batch_size=1)[0].text


@pytest.mark.slow
def test_answers_are_those_of_base_and_all_adapters_to_the_whole_conversation(ladder: Path):
    """Through a pipe: only answers on stdout; the second is to both questions; /reset forgets them; /quit ends."""
    first, second = turn("user", "Write this as JSON: the name is red"), turn("user", "and the color is blue")
    answer = expected_answer(ladder, [first])
    following = expected_answer(ladder, [first, turn("assistant", answer), second])
    said = [first["content"], second["content"], "/reset", first["content"], "/quit", "never asked"]
    done = start(ladder, "--stage", "2", "--max-new-tokens", "8", said="\n".join(said) + "\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{answer}\n{following}\n{answer}\n"


@pytest.mark.slow
def test_without_the_published_merge_the_earlier_adapters_are_folded_in_here(ladder: Path, tmp_path: Path):
    """Somebody removed OUT_stage2_merged_base to save space: the same weights, without writing anything."""
    copy = tmp_path / "ladder"
    shutil.copytree(ladder, copy)
    for number in (1, 2):
        path = copy / f"stage{number}.env"
        path.write_text(path.read_text().replace(str(ladder), str(copy)))
    settings = load_settings(2, env_dir=copy, environ={})
    origin = chat.find_stage(copy / "out_stage2")
    with_merge, _ = chat.load(settings, origin)
    shutil.rmtree(copy / "out_stage2_merged_base")
    without, _ = chat.load(settings, origin)
    there, here = with_merge.state_dict(), without.state_dict()
    assert there.keys() == here.keys()
    assert max(float((there[name] - here[name]).abs().max()) for name in there) < 1e-6
    assert not (copy / "out_stage2_merged_base").exists()


@pytest.mark.slow
def test_an_outdated_parent_is_a_problem(ladder: Path, tmp_path: Path):
    """Stage 1 has other weights than stage 2 was trained on."""
    copy = tmp_path / "ladder"
    shutil.copytree(ladder, copy)
    weights = copy / "out_stage1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(Problems, match="was trained again after stage 2"):
        chat.find_stage(copy / "out_stage2")


@pytest.mark.slow
def test_a_stage_that_is_not_complete_is_a_problem(ladder: Path, tmp_path: Path):
    """Its manifest says running."""
    copy = tmp_path / "ladder"
    shutil.copytree(ladder, copy)
    manifest = copy / "out_stage1" / "stage.json"
    manifest.write_text(json.dumps(with_digest(json.loads(manifest.read_text()) | {"status": "running"})))
    with pytest.raises(Problems, match="stage 1 is running"):
        chat.find_stage(copy / "out_stage1")


def moved_ladder(ladder: Path, target: Path) -> Path:
    """The ladder with its base model renamed, its env files still naming the old place."""
    shutil.copytree(ladder, target)
    for number in (1, 2):
        path = target / f"stage{number}.env"
        path.write_text(path.read_text().replace(f"{ladder}/out", f"{target}/out"))
    for number in (1, 2):
        manifest = target / f"out_stage{number}" / "stage.json"
        record = json.loads(manifest.read_text()) | {"base_model": str(target / "base")}
        manifest.write_text(json.dumps(with_digest(record)))
    (target / "base").rename(target / "moved")
    return target


@pytest.mark.slow
def test_a_base_model_that_was_moved_is_named_by_an_option(ladder: Path, tmp_path: Path):
    """Stage 1 has no merged folder to fall back on; stage 2 has, and needs no option."""
    copy = moved_ladder(ladder, tmp_path / "ladder")
    one, two = (load_settings(number, env_dir=copy, environ={}) for number in (1, 2))
    origin = chat.find_stage(copy / "out_stage1")
    elsewhere = f"SFT_BASE_MODEL={copy / 'out_stage2_merged_base'}"
    with pytest.raises(Problems, match="was moved, say where to with --base-model FOLDER"):
        chat.load(load_settings(1, env_dir=copy, overrides=[elsewhere], environ={}), origin)
    model, _ = chat.load(one, origin, str(copy / "moved"))
    expected, _ = chat.load(one, chat.find_stage(ladder / "out_stage1"))
    there, here = model.state_dict(), expected.state_dict()
    assert all(there[name].equal(here[name]) for name in here)
    chat.load(two, chat.find_stage(copy / "out_stage2"))
    with pytest.raises(Problems, match="is not the model that out_stage2 was trained on"):
        chat.load(two, chat.find_stage(copy / "out_stage2"), str(copy / "out_stage2_merged_base"))


@pytest.mark.slow
def test_settings_that_name_the_new_place_are_enough(ladder: Path, tmp_path: Path):
    """SFT_BASE_MODEL leads to the same content as the manifest's: no option is needed."""
    copy = moved_ladder(ladder, tmp_path / "ladder")
    settings = load_settings(1, env_dir=copy, environ={}, overrides=[f"SFT_BASE_MODEL={copy / 'moved'}"])
    model, _ = chat.load(settings, chat.find_stage(copy / "out_stage1"))
    assert model.get_base_model().config.name_or_path == str(copy / "moved")


@pytest.mark.slow
def test_the_program_takes_the_option_in_place_of_a_folder_that_is_gone(ladder: Path, tmp_path: Path):
    """The env file and the manifest name the old place: exit 2 that names the option, then the same answer by it; a
    place where nothing is and another model are exit 2."""
    copy = moved_ladder(ladder, tmp_path / "ladder")
    path = copy / "stage1.env"
    path.write_text(path.read_text().replace(f"{ladder}/base", f"{copy}/base"))
    arguments, said = ("--stage", "1", "--max-new-tokens", "8"), "Write this as JSON: the name is red\n"
    (copy / "stage2.env").write_text((copy / "stage2.env").read_text().replace(f"{ladder}/base", f"{copy}/base"))
    second = ("--stage", "2", "--max-new-tokens", "8")
    merged = start(copy, *second, said=said)  # has what it needs: its own merged folder
    assert (merged.returncode, merged.stdout) == (0, start(ladder, *second, said=said).stdout), merged.stderr
    refused = start(copy, *arguments, said=said)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"SFT_BASE_MODEL={copy / 'base'}: there is no such folder" in refused.stderr
    assert "; if the base model was moved, say where to with --base-model FOLDER" in refused.stderr
    done = start(copy, *arguments, "--base-model", "moved", said=said)
    assert done.returncode == 0, done.stderr
    assert done.stdout == start(ladder, *arguments, said=said).stdout != ""
    for wrong, words in ((copy / "nowhere", "there is no such folder"), ("out_stage2_merged_base", "is not the model")):
        refused = start(copy, *arguments, "--base-model", str(wrong), said=said)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"[ERROR] --base-model {wrong}: {words}")

"""General questions: what they hold, and that the most likely choice per byte is the answer."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from sft.evaluation import general, ladder_scores
from sft.evaluation.general import Question, answer_general, general_metrics, general_questions, is_chance
from tests.architectures import CONFIGS, tiny_model
from tests.tiny import run_train, tokenizer, write_model, write_rows, write_stage


def test_150_questions_of_five_kinds_in_two_languages():
    """Each has four different choices; none is asked twice."""
    questions = general_questions()
    assert len(questions) == 150
    assert len({question.text for question in questions}) == 150
    assert {len(set(question.choices)) for question in questions} == {4}
    assert min(Counter((question.kind, question.language) for question in questions).values()) >= 10
    assert {question.kind for question in questions} == {"knowledge", "arithmetic", "reading", "instruction", "formats"}
    assert next(each.choices[0] for each in questions if "tea and milk" in each.text) == "- tea\n- milk"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(write_model(tmp_path_factory.mktemp("general") / "base"))


def by_hand(model: Qwen3ForCausalLM, question: Question) -> int:
    """The choice with the highest log-likelihood per byte, each computed alone, in float64."""
    words = tokenizer()
    scores = []
    for choice in question.choices:
        prompt = f"<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
        before, answer = words(prompt)["input_ids"], words(choice)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0].double().log_softmax(dim=-1)
        total = sum(logits[len(before) - 1 + place, token].item() for place, token in enumerate(answer))
        scores.append(total / len(choice.encode()))
    return max(range(len(scores)), key=scores.__getitem__)


def test_the_answer_is_the_choice_that_is_most_likely_per_byte(model, monkeypatch):
    """Whatever the batch, against each choice computed alone; the right one stands anywhere in the batch."""
    questions = general_questions()[::9]
    turned = [
        Question(each.kind, each.language, each.text, each.choices[number % 4 :] + each.choices[: number % 4])
        for number, each in enumerate(questions)
    ]
    expected = [by_hand(model, question) == 0 for question in turned]
    assert True in expected
    assert False in expected
    for size in (3, 16):
        monkeypatch.setattr(general, "_AT_ONCE", size)
        assert answer_general(model, tokenizer(), turned) == expected
    assert general._keeps_all(model)  # so far each prompt was read once; now with every choice
    monkeypatch.setattr(general, "_keeps_all", lambda model: False)
    assert answer_general(model, tokenizer(), turned) == expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_reading_a_prompt_once_changes_no_likelihood(kind: str):
    """Where a layer keeps a window or a state every choice is read with its prompt; elsewhere both ways agree, behind
    an adapter as well."""
    model = tiny_model(kind)
    assert general._keeps_all(model) == (kind in ("qwen3", "qwen3_moe"))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
    choices = [[[20 + place] * (1 + (place + line) % 3) for place in range(4)] for line in range(3)]
    with torch.no_grad():
        alone = general._one_by_one(model, prompts, choices)
        first = torch.log_softmax(model(torch.tensor([prompts[0]])).logits[0, -1], dim=-1)[20].item()
        assert alone[0][0] == pytest.approx(first, abs=1e-4)
        if general._keeps_all(model):
            adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
            assert general._keeps_all(adapted)
            together = general._behind_prompts(adapted, prompts, choices)
            assert together == [pytest.approx(each, abs=1e-4) for each in alone]


def test_what_questions_begin_with_alike_is_read_once_for_all_batches(model):
    """Eight prompts in two batches with 60 tokens in common, read once; the likelihoods are those of whole prompts."""
    common = [5 + place % 40 for place in range(60)]
    prompts = [[*common, *range(50 + line, 52 + 2 * line)] for line in range(8)]
    choices = [[[20 + place] * (1 + (place + line) % 3) for place in range(4)] for line in range(8)]
    read: list[int] = []
    hook = model.register_forward_pre_hook(lambda *given: read.append(given[2]["input_ids"].numel()), with_kwargs=True)
    kept: general.Kept = {}
    with torch.no_grad():
        found = [
            each
            for part in (slice(0, 4), slice(4, 8))
            for each in general._behind_prompts(model, prompts[part], choices[part], kept)
        ]
        hook.remove()
        assert found == [pytest.approx(each, abs=1e-4) for each in general._one_by_one(model, prompts, choices)]
    own = sum(len(prompt) - len(common) for prompt in prompts)
    behind = 4 * 4 * 2 * 2  # two batches of four questions with four choices, of which up to two tokens are read
    assert sum(read) < len(common) + 2 * own + behind
    assert read.count(len(common)) == 1


def test_accuracy_over_all_by_kind_and_by_language():
    """Three of four: the wrong one is a Japanese reading question."""
    kinds = (("knowledge", "en"), ("knowledge", "ja"), ("reading", "en"), ("reading", "ja"))
    questions = [Question(kind, language, "?", ("a", "b", "c", "d")) for kind, language in kinds]
    assert general_metrics(questions, [True, True, True, False]) == {
        "general_accuracy": 0.75, "general_accuracy/knowledge": 1.0, "general_accuracy/reading": 0.5,
        "general_accuracy/en": 1.0, "general_accuracy/ja": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(("accuracy", "guessed"), [(0.25, True), (0.31, True), (0.33, False), (0.5, False)])
def test_a_model_that_guesses_is_told_from_one_that_knows(accuracy, guessed):
    """Of 150 questions with four choices, guessing gets more than 48 right one time in forty."""
    assert is_chance(accuracy, 150) == guessed


@pytest.mark.slow
def test_a_ladder_is_asked_before_and_after_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Base once, each stage once: a column of the matrix without any generation, metrics, and an untouched adapter."""
    common = {"SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_MAX_STEPS": 2}
    rows = {"SFT_DATASET_ID": write_rows(tmp_path / "rows.jsonl", 20), "SFT_OUT_LORA_DIR": tmp_path / "out"}
    for number in (1, 2):
        write_stage(tmp_path, number, common | rows | {"SFT_GENERAL_EVAL": 1})
    monkeypatch.setattr(ladder_scores, "is_chance", lambda accuracy, count: False)
    monkeypatch.setattr(ladder_scores, "ask_general", counted := Counted())
    assert run_train("--stage", "all", "--env-dir", tmp_path) == 0
    assert counted.asked == 3
    said = capsys.readouterr()
    assert "General questions: 0.400 right before this stage, 0.300 after it" in said.out + said.err
    manifest = json.loads((tmp_path / "out_stage2" / "stage.json").read_text())
    matrix = manifest["forgetting"]
    assert (matrix["models"], matrix["tasks"]) == (["base", "stage 1", "stage 2"], ["general"])
    assert matrix["scores"] == [[0.5], [0.4], [0.3]]
    assert manifest["metrics"]["general_accuracy"] == 0.3
    assert manifest["metrics"]["general_accuracy/reading"] == 0.3
    assert (
        "stage 2 lost 0.200 on the general questions (base scored 0.500, now 0.300; 95 % interval"
        in said.out + said.err
    )
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path, plain, ignore=shutil.ignore_patterns("out*"))
    assert run_train("--stage", "1", "--env-dir", plain, "--set", "SFT_GENERAL_EVAL=0",
                     "--set", f"SFT_OUT_LORA_DIR={plain / 'out'}") == 0  # fmt: skip
    asked, unasked = (load_file(place / "out_stage1" / "adapter_model.safetensors") for place in (tmp_path, plain))
    assert all(torch.equal(asked[name], unasked[name]) for name in asked)


class Counted:
    """Scores that fall by a tenth each time; the model really answers, so that random states could shift."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(
        self, model: torch.nn.Module, words: object, accelerator: object
    ) -> tuple[dict[str, float], list[float]]:
        answer_general(model, words, general_questions()[:8], accelerator=accelerator)
        self.asked += 1
        score = round(0.6 - 0.1 * self.asked, 1)
        return {"": score, "reading": score}, [1.0] * round(10 * score) + [0.0] * round(10 - 10 * score)


@pytest.mark.slow
def test_a_model_that_only_guesses_has_no_column(tmp_path: Path, capsys):
    """Said in one line, nothing measured afterwards."""
    values = {"SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_MAX_STEPS": 1, "SFT_GENERAL_EVAL": 1}
    rows = {"SFT_DATASET_ID": write_rows(tmp_path / "rows.jsonl", 20), "SFT_OUT_LORA_DIR": tmp_path / "out"}
    write_stage(tmp_path, 1, values | rows)
    assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
    said = capsys.readouterr()
    assert "General questions left out: base has " in said.out + said.err
    assert json.loads((tmp_path / "out_stage1" / "stage.json").read_text())["forgetting"] is None

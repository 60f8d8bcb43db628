"""General questions: what they hold, and that the most likely choice per byte is the answer."""

from collections import Counter

import pytest
import torch
from transformers import Qwen3ForCausalLM

from sft.evaluation import general
from sft.evaluation.general import Question, answer_general, general_metrics, general_questions, is_chance
from tests.tiny import tokenizer, write_model


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

"""Questions are drawn by seed, answered, scored, and kept with what is wrong with each answer."""

import json
from types import SimpleNamespace

import datasets
import pytest

from sft.evaluation import generation_evaluation
from sft.evaluation.answers import Answer
from sft.evaluation.generation_evaluation import GenerationEvaluation, questions, write_questions
from sft.stages.manifest import Manifest
from tests.ladders import make_settings
from tests.tiny import tokenizer


def settings(**values):
    plain = {
        "gen_eval": "structured", "gen_eval_samples": 3, "seed": 7, "gen_max_new_tokens": 8, "gen_batch_size": 2,
        "extraction_fields": ("name",), "output_markers": ("Output:",), "template_options": {},
        "json_schema": None}  # fmt: skip
    return SimpleNamespace(**plain | values)


def rows(count: int = 8, last: str = "assistant") -> datasets.Dataset:
    turns = [
        [{"role": "user", "content": f"ask {number}"}, {"role": last, "content": f'{{"n": {number}}}'}]
        for number in range(count)
    ]
    return datasets.Dataset.from_list(
        [{"messages": messages, "task_key": "text_to_json", "extras": None} for messages in turns]
    )


def test_questions_are_drawn_by_seed_and_end_before_the_answer():
    """Three of eight, in order, the same for the same seed; rows that end with the person's turn can't be asked."""
    found = questions(rows(), settings())
    assert len(found) == 3
    assert found == questions(rows(), settings())
    assert found != questions(rows(), settings(seed=8))
    numbers = [json.loads(row["reference"])["n"] for row in found]
    assert numbers == sorted(numbers)
    assert [row["prompt"][-1]["content"] for row in found] == [f"ask {number}" for number in numbers]
    assert questions(rows(last="user"), settings()) == []


def test_an_evaluation_leaves_metrics_and_answers(tmp_path, monkeypatch):
    """Files of the step, with the score and the faults of every answer; the same samples are handed on."""
    asked = questions(rows(), settings())
    given = [
        Answer(asked[0]["reference"]),
        Answer(f"```json\n{asked[1]['reference']}\n```"),
        Answer('{"n": ', cut=True),
    ]
    monkeypatch.setattr(generation_evaluation, "generate_answers", lambda *a, **k: given)
    evaluation, handed = GenerationEvaluation(settings(), tmp_path, tokenizer(), asked), []
    main = SimpleNamespace(is_main_process=True)
    metrics = evaluation.run(None, main, step=4, interrupted=lambda: None, record=handed.extend)
    assert (metrics["gen_score"], metrics["gen_only_rate"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert json.loads((tmp_path / "gen_metrics_step4.json").read_text()) == metrics | {"gen_global_step": 4}
    lines = [json.loads(line) for line in (tmp_path / "gen_samples_step4.jsonl").read_text().splitlines()]
    assert [line["faults"] for line in lines] == [[], ["fence"], ["cut off", "syntax"]]
    assert [line["score"] for line in handed] == [line["score"] for line in lines] == [1.0, 1.0, 0.0]
    other = GenerationEvaluation(settings(), tmp_path / "none", tokenizer(), asked)
    assert other.run(None, SimpleNamespace(is_main_process=False), step=4, interrupted=lambda: None) == metrics


def test_questions_of_an_earlier_stage_are_scored_as_that_stage_scored_them(tmp_path, monkeypatch):
    """Its manifest says how: kind, marker and length of answers, whatever the later stage has."""
    asked = questions(rows(), settings())
    write_questions(tmp_path, asked, "structured")
    kept = [json.loads(line) for line in (tmp_path / "gen_rows.jsonl").read_text().splitlines()]
    assert kept == [row | {"kind": "structured"} for row in asked]
    before = make_settings(
        tmp_path, gen_eval="structured", output_markers="Antwort:", gen_max_new_tokens=9, val_ratio=0.5
    )
    now = make_settings(tmp_path, 2, gen_eval="extraction", gen_max_new_tokens=512, val_ratio=0.5)
    evaluation = GenerationEvaluation(now, tmp_path, tokenizer(), asked).of_stage(
        Manifest().changed(settings=before.record())
    )
    limits = []

    def generated(*given, max_new_tokens, **others):
        limits.append(max_new_tokens)
        return [Answer(f"so it is\nAntwort:\n{row['reference']}") for row in kept]

    monkeypatch.setattr(generation_evaluation, "generate_answers", generated)
    _, metrics = evaluation.score(kept, evaluation.answer(None, kept))
    assert (metrics["gen_score"], metrics["gen_exact_rate"], limits) == (1.0, 1.0, [9])

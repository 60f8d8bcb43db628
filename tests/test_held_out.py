"""What a stage was validated on is known to the stages after it."""

import json
from pathlib import Path
from typing import Any

from sft.data.mixture import prepare_mix
from sft.data.sources.shapes import content_hash
from sft.data.split import EARLIER, GENERATION
from sft.evaluation.held_out import earlier_questions, write_held_out
from sft.settings import Settings
from tests.conftest import word_tokenizer


def chat(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]


def write(path: Path, answers: list[str]) -> str:
    path.write_text("".join(json.dumps({"messages": chat(answer)}) + "\n" for answer in answers), encoding="utf-8")
    return str(path)


def of_stage(number: int, folder: Path, **attributes: Any) -> Settings:
    return Settings(stage=number, env_dir=folder, base_model="a/b", out_lora_dir=folder / "out", **attributes)


def test_contents_of_all_stages_before_are_found(tmp_path: Path):
    """held_out.json of stage 1; gen_rows.jsonl of a stage 2 from before there was one, damaged lines left out."""
    write_held_out(tmp_path / "out_stage1", [5, 2**64 - 1])
    (tmp_path / "out_stage2").mkdir()
    question = {"task": "", "prompt": chat("")[:1], "reference": "One", "kind": "samples"}
    (tmp_path / "out_stage2" / "gen_rows.jsonl").write_text(f'{json.dumps(question)}\n{{"prompt": 1}}\n{{"pro')
    assert earlier_questions(of_stage(1, tmp_path)) == set()
    assert earlier_questions(of_stage(2, tmp_path)) == {5, 2**64 - 1}
    assert earlier_questions(of_stage(3, tmp_path)) == {5, 2**64 - 1, content_hash(chat("One"))}


def test_a_later_stage_never_trains_on_validation_rows_of_an_earlier_one(tmp_path: Path):
    """Whatever it takes of the same rows: another seed, ratio or part; the rows are counted and said."""
    answers = [f"a{number}" for number in range(60)]
    path = write(tmp_path / "rows.jsonl", answers)
    first = prepare_mix(of_stage(1, tmp_path, dataset_id=path, val_ratio=0.1), word_tokenizer())
    write_held_out(tmp_path / "out_stage1", first.held.tolist())
    asked = {turns[-1]["content"] for turns in first.val["messages"]}
    assert len(asked) == 6
    part = write(tmp_path / "part.jsonl", answers[:40])
    for options in ({"val_ratio": 0.0}, {"seed": 8}, {"val_ratio": 0.3}, {"dataset_id": part, "val_ratio": 0.0}):
        settings = of_stage(2, tmp_path, **({"dataset_id": path} | options), origins={"SFT_OVERLONG": "stage2.env"})
        second = prepare_mix(settings, word_tokenizer(), earlier=earlier_questions(settings))
        read = answers if settings.dataset_id == path else answers[:40]
        trained = {read[row] for row in second.train["row"]}
        validated = {turns[-1]["content"] for turns in second.val["messages"]}
        assert not trained & asked
        assert second.dropped[EARLIER] == len((asked & set(read)) - validated)
        assert trained | asked | validated >= set(read)


def test_rows_that_are_generated_for_are_not_trained_on(tmp_path: Path):
    """Four rows of SFT_GEN_EVAL_DATASET stand in the training file: left out, counted, kept for later stages."""
    path = write(tmp_path / "rows.jsonl", [f"a{number}" for number in range(50)])
    asked = write(tmp_path / "asked.jsonl", ["a3", "a4", "a5", "a6", "other"])
    sources = [{"id": asked}]
    settings = of_stage(1, tmp_path, dataset_id=path, val_ratio=0.0, gen_eval="samples", gen_eval_dataset=sources)
    mix = prepare_mix(settings, word_tokenizer())
    assert (len(mix.train), mix.dropped) == (46, {GENERATION: 4})
    assert set(mix.held.tolist()) == {content_hash(chat(answer)) for answer in ("a3", "a4", "a5", "a6", "other")}

"""--check: the document, the same steps as the trainer, every problem listed, nothing written."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Trainer, TrainingArguments

from sft.planning.document import Document, Steps
from sft.planning.plan import steps
from sft.planning.step_time import Forecast, StepTime, forecast
from sft.settings import load_settings
from sft.training.batches import EpochBatches, Order
from tests import tiny

KEYS = [
    "stage", "settings", "sources", "train_rows", "val_rows", "dropped", "upsampling", "replay", "tokens",
    "masked_loss", "steps", "memory", "time", "unread", "isolation", "lineage", "problems",
]  # fmt: skip
MEMORY = [
    "weights", "adapter", "optimizer", "gradients", "activations", "generation", "total", "available", "activations_by",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def ladder(tmp_path, model):
    def write(count=40, stages=(1,), **values):
        rows = tiny.write_rows(tmp_path / "rows.jsonl", count)
        base = {"SFT_BASE_MODEL": model, "SFT_OUT_LORA_DIR": tmp_path / "out" / "lora", "SFT_DATASET_ID": rows}
        for number in stages:
            tiny.write_stage(tmp_path, number, base | values)
        return tmp_path

    return write


def run_check(folder, capsys, *arguments):
    """Exit code, the JSON document, stderr."""
    capsys.readouterr()
    code = tiny.run_train("--check", "--json", "--env-dir", folder, *(arguments or ("--stage", 1)))
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_the_document_has_the_keys_of_the_contract_and_nothing_is_written(ladder, capsys):
    """40 rows, 10 % set apart, 4 x 2 rows a step: 36 rows, 5 steps; stdout is one JSON document."""
    folder = ladder()
    before = sorted(folder.rglob("*"))
    code, document, errors = run_check(folder, capsys)
    assert (code, errors) == (0, "")
    assert list(document) == KEYS
    assert sorted(folder.rglob("*")) == before
    assert (document["train_rows"], document["val_rows"]) == (36, 4)
    source = {"split": "train", "weight": 1.0, "rows": 40, "validation_rows": 4, "drawn": 36}
    assert document["sources"] == [{"id": str(folder / "rows.jsonl")} | source]
    assert document["steps"] == {"global_batch": 8, "per_epoch": 5, "total": 5}
    assert list(document["memory"]) == MEMORY
    assert document["memory"]["total"] == sum(document["memory"][name] for name in MEMORY[:5])
    assert document["memory"]["generation"] == 0
    assert document["memory"]["activations_by"] == "a step of shapes"
    assert document["lineage"] == {"decision": "fresh", "parents": [], "changed": []}
    assert document["settings"]["SFT_LORA_R"] == {"value": 4, "origin": "stage1.env"}
    assert document["settings"]["SFT_SEED"] == {"value": 3407, "origin": "default"}
    assert (document["masked_loss"], document["problems"]) == (None, [])


def test_a_bfloat16_tiny_model_needs_what_its_parameters_need(ladder, capsys):
    """Adapter, gradients and Adam's two states are all float32: 1 : 1 : 2."""
    document = run_check(ladder(SFT_DTYPE="bfloat16"), capsys)[1]
    adapter = document["memory"]["adapter"]
    assert (document["memory"]["gradients"], document["memory"]["optimizer"]) == (adapter, 2 * adapter)


def test_the_time_is_that_of_the_steps_at_the_measured_speed():
    """Half a second for 100 tokens: 5 steps of 200 tokens take 5 s; nothing is claimed where nothing was measured."""
    steps = Steps(global_batch=8, per_epoch=10, total=5)
    found = forecast(StepTime(seconds=0.5, tokens=100, rows=4, device="a device"), tokens=2000, steps=steps)
    assert (found.seconds, found.step_seconds, found.tokens_per_second) == (5.0, 1.0, 200.0)
    assert found.measured_on == "a device, forward and backward of the largest micro-batch (4 rows, 100 tokens)"
    assert forecast(StepTime(reason="no"), tokens=1, steps=steps) == Forecast(reason="no")
    assert forecast(StepTime(fits=False, device="it"), tokens=1, steps=steps).reason == "out of memory on it"


def test_a_small_model_is_tried_and_its_time_told(ladder, capsys):
    """A step of 30,000 weights takes no time on a CPU; the document has seconds, people see the speed."""
    folder = ladder()
    assert 0.0 < run_check(folder, capsys)[1]["time"] < 300.0
    assert tiny.run_train("--check", "--stage", 1, "--env-dir", folder) == 0
    said = r"measured on this CPU with \d+ threads?, forward and backward of the largest micro-batch \(4 rows, \d+ tok"
    assert re.search(said, capsys.readouterr().out)


def test_a_model_too_large_for_this_cpu_has_no_time_and_says_why(ladder, capsys, monkeypatch):
    """Null in the document, one sentence on the screen, no minute of waiting."""
    monkeypatch.setattr("sft.planning.step_time._CPU_LIMIT", 1e3)
    folder = ladder()
    assert run_check(folder, capsys)[1]["time"] is None
    assert tiny.run_train("--check", "--stage", 1, "--env-dir", folder) == 0
    said = r"no estimate of the time: \d+ tokens through 0 million weights take too long on this CPU to be tried"
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize("error", [OverflowError("range"), ZeroDivisionError("a\nb"), KeyError("x")])
def test_a_document_comes_whatever_a_library_raises(ladder, capsys, monkeypatch, error):
    """Exit code 2 and the error's first line as a problem: never 1 with nothing on stdout."""

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr("sft.data.mixture.prepare_mix", fail)
    code, document, errors = run_check(ladder(), capsys)
    assert (code, list(document)) == (2, KEYS)
    assert document["problems"] == [f"The check failed: {type(error).__name__}: {str(error).splitlines()[0]}"]
    assert document["lineage"]["decision"] == "fresh"
    assert "Traceback" not in errors


def test_the_cache_of_the_generation_evaluation_is_a_line_of_its_own(ladder, capsys):
    """Two layers, one key-value head of 16 numbers, 4 answers: 2 x 4 x tokens x 16 x 2 x 4 bytes."""
    folder = ladder(SFT_GEN_EVAL="structured", SFT_GEN_BATCH_SIZE=4, SFT_GEN_MAX_NEW_TOKENS=30_000)
    document = run_check(folder, capsys)[1]
    memory = document["memory"]
    tokens, rest = divmod(memory["generation"], 2 * 4 * 16 * 2 * 4)
    assert rest == 0
    assert 30_000 < tokens < 30_000 + document["tokens"]["longest_row"]
    larger = max(memory["generation"], memory["activations"])
    assert memory["total"] == sum(memory[name] for name in MEMORY[:4]) + larger
    assert tiny.run_train("--check", "--stage", 1, "--env-dir", folder) == 0
    assert f"keys and values of 4 answers, {tokens:,} tokens with their prompts" in capsys.readouterr().out


def test_answers_that_are_not_in_their_own_format_are_named_before_they_are_trained_on(ladder, tmp_path, capsys):
    """Fences and broken payloads of the training rows stand among the notes."""
    answers = ['{"a": 1}'] * 6 + ['```json\n{"a": 2}\n```'] * 3 + ['{"a": 3,}']
    rows = [
        {"prompt": f"Give JSON {n}", "completion": answer, "subcategory": "text_to_json"}
        for n, answer in enumerate(answers)
    ]
    (tmp_path / "faulty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = ladder(SFT_DATASET_ID=tmp_path / "faulty.jsonl")
    assert tiny.run_train("--check", "--stage", 1, "--env-dir", folder) == 0
    assert (
        "Of 10 answers in a named format 1 don't parse as their own format, 3 have a fence" in capsys.readouterr().out
    )


def test_a_later_stage_of_a_ladder_does_not_miss_the_stages_before_it(ladder, capsys):
    """Several stages give a list; alone, stage 2 in strict mode has a problem."""
    folder = ladder(stages=(1, 2))
    code, documents, _ = run_check(folder, capsys, "--stage", "all", "--strict")
    assert (code, [document["stage"] for document in documents]) == (0, [1, 2])
    assert [document["lineage"]["decision"] for document in documents] == ["fresh", "fresh"]
    code, document, errors = run_check(folder, capsys, "--stage", 2, "--strict")
    assert (code, document["lineage"]["decision"]) == (2, "refuse")
    assert "Previous stage adapter not found at" in document["problems"][0]
    assert "Previous stage adapter not found at" in errors


def test_broken_settings_come_as_a_document_too(ladder, capsys):
    """All keys, every problem, exit 2; a stage that is no number has null for its stage."""
    folder = ladder()
    code, document, errors = run_check(folder, capsys, "--stage", 1, "--set", "SFT_LORA_RANK=4", "--set", "SFT_LR=fast")
    assert (code, list(document), document["stage"]) == (2, KEYS, 1)
    assert [problem.split(":")[0] for problem in document["problems"]] == ["SFT_LORA_RANK=4", "SFT_LR=fast"]
    assert "did you mean SFT_LORA_R?" in errors
    code, document, _ = run_check(folder, capsys, "--stage", "first")
    assert (code, document["stage"], len(document["problems"])) == (2, None, 1)


def test_a_model_that_is_not_there_is_one_problem_and_the_rest_is_told(ladder, capsys):
    """An unreachable base model: lineage, settings and the rows of the source are known all the same."""
    code, document, _ = run_check(ladder(SFT_BASE_MODEL="nobody/nothing"), capsys)
    assert (code, len(document["problems"])) == (2, 1)
    said = r"SFT_BASE_MODEL=nobody/nothing: the configuration could not be loaded"
    assert re.match(said, document["problems"][0])
    assert [source["rows"] for source in document["sources"]] == [40]
    assert document["lineage"]["decision"] == "fresh"
    assert document["memory"] == dict.fromkeys(MEMORY)
    assert document["time"] is None


def test_problems_of_data_are_listed(ladder, capsys):
    """Every row over-long: a problem, with the rows counted; a missing file: another."""
    code, document, _ = run_check(ladder(SFT_MAX_SEQ_LEN=8), capsys)
    assert code == 2
    assert "40 over-long" in document["problems"][0]
    code, document, _ = run_check(ladder(SFT_DATASET_ID="nowhere.jsonl"), capsys)
    assert code == 2
    assert document["problems"] == ["[ERROR] Failed to load nowhere.jsonl: there is no file nowhere.jsonl"]


def test_people_get_tables_and_rows_as_rendered(ladder, capsys):
    """Origins of settings, the decision, steps, memory, and a row with its trained tokens marked."""
    assert tiny.run_train("--check", "--stage", 1, "--env-dir", ladder(), "--set", "SFT_LR=0.5") == 0
    page = capsys.readouterr().out
    assert page.startswith("Stage 1: fresh\n")
    assert "SFT_LR                   0.5" in page
    assert "--set\n" in page
    assert "5 steps, 5 an epoch, 8 rows a step (4 x 2 accumulated x 1 devices)" in page
    assert page.count("as rendered (trained tokens between") == 3
    assert '<|im_start|>assistant\n  「{"name"' in page
    assert "activations" in page


def test_people_see_the_edges_of_a_masked_loss(tmp_path, model, capsys):
    """Ten rows A -> B and one B -> C: 11 units of 2 kinds, 5.5 of each on average, (10 - 5.5) / 11 masked."""
    rows = [{"prompt": f"paths {number}", "completion": "A -> B"} for number in range(10)]
    rows.append({"prompt": "another", "completion": "B -> C"})
    path = tmp_path / "paths.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"SFT_BASE_MODEL": model, "SFT_OUT_LORA_DIR": tmp_path / "out", "SFT_DATASET_ID": path}
    tiny.write_stage(tmp_path, 1, values | {"SFT_MASKED_LOSS": "inverse_frequency", "SFT_VAL_RATIO": 0})
    code, document, _ = run_check(tmp_path, capsys)
    assert code == 0
    found = document["masked_loss"]
    assert (found["units"], found["distinct_units"], found["mean_count"]) == (11, 2, 5.5)
    assert found["masked_share"] == pytest.approx(4.5 / 11)
    assert tiny.run_train("--check", "--stage", 1, "--env-dir", tmp_path) == 0
    assert "A -> B" in capsys.readouterr().out


def settings_for(folder: Path, **values):
    lines = {"SFT_BASE_MODEL": "org/model", "SFT_OUT_LORA_DIR": folder / "out", "SFT_DATASET_ID": "rows"} | values
    (folder / "stage1.env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    return load_settings(1, env_dir=folder, environ={})


@pytest.mark.parametrize("items", [1, 7, 36, 100, 1001])
@pytest.mark.parametrize(
    ("size", "accumulation", "epochs", "max_steps"), [(1, 1, 1, -1), (4, 8, 1.5, -1), (3, 5, 0.3, -1), (2, 2, 1, 77)]
)
@pytest.mark.parametrize("processes", [1, 4])
def test_steps_are_those_of_the_trainer(tmp_path, items, size, accumulation, epochs, max_steps, processes):
    """transformers' own arithmetic for a loader of as many batches as ours has."""
    settings = settings_for(
        tmp_path, SFT_PER_DEVICE_TRAIN_BS=size, SFT_GRAD_ACCUM=accumulation, SFT_EPOCHS=epochs, SFT_MAX_STEPS=max_steps
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs, max_steps=max_steps, use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = SimpleNamespace(
        get_total_train_batch_size=lambda _: size * accumulation * processes,
        get_sp_size=lambda: 1,
        num_examples=lambda _: items,
    )
    loader = EpochBatches(Order(items, seed=0), batch_size=size, ranks=processes)
    expected = Trainer.set_initial_training_values(trainer, arguments, loader)
    found = steps(items, settings, processes=processes)
    assert (found.per_epoch, found.global_batch, found.total) == (expected[1], expected[4], expected[6])


def test_a_blank_document_has_all_keys():
    """In the contract's order, with the problems in it."""
    blank = Document(3, problems=["wrong"]).record()
    assert list(blank) == KEYS
    assert blank["problems"] == ["wrong"]

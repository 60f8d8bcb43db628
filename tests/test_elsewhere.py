"""--on: a machine that is not there. Launch file, memory and time by the configuration and stated rates."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from transformers import LlamaConfig

from sft.errors import Problems
from sft.planning import elsewhere
from sft.planning.document import Steps
from sft.planning.elsewhere import CARDS, Machine, flops_of_token, machine_of, plan_on, ways
from tests.tiny import run_train, write_model, write_rows, write_stage

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip


def mix_of(length: int, rows: int = 64) -> Any:
    """So many rows of one length, half of each trained."""
    labels = [-100] * (length // 2) + [1] * (length - length // 2)
    train = datasets.Dataset.from_dict({"length": [length] * rows, "labels": [labels] * rows, "source": [0] * rows})
    return SimpleNamespace(train=train, val=train.select(range(0)), tokens={"total": length * rows})


STEPS = Steps(global_batch=16, per_epoch=4, total=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4x80", (4, 80)), (" 1 x 24GB ", (1, 24)), ("64×141", (64, 141)), ("2X16.5", (2, 16.5))],
)
def test_a_machine_is_devices_times_gigabytes(text: str, expected: tuple[float, float]):
    """With or without spaces and unit."""
    assert machine_of(text) == expected


@pytest.mark.parametrize("text", ["", "80", "4by80", "0x80", "4x0", "4x80TB", "-1x80", "4x", "5000x80", "4x1e9"])
def test_anything_else_is_a_problem_that_says_how_to_write_it(text: str):
    """Name, value and remedy."""
    with pytest.raises(Problems) as found:
        machine_of(text)
    assert found.value.problems == [f"--on {text}: not a machine; write devices x GB of each, such as --on 4x80"]


def test_a_device_is_taken_for_the_card_that_has_no_more_memory():
    """The table is in order; between two cards the smaller one counts, and less than the smallest is the smallest."""
    assert [card.gigabytes for card in CARDS] == sorted({16, 24, 40, 48, 80, 94, 141, 192})
    names = [Machine(1, size).card.name for size in (8, 16, 32, 80, 96, 192, 288)]
    assert names == ["T4", "T4", "L4", "A100", "H100 NVL", "B200", "B200"]


def test_quantised_weights_are_not_split_and_more_than_one_machine_has_a_file_of_its_own(make_settings: Any):
    """As the launch checks have it; every file named exists."""
    names = [name for name, _ in ways(Machine(4, 80), make_settings())]
    assert names == ["ddp", "zero2", "zero3", "fsdp"]
    assert [name for name, _ in ways(Machine(4, 80), make_settings(load_in_4bit=True))] == ["ddp", "zero2"]
    assert [name for name, _ in ways(Machine(16, 80), make_settings())][2] == "multinode_zero3"
    assert [launch[1:3] for _, launch in ways(Machine(64, 141), make_settings())] == [(64, 8)] * 4
    assert [name for name, _ in ways(Machine(1, 80), make_settings())] == ["single"]
    files = Path(__file__).parents[1] / "configs" / "accelerate"
    assert all((files / f"{name}.yaml").is_file() for name in (*names, "single", "multinode_zero3"))


@pytest.mark.slow
def test_an_8b_model_goes_on_one_card_of_24_gb_and_is_split_over_four_of_16(make_settings: Any):
    """15 GiB of bfloat16 weights: beside them 24 GB hold a pass, 16 GB none; ZeRO-3 leaves a quarter on each. The time
    is tokens by rate: 6 operations a weight and token with checkpointing, at 36 TFLOP/s."""
    settings = make_settings(per_device_train_bs=2, grad_accum=8)
    one = plan_on(LLAMA_8B, settings, mix_of(512), machine=Machine(1, 24), steps=STEPS)
    assert (one.way.launch_file, one.way.fits, one.way.need.checkpointing) == ("single", True, True)
    assert 2 * 512 <= one.way.need.tokens < 16 * 512
    weights = 7.5e9  # without input embeddings
    assert one.tokens_per_second == pytest.approx(0.3 * 121e12 / (6 * weights), rel=0.05)
    assert one.seconds == pytest.approx(64 * 512 / one.tokens_per_second)
    four = plan_on(LLAMA_8B, settings, mix_of(512), machine=Machine(4, 16), steps=STEPS)
    assert [(way.launch_file, way.fits) for way in four.tried] == [("ddp", False), ("zero2", False), ("zero3", True)]
    assert four.command.endswith("zero3.yaml --num_processes 4 train.py --stage 1")
    small = plan_on(LLAMA_8B, settings, mix_of(512), machine=Machine(1, 16), steps=STEPS)
    assert not small.way.fits
    assert small.remedies == ["SFT_LOAD_IN_8BIT=1", "2 x 16 GB under ZeRO-3"]


def test_operations_of_a_token_by_hand(make_settings: Any):
    """Two layers: 4 per weight, 6 per weight of the adapter, attention; checkpointing adds 2 of each and a third."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) + 512 * 64
    adapter = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))
    attention = 2 * 2 * 64 * 100
    settings = make_settings(dtype="bfloat16")
    plain = flops_of_token(config, settings, length=100, checkpointing=False)
    assert plain == 4 * weights + 6 * adapter + 3 * attention
    twice = flops_of_token(config, settings, length=100, checkpointing=True)
    assert twice - plain == pytest.approx(2 * (weights + adapter) + attention)


def document_in(shown: str) -> Any:
    """This file imports accelerate before the program can quieten DeepSpeed, whose greeting may stand before it."""
    return json.loads(shown[shown.index("{\n") :])


def test_the_document_and_the_screen_plan_for_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Four devices: four times the rows a step; memory and time are those of the named machine; mistakes are exit 2."""
    common = {
        "SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_OUT_LORA_DIR": tmp_path / "out",
        "SFT_DATASET_ID": write_rows(tmp_path / "rows.jsonl", 40),
    }  # fmt: skip
    write_stage(tmp_path, 1, common)
    ask = ("--stage", 1, "--env-dir", tmp_path, "--on")
    assert run_train("--check", "--json", *ask, "4x80") == 0
    document = document_in(capsys.readouterr().out)
    assert document["steps"]["global_batch"] == 32
    on = document["on"]
    assert (on["devices"], on["gigabytes"], on["fits"]) == (4, 80, True)
    assert on["launch_file"] == "configs/accelerate/ddp.yaml"
    assert "--num_machines" not in on["command"]
    assert run_train("--check", "--json", *ask, "12x141") == 0
    several = document_in(capsys.readouterr().out)["on"]
    machines = (
        "--num_processes 12 --num_machines 2 --machine_rank RANK --main_process_ip HOST --main_process_port 29500"
    )
    assert f"ddp.yaml {machines} train.py" in several["command"]
    assert "nor is the network between machines of 8" in several["assumptions"][-1]
    assert document["memory"]["available"] == 80 * 10**9 - 2**29
    assert document["time"] > 0
    assert not (tmp_path / "out_stage1").exists()
    assert run_train("--check", *ask, "1x16") == 0
    shown = capsys.readouterr().out
    assert "On 1 x 16 GB" in shown
    assert "assumed: a device of 16 GB is taken for a T4 (or as fast) with 20 TFLOP/s" in shown
    for arguments, text in (
        (("--check", *ask, "4-80"), "--on 4-80: not a machine; write devices x GB of each, such as --on 4x80"),
        ((*ask, "4x80"), "--on 4x80: plans for another machine; write --check --on 4x80"),
    ):
        assert run_train(*arguments) == 2
        assert text in capsys.readouterr().err
    assert run_train("--check", "--json", *ask, "?") == 2
    assert document_in(capsys.readouterr().out)["problems"] == [
        "--on ?: not a machine; write devices x GB of each, such as --on 4x80"
    ]


def test_nothing_of_this_machine_decides(monkeypatch: pytest.MonkeyPatch, make_settings: Any):
    """`auto` is the card's number format, not that of the CPU the question is asked on."""
    assert elsewhere.there(make_settings(), Machine(1, 80)).dtype == "bfloat16"
    assert elsewhere.there(make_settings(), Machine(1, 16)).dtype == "float16"
    assert elsewhere.there(make_settings(use_lora=False), Machine(1, 16)).dtype == "float32"
    assert elsewhere.there(make_settings(dtype="float32"), Machine(1, 80)).dtype == "float32"


@pytest.mark.parametrize(("file", "standard"), [("ddp", False), ("zero2", True), ("multinode_zero3", False)])
def test_deepspeed_starts_on_several_machines_without_pdsh(file: str, standard: bool):
    """accelerate takes pdsh and a host file where neither the launch file nor the command says otherwise."""
    way: Any = SimpleNamespace(launch_file=file, fits=True)
    plan = elsewhere.Elsewhere(Machine(64, 141), 1, [way], 1.0, 1.0, [])
    assert ("--deepspeed_multinode_launcher standard" in plan.command) is standard
    assert "--num_processes 64 --num_machines 8 --machine_rank RANK --main_process_ip HOST" in plan.command
    text = (Path(__file__).parents[1] / "configs" / "accelerate" / f"{file}.yaml").read_text()
    assert standard or "DEEPSPEED" not in text or "deepspeed_multinode_launcher: standard" in text

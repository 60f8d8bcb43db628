"""What a launch file must not say, what its engine refuses, and which checkpoints it can go on from."""

import json
import os
import time
from pathlib import Path

import pytest

from sft import cli
from sft.environment import offline_unless_reachable
from sft.stages.checkpoints import saved_under
from sft.stages.decision import Verdict
from sft.stages.launch_checks import launch_problems, resume_problems
from sft.stages.stage import Stage
from tests.ladders import make_settings

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "RANK": "0", "WORLD_SIZE": "2"}


def deepspeed_file(folder: Path, **values: object) -> dict[str, str]:
    """The environment of a rank under DeepSpeed with this file."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto"} | values))
    return DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def test_no_launcher_no_problem(tmp_path: Path):
    """`python train.py`, torchrun and the shipped files, which leave precision out."""
    settings = make_settings(tmp_path)
    assert launch_problems(settings, {}) == []
    assert launch_problems(settings, {"ACCELERATE_MIXED_PRECISION": "no"}) == []


@pytest.mark.parametrize("engine", ["zero2", "zero2_offload", "zero3"])
def test_the_shipped_deepspeed_files_contradict_nothing(tmp_path: Path, engine: str):
    """Whatever the stage file says about batch, rate, clipping and precision."""
    path = Path(__file__).resolve().parents[1] / "configs" / "deepspeed" / f"{engine}.json"
    settings = make_settings(tmp_path, lr="3e-4", grad_accum=7, max_grad_norm=0.3, dtype="bfloat16", weight_decay=0.1)
    assert launch_problems(settings, DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}) == []


@pytest.mark.parametrize(
    ("dtype", "said", "agree"),
    [("auto", "bf16", True), ("bfloat16", "bf16", True), ("float16", "fp16", True), ("auto", "fp16", False),
     ("float32", "bf16", False), ("bfloat16", "fp8", False)],
)  # fmt: skip
def test_precision_of_the_launch_file(tmp_path: Path, dtype: str, said: str, agree: bool):
    """`--mixed_precision` may repeat SFT_DTYPE, not contradict it."""
    problems = launch_problems(make_settings(tmp_path, dtype=dtype), {"ACCELERATE_MIXED_PRECISION": said})
    assert [text.split(":")[0] for text in problems] == ([] if agree else [f"SFT_DTYPE={dtype}"])


def test_every_contradicting_number_is_listed(tmp_path: Path):
    """Accumulation, micro-batch, clipping, rate and the product for two processes; equal ones are no problem."""
    settings = make_settings(tmp_path, per_device_train_bs=4, grad_accum=8, lr="1e-4")
    environ = deepspeed_file(
        tmp_path, gradient_accumulation_steps=4, train_micro_batch_size_per_gpu=2, train_batch_size=64,
        gradient_clipping=0.5, optimizer={"params": {"lr": 2e-4}}, bf16={"enabled": True},
        scheduler={"type": "WarmupLR"},
    )  # fmt: skip
    assert [text.split(":")[0] for text in launch_problems(settings, environ)] == [
        "SFT_GRAD_ACCUM=8",
        "SFT_PER_DEVICE_TRAIN_BS=4",
        "SFT_MAX_GRAD_NORM=1.0",
        "SFT_LR=0.0001",
        "SFT_LR_SCHEDULER=cosine",
    ]


def test_an_accumulation_left_out_of_the_file_counts_as_one(tmp_path: Path):
    """accelerate fills in 1 and DeepSpeed would step 8 times as often as the stage file says."""
    path = tmp_path / "bare.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    settings = make_settings(tmp_path, grad_accum=8)
    (problem,) = launch_problems(settings, DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    assert problem.startswith("SFT_GRAD_ACCUM=8: the DeepSpeed file says gradient_accumulation_steps: 1;")


def test_accumulation_of_accelerates_own_file(tmp_path: Path):
    """A launch file without a DeepSpeed file passes its number through the environment."""
    environ = DEEPSPEED | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "auto"}
    (problem,) = launch_problems(make_settings(tmp_path, grad_accum=8), environ)
    assert problem.startswith("SFT_GRAD_ACCUM=8")
    assert launch_problems(make_settings(tmp_path, grad_accum=4), environ) == []


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_cannot_be_split(tmp_path: Path, bits: int):
    """ZeRO-3 and FSDP refuse them at load time at the earliest; ZeRO-2 and plain data parallel take them."""
    settings = make_settings(tmp_path, **{f"load_in_{bits}bit": 1})
    zero3 = deepspeed_file(tmp_path, zero_optimization={"stage": 3})
    for environ, engine in ((zero3, "DeepSpeed ZeRO-3"), ({"ACCELERATE_USE_FSDP": "true"}, "FSDP")):
        (problem,) = launch_problems(settings, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"} | environ)
        assert problem.startswith(f"SFT_LOAD_IN_{bits}BIT=1: {engine} cannot split quantised weights")
    assert launch_problems(settings, deepspeed_file(tmp_path)) == []


def checkpoint(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_checkpoints_tell_who_can_go_on_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Split optimizer state fits the same engine and number of processes; whole state fits any number."""
    parts = ["latest", *(f"global_step4/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))]
    split = checkpoint(tmp_path / "checkpoint-4", *parts)
    plain = checkpoint(tmp_path / "checkpoint-8", "optimizer.pt")
    assert saved_under(split) == "DeepSpeed ZeRO-2 with 2 processes"
    assert saved_under(checkpoint(tmp_path / "checkpoint-6", "pytorch_model_fsdp.bin")) == "FSDP"
    assert saved_under(plain) == ""
    stage = Stage(make_settings(tmp_path), verdict=Verdict("resume"))

    def problems_from(checkpoint: Path) -> list[str]:
        stage.verdict.checkpoint = checkpoint
        return resume_problems(stage)

    assert resume_problems(stage) == problems_from(plain) == []
    (problem,) = problems_from(split)
    assert problem.endswith(
        f"or python train.py --stage 1 --env-dir {tmp_path} --fresh moves it aside and trains again"
    )
    assert "saved under DeepSpeed ZeRO-2 with 2 processes, this run is one process or plain data parallel" in problem
    for name, value in deepspeed_file(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert problems_from(split) == []
    assert len(problems_from(plain)) == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "this run is DeepSpeed ZeRO-2 with 4 processes" in problems_from(split)[0]


def test_a_launch_file_that_needs_deepspeed_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An extra that is missing is one line with the command."""
    monkeypatch.setattr("sft.stages.launch_checks.find_spec", lambda name: None)
    (problem,) = launch_problems(make_settings(tmp_path), deepspeed_file(tmp_path))
    assert "make install-deepspeed" in problem
    assert launch_problems(make_settings(tmp_path), {}) == []


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=0"])
def test_the_flag_of_the_deepspeed_launcher_is_taken(flag: str):
    """It is handed to every rank; what rank a process has stands in the environment."""
    assert cli.parser().parse_args(["--stage", "1", flag]).stage == "1"


def test_a_name_server_without_an_answer_does_not_hold_up_a_run(monkeypatch: pytest.MonkeyPatch):
    """No address, or no word for longer than the limit: the hub's client is told to use its cache alone."""
    monkeypatch.setattr("sft.environment.getproxies", dict)
    monkeypatch.setattr("sft.environment._NAME_SECONDS", 0.05)
    for answer in (lambda *name: (_ for _ in ()).throw(OSError("no")), lambda *name: time.sleep(1.0)):
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr("sft.environment.socket.getaddrinfo", answer)
        start = time.monotonic()
        assert offline_unless_reachable()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert time.monotonic() - start < 0.5
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("sft.environment.socket.getaddrinfo", lambda *name: ["an address"])
    assert not offline_unless_reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

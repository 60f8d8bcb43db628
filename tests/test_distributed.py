"""Two processes on the CPU do what one does: data parallel, ZeRO-2, ZeRO-3, FSDP2; stopped, killed, misled, resumed."""

import ast
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.storage import seals
from tests.launching import processes, run, start, until
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

STEPS = 6
# Largest difference to one process with the same global batch; sums run in another order, in float32.
LOSS, WEIGHT = 1e-5, 1e-5


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Env files of two stages; weights six times as large as usual make the tiny model's answers differ."""
    folder = tmp_path_factory.mktemp("distributed")
    weights = write_model(folder / "base") / "model.safetensors"
    scaled = {name: tensor * (6 if tensor.ndim == 2 else 1) for name, tensor in load_file(weights).items()}
    save_file({name: tensor.contiguous() for name, tensor in scaled.items()}, weights, metadata={"format": "pt"})
    json_rows, yaml_rows = write_rows(folder / "json.jsonl", 39), write_rows(folder / "yaml.jsonl", 24, target="yaml")
    mix = [{"id": str(json_rows), "weight": 1.0}, {"id": str(yaml_rows), "weight": 2.0}]
    common = {
        "SFT_BASE_MODEL": folder / "base", "SFT_MAX_STEPS": STEPS, "SFT_LR": "1e-3", "SFT_VAL_RATIO": 0.15,
        "SFT_EVAL_STEPS": 2, "SFT_PER_DEVICE_EVAL_BS": 3, "SFT_GEN_EVAL": "structured", "SFT_GEN_EVAL_SAMPLES": 5,
        "SFT_GEN_MAX_NEW_TOKENS": 8, "SFT_GEN_BATCH_SIZE": 2,
    }  # fmt: skip
    write_stage(folder, 1, common | {"SFT_DATASET_ID": json_rows})
    write_stage(folder, 2, common | {"SFT_DATASET_MIX": json.dumps(mix)})
    return folder


def options(ladder: Path, name: str, *settings: str) -> list[object]:
    """Arguments of train.py for an output of its own. Two processes see 4 rows each, one saw 4 rows twice."""
    out = f"SFT_OUT_LORA_DIR={ladder / name}"
    return ["--env-dir", ladder, *(part for text in (out, *settings) for part in ("--set", text))]


@pytest.fixture(scope="module")
def alone(ladder: Path) -> Path:
    """Both stages by one process."""
    assert run_train("--stage", "1-2", *options(ladder, "alone")) == 0
    return ladder / "alone"


def trained_together(ladder: Path, kind: str, *, script: Path | None = None) -> tuple[Path, str]:
    """Both stages by two processes, with what they printed."""
    out = ladder / kind
    extra = {} if script is None else {"script": script}
    code, shown = run(kind, out, "--stage", "1-2", *options(ladder, kind, "SFT_GRAD_ACCUM=1"), **extra)
    assert code == 0, shown
    return out, shown


def assert_same(alone: Path, together: Path, *, loss: float = LOSS, weight: float = WEIGHT) -> None:
    """Loss series, evaluations, answers, files and weights of both stages."""
    for number in (1, 2):
        one, two = Path(f"{alone}_stage{number}"), Path(f"{together}_stage{number}")
        for metric in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "gen_score"):
            expected = metric_lines(one, metric)
            assert len(expected) == (4 if metric in ("eval_loss", "gen_score") else STEPS)
            assert metric_lines(two, metric) == pytest.approx(expected, abs=loss), metric
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        for samples in one.glob("gen_samples_step*.jsonl"):
            assert samples.read_text() == (two / samples.name).read_text()
        for name in ("adapter_model.safetensors", "best_model/adapter_model.safetensors"):
            expected, found = load_file(one / name), load_file(two / name)
            assert {key: tensor.shape for key, tensor in expected.items()} == {k: t.shape for k, t in found.items()}
            assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < weight
        assert json.loads((two / "stage.json").read_text())["status"] == "complete"
        assert not seals.damage(two / f"checkpoint-{STEPS}")


def assert_said_once(shown: str) -> None:
    """One voice: what a stage says stands there once per stage."""
    for line in (
        "Checking checkpoint status...",
        "Training 4,096 of 33,248 parameters",
        "Answering 5 questions before training",
    ):
        assert shown.count(line) == 2, line
    assert shown.count("Merged 1 adapter in") == shown.count("Merged base verified") == shown.count("_report.html") == 1


def matrix(out: Path) -> dict:
    return json.loads(Path(f"{out}_stage2", "stage.json").read_text())["forgetting"]


@pytest.mark.slow
def test_data_parallel_equals_one_process(ladder: Path, alone: Path):
    """accelerate with ddp.yaml: the same losses, answers, files and forgetting matrix, everything said once."""
    together, shown = trained_together(ladder, "ddp")
    assert_same(alone, together)
    assert_said_once(shown)
    assert matrix(together) == matrix(alone)


@pytest.mark.slow
def test_ranks_may_make_different_numbers_of_passes(tmp_path: Path):
    """Four packs of six rows and one of a single row, which a hybrid model takes one by one: nobody waits for
    the other's pass, and the losses are those of one process."""
    from tests import pairs

    pairs.write_model(tmp_path / "base", "hybrid")
    rows = [{"prompt": f"red {number}", "completion": "blue"} for number in range(25)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_stage(tmp_path, 1, {
        "SFT_BASE_MODEL": tmp_path / "base", "SFT_DATASET_ID": tmp_path / "rows.jsonl", "SFT_VAL_RATIO": 0,
        "SFT_PACKING": 1, "SFT_MAX_SEQ_LEN": 120, "SFT_MAX_STEPS": 3, "SFT_LORA_TARGET_MODULES": "all-linear",
        "SFT_PER_DEVICE_TRAIN_BS": 1, "SFT_LR": "1e-3",
    })  # fmt: skip
    assert run_train("--stage", 1, *options(tmp_path, "alone", "SFT_GRAD_ACCUM=4")) == 0
    code, shown = run("torchrun", tmp_path / "two", "--stage", 1, *options(tmp_path, "two", "SFT_GRAD_ACCUM=2"))
    assert code == 0, shown
    assert "Rows go one by one" in shown
    one, two = (metric_lines(tmp_path / f"{name}_stage1", "loss") for name in ("alone", "two"))
    assert two == pytest.approx(one, abs=LOSS)


@pytest.mark.slow
def test_zero2_equals_one_process(ladder: Path, alone: Path):
    """DeepSpeed with the shipped file: optimizer state is split in two, results are the same."""
    together, shown = trained_together(ladder, "zero2")
    assert_same(alone, together)
    assert_said_once(shown)
    assert matrix(together) == matrix(alone)
    parts = sorted(path.name for path in Path(f"{together}_stage1").rglob(f"checkpoint-{STEPS}/*/*optim_states.pt"))
    assert parts == [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]


@pytest.mark.slow
def test_zero3_equals_one_process(ladder: Path, alone: Path):
    """DeepSpeed with split weights: adapters are saved whole; the base is not scored again, it might not fit."""
    together, shown = trained_together(ladder, "zero3")
    assert_same(alone, together)
    assert_said_once(shown)
    assert [row[1] is None for row in matrix(together)["scores"]] == [True, False, False]
    parts = list(Path(f"{together}_stage1").rglob(f"checkpoint-{STEPS}/*/*model_states.pt"))
    assert len(parts) == 2


@pytest.mark.slow
def test_fsdp_splits_weights_where_it_may(ladder: Path, alone: Path):
    """FSDP2 as on GPUs: accelerate takes it for GPUs only, so here it is told that these two processes have some."""
    together, shown = trained_together(ladder, "fsdp", script=Path(__file__).with_name("fsdp_on_cpu.py"))
    assert_same(alone, together)
    assert_said_once(shown)
    assert Path(f"{together}_stage1", f"checkpoint-{STEPS}", "pytorch_model_fsdp.bin").is_file()


@pytest.mark.slow
def test_fsdp_in_bfloat16_keeps_losses_and_sums_in_float32(ladder: Path):
    """Our policy instead of accelerate's, which has both in bfloat16: layers compute in bfloat16, the loss and the sum
    of gradients over two ranks are float32, and the losses are near those in float32."""
    script = Path(__file__).with_name("fsdp_formats.py")
    losses = {}
    for dtype in ("bfloat16", "float32"):
        settings = ("SFT_GRAD_ACCUM=1", f"SFT_DTYPE={dtype}", "SFT_GEN_EVAL=none", "SFT_EVAL_STEPS=100")
        out = ladder / f"fsdp_{dtype}"
        code, shown = run("fsdp", out, "--stage", "1", *options(ladder, out.name, *settings), script=script)
        assert code == 0, shown
        formats = [ast.literal_eval(line.split("FORMATS ")[1]) for line in shown.splitlines() if "FORMATS " in line]
        assert len(formats) == 2
        for seen in formats:
            assert seen["loss"] == seen["summed"] == ["torch.float32"]
            assert f"torch.{dtype}" in seen["computed"]
        losses[dtype] = metric_lines(Path(f"{out}_stage1"), "loss")
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)
    assert losses["bfloat16"] != losses["float32"]


@pytest.mark.slow
def test_deepspeed_in_float16_looks_for_its_scale(ladder: Path):
    """ZeRO-2 over two ranks from a scale of 2^24: DeepSpeed skips the steps that overflow and calls their norm
    infinite, which is logged as none; then it trains."""
    settings = ("SFT_GRAD_ACCUM=1", "SFT_DTYPE=float16", "SFT_GEN_EVAL=none", "SFT_EVAL_STEPS=100", "SFT_MAX_STEPS=14")
    out, script = ladder / "half", Path(__file__).with_name("half_on_cpu.py")
    code, shown = run("zero2", out, "--stage", "1", *options(ladder, out.name, *settings), script=script)
    assert code == 0, shown
    losses, norms = (metric_lines(Path(f"{out}_stage1"), name) for name in ("loss", "grad_norm"))
    assert len(losses) == 14
    assert 0 < len(norms) < 14


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_exactly(ladder: Path, capsys: pytest.CaptureFixture[str]):
    """SIGTERM to rank 1 alone, under torchrun: a sealed checkpoint, exit code 143 on both, nobody left within a minute;
    the same command then ends with the very bytes of a run that was never stopped, one process with the same losses."""
    settings = ("SFT_GRAD_ACCUM=1", "SFT_EVAL_STEPS=1", "SFT_MAX_STEPS=12", "SFT_SAVE_STEPS=100")
    out = ladder / "stopped"
    arguments = ["--stage", "1", *options(ladder, "stopped", *settings)]
    launcher = start("torchrun", out, *arguments)
    folder = Path(f"{out}_stage1")
    until(lambda: (folder / "metrics.jsonl").exists() and len(metric_lines(folder, "loss")) >= 2)
    asked = time.monotonic()
    os.kill(processes(out)["1"], signal.SIGTERM)
    code = launcher.wait(timeout=60)
    until(lambda: not processes(out), seconds=60 - (time.monotonic() - asked))
    shown = out.with_suffix(".log").read_text()
    assert code != 0
    assert shown.count("exitcode  : 143") == 2
    assert shown.count("Stopped by SIGTERM") == 1
    (checkpoint,) = folder.glob("checkpoint-*")
    assert not seals.damage(checkpoint)
    assert int(checkpoint.name.removeprefix("checkpoint-")) < 12

    shutil.copytree(folder, ladder / "handed_stage1")
    code, shown = run("torchrun", out, *arguments)
    assert code == 0
    assert f"Found latest checkpoint: {checkpoint.name}" in shown
    code, _ = run("torchrun", ladder / "whole", "--stage", "1", *options(ladder, "whole", *settings))
    assert code == 0
    whole = Path(f"{ladder / 'whole'}_stage1")
    expected = load_file(whole / "adapter_model.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert metric_lines(folder, "loss") == metric_lines(whole, "loss")

    # One process goes on from the checkpoint of two, with the same rows per step only.
    arguments = ["--stage", "1", *options(ladder, "handed", *settings)]
    assert run_train(*arguments) == 2
    assert "rows per step: 8 → 4" in capsys.readouterr().err
    assert run_train(*arguments, "--set", "SFT_GRAD_ACCUM=2") == 0
    assert metric_lines(ladder / "handed_stage1", "loss") == pytest.approx(metric_lines(whole, "loss"), abs=LOSS)


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_with_it(ladder: Path):
    """kill -9 of rank 1: the launcher names it, nobody hangs, nobody is left; the stage can be resumed."""
    out = ladder / "killed"
    settings = ("SFT_GRAD_ACCUM=1", "SFT_EVAL_STEPS=1", "SFT_MAX_STEPS=200", "SFT_SAVE_STEPS=1")
    launcher = start("ddp", out, "--stage", "1", *options(ladder, "killed", *settings))
    folder = Path(f"{out}_stage1")
    until(lambda: list(folder.glob("checkpoint-*")))
    os.kill(processes(out)["1"], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    until(lambda: not processes(out), seconds=10)
    shown = out.with_suffix(".log").read_text()
    assert "rank      : 1 (local_rank: 1)" in shown
    assert "Signal 9 (SIGKILL)" in shown
    assert not seals.damage(max(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime))


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_behind(ladder: Path):
    """kill -9 of the launcher: the system tells its processes, which stop as on SIGTERM, with a checkpoint."""
    out = ladder / "orphaned"
    settings = ("SFT_GRAD_ACCUM=1", "SFT_EVAL_STEPS=1", "SFT_MAX_STEPS=200", "SFT_SAVE_STEPS=100")
    launcher = start("torchrun", out, "--stage", "1", *options(ladder, "orphaned", *settings))
    folder = Path(f"{out}_stage1")
    until(lambda: (folder / "metrics.jsonl").exists() and metric_lines(folder, "loss"))
    launcher.kill()
    launcher.wait(timeout=10)
    until(lambda: not processes(out), seconds=60)
    (checkpoint,) = folder.glob("checkpoint-*")
    assert not seals.damage(checkpoint)


@pytest.mark.slow
def test_problems_are_listed_once_before_anything_is_written(ladder: Path):
    """A misspelt setting and a launch file that contradicts the settings: one listing, exit code 2 in every process."""
    code, shown = run("ddp", ladder / "misspelt", "--stage", "1", *options(ladder, "misspelt", "SFT_LORA_RANK=4"))
    assert code != 0
    assert shown.count("[ERROR] SFT_LORA_RANK=4") == shown.count("1 problem to solve") == 1
    assert "exitcode  : 2" in shown
    quantised = options(ladder, "quantised", "SFT_LOAD_IN_4BIT=1", "SFT_GRAD_ACCUM=1")
    code, shown = run("zero3", ladder / "quantised", "--stage", "1", *quantised)
    assert code != 0
    assert shown.count("[ERROR] SFT_LOAD_IN_4BIT=1: DeepSpeed ZeRO-3 cannot split quantised weights") == 1
    assert not list(ladder.glob("quantised_stage1*"))

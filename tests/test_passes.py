"""A step's rows divided among forward passes: fewest and balanced, results that don't depend on it, less memory."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sft.models.isolation import Isolation
from sft.planning import need
from sft.planning.activations import BatchShape
from sft.training import passes, trainer
from sft.training.batches import EpochBatches, Order, TrainingRows, heaviest_step, join_rows
from sft.training.passes import Passes, divide, rows_of
from tests.launching import run
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage

ADAPTER = "adapter_model.safetensors"


def test_rows_go_into_the_fewest_balanced_passes():
    """By hand: 24 tokens in two passes of 12 although the evenest way, 13 + 11, is too much; of 13 evenly."""
    assert [sorted(each) for each in divide([7, 5, 5, 4, 3], 12)] in ([[0, 1], [2, 3, 4]], [[0, 2], [1, 3, 4]])
    assert divide([7, 5, 5, 4, 3], 13) == [[1, 2, 4], [0, 3]]
    assert divide([7, 5, 5, 4, 3], 100) == [[0, 1, 2, 3, 4]]
    assert divide([9, 2, 2], 4) == [[0], [1, 2]]  # longer than a pass may be: alone
    assert divide([3, 3], 6, at_least=3) == [[0], [1], []]
    assert divide([], 4) == [[]]


def test_no_division_does_with_fewer_passes():
    """Against all ways to divide four rows, for 60 draws: no row is lost, no pass is one too many."""
    random = np.random.default_rng(0)
    for _ in range(60):
        lengths, budget = random.integers(1, 10, 4).tolist(), int(random.integers(10, 20))
        found = divide(lengths, budget)
        assert sorted(itertools.chain(*found)) == [0, 1, 2, 3]
        assert all(sum(lengths[row] for row in each) <= budget for each in found)
        fewest = min(
            len(set(places))
            for places in itertools.product(range(4), repeat=4)
            if all(sum(n for n, p in zip(lengths, places, strict=True) if p == place) <= budget for place in places)
        )
        assert len(found) == fewest


def rows() -> datasets.Dataset:
    random = np.random.default_rng(1)
    lengths = random.integers(3, 30, 50)
    return datasets.Dataset.from_list([
        {"input_ids": list(range(n)), "labels": [-100, *range(1, n)], "length": int(n), "source": 0}
        for n in lengths
    ])  # fmt: skip


def test_joined_rows_come_apart_as_they_were():
    """Ids, labels, weights, positions and epochs; an empty micro-batch has no rows."""
    training = TrainingRows(rows())
    given = [training.row(2, position) | {"loss_weights": np.full(len(training.row(2, position)["labels"]), 0.5)}
             for position in (4, 0, 7)]  # fmt: skip
    found = rows_of(join_rows([given]))
    for one, other in zip(found, given, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert rows_of(join_rows([])) == []


def test_the_heaviest_step_is_one_that_a_rank_has(make_settings: Any):
    """Against a walk over both ranks' micro-batches of the epoch, four to a step."""
    settings = make_settings(per_device_train_bs=2, grad_accum=4, seed=3)
    lengths = np.asarray(rows()["length"])
    sums = []
    for rank in (0, 1):
        batches = EpochBatches(Order(50, 3), batch_size=2, rank=rank, ranks=2)
        micro_batches = list(batches)
        for first in (0, 4, 8):  # the 13th is a rest
            sums.append(sum(lengths[key] for keys in micro_batches[first : first + 4] for key in keys))
    assert lengths[heaviest_step(rows(), settings, processes=2)].sum() == max(sums)


def test_a_step_with_more_ranks_than_rows_is_shared_out_too(make_settings: Any):
    """64 ranks of 2 x 4 rows and 50 rows: nobody has more than one; of two ranks with 4 x 10 rows none has all 50."""
    settings, lengths = make_settings(per_device_train_bs=2, grad_accum=4, seed=3), np.asarray(rows()["length"])
    assert lengths[heaviest_step(rows(), settings, processes=64)].tolist() == [lengths.max()]
    settings = make_settings(per_device_train_bs=10, grad_accum=4, seed=3)
    sums = []
    for rank in (0, 1):
        batches = EpochBatches(Order(50, 3), batch_size=10, rank=rank, ranks=2)
        sums.append(sum(lengths[key] for keys in batches for key in keys))
    assert lengths[heaviest_step(rows(), settings, processes=2)].sum() == max(sums) < lengths.sum()


# --- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "base")
    write_rows(folder / "rows.jsonl", 40)
    return folder


def trained(inputs: Path, folder: Path, **settings: object) -> Path:
    """The output of four steps of eight rows, two to a micro-batch; a checkpoint after the second."""
    folder.mkdir(exist_ok=True)
    common = {
        "SFT_BASE_MODEL": inputs / "base", "SFT_OUT_LORA_DIR": folder / "out", "SFT_DATASET_ID": inputs / "rows.jsonl",
        "SFT_MAX_STEPS": 4, "SFT_PER_DEVICE_TRAIN_BS": 2, "SFT_GRAD_ACCUM": 4, "SFT_EVAL_STEPS": 100,
    }  # fmt: skip
    write_stage(folder, 1, common | settings)
    assert run_train("--stage", 1, "--env-dir", folder) == 0
    return folder / "out_stage1"


def assert_equal(one: Path, other: Path) -> None:
    """Losses and adapters to 1e-6, steps and tokens exactly."""
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5), ("tokens", 0), ("epoch", 0)):
        assert metric_lines(one, name) == pytest.approx(metric_lines(other, name), rel=tolerance, abs=tolerance)
    first, second = load_file(one / ADAPTER), load_file(other / ADAPTER)
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-6


@pytest.fixture(scope="module")
def as_configured(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(inputs, tmp_path_factory.mktemp("configured"), SFT_MICRO_BATCH_TOKENS=0, SFT_LR="1e-3")


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [40, 200, 100_000, "auto"])
def test_the_division_changes_no_result(inputs: Path, tmp_path: Path, as_configured: Path, tokens: int | str):
    """Row by row, a few passes, all eight rows in one: losses and adapters of four passes of two rows."""
    assert_equal(trained(inputs, tmp_path, SFT_MICRO_BATCH_TOKENS=tokens, SFT_LR="1e-3"), as_configured)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_ranks_take_equally_many_passes_whatever_their_rows(
    inputs: Path, tmp_path: Path, as_configured: Path, kind: str
):
    """Two processes with four rows of a step each, unequally long, in passes of at most 120 tokens: nobody waits for
    the other's pass, the losses are those of one process and four passes of two rows."""
    shutil.copy(as_configured.parent / "stage1.env", tmp_path / "stage1.env")
    sets = (f"SFT_OUT_LORA_DIR={tmp_path / 'out'}", "SFT_GRAD_ACCUM=2", "SFT_MICRO_BATCH_TOKENS=120")
    asked = [part for text in sets for part in ("--set", text)]
    code, shown = run(kind, tmp_path / kind, "--stage", 1, "--env-dir", tmp_path, *asked)
    assert code == 0, shown
    for name in ("loss", "grad_norm"):
        expected = metric_lines(as_configured, name)
        assert metric_lines(tmp_path / "out_stage1", name) == pytest.approx(expected, abs=1e-5), name


@pytest.mark.slow
def test_out_of_memory_halves_the_passes_and_says_so_once(
    inputs: Path, tmp_path: Path, as_configured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A device that holds 300 tokens, in the backward pass too: the step begins anew, nothing of it is counted twice;
    the checkpoint has the smaller passes, and a run that goes on from it is the same bit by bit."""
    sizes: list[int] = []
    backward = trainer.SFTTrainer.training_step

    def cramped(self: Any, model: Any, batch: dict[str, Any], items: Any = None) -> torch.Tensor:
        loss = backward(self, model, batch, items)
        sizes.append(batch["input_ids"].shape[1])
        if sizes[-1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", cramped)
    out = trained(inputs, tmp_path, SFT_MICRO_BATCH_TOKENS=100_000, SFT_LR="1e-3")
    said = [line for line in capsys.readouterr().out.splitlines() if "Out of memory" in line]
    size = next(number for number in sizes if number > 300)
    assert said == [
        f"[WARNING] Out of memory with {size} tokens in a pass of step 1: from here on a pass holds at most "
        f"{size // 2}; SFT_MICRO_BATCH_TOKENS={size // 2} begins with that"
    ]
    assert [number > 300 for number in sizes].count(True) == 1
    assert_equal(out, as_configured)
    record = json.loads((out / "checkpoint-2" / "rhythm.json").read_text())
    assert record["passes"] == {"tokens": size // 2, "machine": "1 x CPU"}


@pytest.mark.slow
def test_a_run_goes_on_as_it_was_divided(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Under auto the checkpoint's division is kept, bit by bit with dropout on, whatever would be chosen now; on
    another kind of machine it is chosen anew, and said."""
    chosen = {"tokens": 250}
    monkeypatch.setattr(need, "pass_tokens", lambda *rows, **how: chosen["tokens"])
    dropout = {"SFT_LORA_DROPOUT": 0.1, "SFT_MICRO_BATCH_TOKENS": "auto"}
    whole = trained(inputs, tmp_path / "whole", **dropout)
    for name, machine, same in (("here", "1 x CPU", True), ("elsewhere", "1 x NVIDIA X of 80 GiB", False)):
        chosen["tokens"] = 250
        with monkeypatch.context() as patch:
            patch.setattr(passes, "machine_kind", lambda machine=machine: machine)
            patch.setattr(trainer.StagedTrainer, "save_model", stop_at_the_end)
            folder = tmp_path / name
            folder.mkdir()
            with pytest.raises(AssertionError):
                trained(inputs, folder, **dropout)
        chosen["tokens"] = 80
        capsys.readouterr()
        out = trained(inputs, folder, **dropout)
        said = capsys.readouterr().out
        text = "[WARNING] passes of at most 80 tokens from here on, the checkpoint was made with at most 250 tokens: "
        assert (text in said) is not same
        assert ((out / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()) is same


def stop_at_the_end(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
    """Saves checkpoint-2 and ends the run where checkpoint-4 would be."""
    if self.state.global_step > 2:
        raise RuntimeError("here it ends")
    trainer.SFTTrainer.save_model(self, output_dir, _internal_call)


def test_a_single_row_that_does_not_fit_ends_the_run():
    """There is nothing left to halve; other errors end it at once."""
    found = Passes(20, device=torch.device("cpu"))
    undone: list[int] = []

    def fail(rows: Any, last: bool) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    step = [{"input_ids": np.zeros(8, np.int64)}] * 4
    with pytest.raises(torch.OutOfMemoryError, match="a single row of 8 tokens"):
        found.run(step, fail, undo=lambda: undone.append(1), step=3)
    assert (found.tokens, len(undone)) == (8, 2)

    def fault(rows: Any, last: bool) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        found.run(step, fault, undo=lambda: None, step=3)


def test_the_trial_takes_the_largest_pass_alone_and_never_waits_for_others(capsys: pytest.CaptureFixture[str]):
    """Three passes of the step: the first one, as one that is not the last."""
    found, seen = Passes(20, device=torch.device("cpu")), []

    def take(rows: Any, last: bool) -> torch.Tensor:
        seen.append((sum(len(row["input_ids"]) for row in rows), last))
        return torch.ones(())

    step = [{"input_ids": np.zeros(n, np.int64)} for n in (12, 9, 7, 8, 6)]
    found.run(step, take, undo=lambda: None, step=0)
    assert seen == [(15, False)]
    seen.clear()
    assert found.run(step, take, undo=lambda: None, step=1) == 3.0
    assert [last for _, last in seen] == [False, False, True]


def test_ranks_agree_about_the_passes(monkeypatch: pytest.MonkeyPatch):
    """The other rank has three passes and no memory in its second: all take three, nobody runs the last one, where
    gradients are exchanged, and all halve. Under ZeRO the shortage ends the run instead."""
    told: list[bool] = []
    launch = SimpleNamespace(processes=2, sharding="none")
    monkeypatch.setattr(passes, "launched", lambda: launch)
    monkeypatch.setattr(passes, "say", lambda text: None)
    monkeypatch.setattr(passes.ranks, "largest", lambda number, device: max(number, 3 if number < 4 else 30))
    monkeypatch.setattr(passes.ranks, "any_rank", lambda short: told.append(short) or len(told) == 1)
    found, seen = Passes(20, device=torch.device("cpu")), []
    step = [{"input_ids": np.zeros(5, np.int64)}] * 3
    found.run(step, lambda rows, last: seen.append((len(rows), last)) or torch.ones(()), undo=seen.clear, step=1)
    assert seen == [(1, False), (1, False), (1, True)]
    assert (told, found.tokens) == ([False, False], 15)
    launch.sharding = "zero2"
    with pytest.raises(torch.OutOfMemoryError, match="here"):
        Passes(20, device=torch.device("cpu")).run(
            step, lambda rows, last: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory here")),
            undo=lambda: None, step=1,
        )  # fmt: skip


def test_the_size_of_a_pass_goes_by_memory(make_settings: Any, monkeypatch: pytest.MonkeyPatch):
    """A step of 16,000 tokens, rows of 1,000 at most; 100 + tokens / 10 bytes needed: whole, by the line, one row."""

    def estimate(config: Any, settings: Any, batch: BatchShape, **how: Any) -> Any:
        return SimpleNamespace(training=100 + batch.tokens // 10)

    monkeypatch.setattr(need, "estimate", estimate)
    whole = BatchShape(16_000, 4_000, rows=16)
    found = [
        need.tokens_that_fit(
            None, make_settings(), whole, longest=1_000, checkpointing=False, available=round(limit / need.COMFORTABLE)
        )  # type: ignore[arg-type]
        for limit in (2_000, 900, 150)
    ]
    assert found == [16_000, 8_000, 1_000]


def test_auto_goes_by_the_device_and_leaves_rows_that_go_one_by_one(
    make_settings: Any, monkeypatch: pytest.MonkeyPatch
):
    """A number is itself; a GPU takes what fits, a CPU what is enough for it."""
    assert need.pass_tokens(None, make_settings(micro_batch_tokens=512), rows(), checkpointing=False) == 512  # type: ignore[arg-type]
    monkeypatch.setattr(need, "available_bytes", lambda processes: 10**9)
    monkeypatch.setattr(need, "tokens_that_fit", lambda *step, **how: 777)
    monkeypatch.setattr(need, "cpu_tokens", lambda *step, **how: 99)
    for there, fitting in ((True, 777), (False, 99)):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        for kept_apart, expected in ((True, fitting), (False, 0)):
            apart = Isolation(kept_apart=kept_apart)
            monkeypatch.setattr(need, "expected_isolation", lambda config, settings, apart=apart: apart)
            assert need.pass_tokens(None, make_settings(), rows(), checkpointing=False) == expected  # type: ignore[arg-type]


def test_a_pass_on_a_cpu_is_as_long_as_pays_where_memory_allows(make_settings: Any, monkeypatch: pytest.MonkeyPatch):
    """States smaller than blocks that are mapped, or the longest row; less only where a quarter of memory is short."""
    monkeypatch.setattr(need, "rule_of_thumb", lambda config, shape, **how: shape.tokens)
    asked: list[tuple[int, int]] = []

    def fit(config: Any, settings: Any, shape: BatchShape, *, longest: int, **how: Any) -> int:
        asked.append((shape.tokens, longest))
        return 150

    monkeypatch.setattr(need, "tokens_that_fit", fit)
    settings = make_settings(per_device_train_bs=5, grad_accum=4, dtype="float32")
    step = int(np.asarray(rows()["length"])[heaviest_step(rows(), settings, processes=1)].sum())
    wide = need.LARGE // (200 * 4)  # the width of which 200 tokens in float32 make a large block
    for width, available, expected in ((wide, 10_000, 200), (2**30, 10_000, 29), (wide, 100, 150), (1, 100, 150)):
        text = SimpleNamespace(hidden_size=1, intermediate_size=width)
        monkeypatch.setattr(need, "available_bytes", lambda processes, available=available: available)
        config: Any = SimpleNamespace(get_text_config=lambda text=text: text)
        assert need.cpu_tokens(config, settings, rows(), checkpointing=False) == expected
    assert asked == [(200, 29), (step, 29)]


@pytest.mark.parametrize(("available", "traced", "checkpointed"), [(1_000, [40], False), (30, [40, 10, 40], True)])
def test_one_estimate_answers_where_memory_allows(
    make_settings: Any, monkeypatch: pytest.MonkeyPatch, available: int, traced: list[int], checkpointed: bool
):
    """Passes of 40 tokens, 10 in a micro-batch: the larger one says all; else the smaller decides on checkpointing."""
    asked: list[int] = []

    def estimate(config: Any, settings: Any, batch: BatchShape, *, checkpointing: bool, **how: Any) -> Any:
        asked.append(batch.tokens)
        return SimpleNamespace(training=batch.tokens + 20 - 40 * checkpointing, available=available)

    monkeypatch.setattr(need, "estimate", estimate)
    monkeypatch.setattr(need, "largest_answers", lambda val, settings: None)
    monkeypatch.setattr(need, "pass_tokens", lambda *step, **how: 40)
    monkeypatch.setattr(need, "largest_pass", lambda train, settings, tokens, **how: tokens)
    monkeypatch.setattr(need, "shape_of", lambda train, tokens: BatchShape(tokens or 10, 5))
    mix: Any = SimpleNamespace(train=None, val=None)
    found = need.need_of(None, make_settings(), mix)  # type: ignore[arg-type]
    assert (asked, found.checkpointing, found.tokens) == (traced, checkpointed, 40)

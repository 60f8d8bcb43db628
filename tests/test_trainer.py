"""The loss of joined and packed rows against plain padded batches; non-finite gradients; what is trained."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from benchmarks.gpu.job import Job
from benchmarks.gpu.steps import settings_of, trainer_of
from sft.errors import RunFailed
from sft.models.isolation import Isolation
from sft.models.model import casts_left_to_autocast, lora_layers, trained_modules
from sft.models.targets import adapter_config, targets_of
from sft.planning.activations import Tally
from sft.programs.benchmark import random_model
from sft.programs.benchmark_shapes import model_config
from sft.settings.values import Scheduler
from sft.training import arguments
from sft.training import trainer as trainer_module
from sft.training.arguments import scheduler, steps_to_schedule
from sft.training.batches import TrainingRows, join_rows
from tests.architectures import token_losses
from tests.tiny import metric_lines, run_train, tokenizer, write_model, write_rows, write_stage


def labelled_rows() -> datasets.Dataset:
    """Five rows of different lengths, answers trained."""
    words = tokenizer()
    rows = []
    for number, text in enumerate(["red", "blue green", "small large name", "JSON", "as is and the color"]):
        prompt = words(f"Write this {number}\n")["input_ids"]
        answer = words(text + "<|im_end|>")["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return datasets.Dataset.from_list(rows)


def padded_losses(model: torch.nn.Module, rows: datasets.Dataset) -> torch.Tensor:
    """The independent computation: a right-padded batch with attention mask and the model's own logits."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses[targets.flatten() != -100]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_joined_without_padding_have_the_losses_of_padded_rows(tmp_path: Path, attention: str):
    """No row sees another: token by token the same loss, to 1e-5, whether rows are joined one by one or as a pack."""
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m"), attn_implementation=attention).eval()
    rows = labelled_rows()
    expected = padded_losses(model, rows)
    for packs in (None, [[0, 1, 2, 3, 4]]):
        training = TrainingRows(rows, packs=packs)
        batch = join_rows([training[item] for item in range(len(training))])
        losses = token_losses(model, batch, Isolation())
        assert losses.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_default_targets_reach_every_projection(tmp_path: Path):
    """Seven kinds of projection in two layers, 4 x (in + out) parameters each; nothing else is trained."""
    from peft import get_peft_model

    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m"))
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    settings = SimpleNamespace(
        use_lora=True, lora_target_modules=names, lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_rslora=False,
        lora_dora=False, lora_modules_to_save=(), origins={},
    )  # fmt: skip
    assert set(targets_of(model).names()) == set(names)
    adapted = get_peft_model(model, adapter_config(model, settings))
    wide, narrow, inner = 2 * 4 * (32 + 32), 2 * 4 * (32 + 16), 2 * 4 * (32 + 64)
    assert trained_modules(adapted) == {
        "q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": wide,
        "gate_proj": inner, "up_proj": inner, "down_proj": inner,
    }  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_leaving_casts_to_autocast_saves_memory_and_changes_no_bit(tmp_path: Path, checkpointing: bool):
    """Gradients of all adapters in bfloat16, against PEFT's own casting; without checkpointing less is kept."""
    from peft import get_peft_model

    chosen = SimpleNamespace(
        use_lora=True, lora_target_modules=["all-linear"], lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_rslora=False,
        lora_dora=False, lora_modules_to_save=(), origins={},
    )  # fmt: skip
    folder = write_model(tmp_path / "m")
    ids = torch.arange(400)[None] % 300
    gradients, peaks = [], []
    for left in (False, True):
        bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        torch.manual_seed(0)
        model = get_peft_model(bare, adapter_config(bare, chosen)).train()
        if checkpointing:
            bare.gradient_checkpointing_enable({"use_reentrant": False})
            bare.enable_input_require_grads()
        layers = lora_layers(model)
        assert len(layers) == 14
        with torch.no_grad():
            for layer in layers:
                layer.lora_B["default"].weight.normal_()
        with Tally(model) as tally, casts_left_to_autocast(layers if left else ()):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        peaks.append(tally.peak)
        assert all(layer.cast_input_dtype_enabled for layer in layers)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert peaks[1] <= (1.0 if checkpointing else 0.95) * peaks[0]


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_every_scheduler_can_be_made(name: str):
    """With the arguments that a stage of 40 steps gives it; warmup_stable_decay falls over the last four."""
    made = scheduler(SimpleNamespace(lr_scheduler=name, min_lr_ratio=0.0))
    keywords = made["lr_scheduler_kwargs"] | steps_to_schedule(SimpleNamespace(lr_scheduler_type=name), 40)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    course = get_scheduler(made["lr_scheduler_type"], optimizer, 4, 40, scheduler_specific_kwargs=keywords)
    if name == "warmup_stable_decay":
        rates = [course.lr_lambdas[0](step) for step in range(41)]
        assert rates[4:37] == [1.0] * 33
        assert rates[37] < 1.0
        assert rates[40] == pytest.approx(0.0)


def test_a_gradient_that_is_not_finite_ends_the_run():
    """The message names step and rows; a finite norm passes as a number."""
    assert trainer_module.finite_norm(torch.tensor(0.5), step=3, rows=[4, 7]) == 0.5
    for bad in (math.nan, math.inf):
        with pytest.raises(RunFailed, match=r"at step 3 .*rows of this step: 4, 7"):
            trainer_module.finite_norm(torch.tensor(bad), step=3, rows=[4, 7])


@pytest.mark.slow
def test_a_stage_leaves_casts_to_autocast_and_its_rate_falls_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In bfloat16: no adapter casts in training, all do while answers are generated; logits become their gradient."""
    seen: set[tuple[bool, bool]] = set()
    made: list[str] = []
    losses = trainer_module.StagedTrainer.token_losses

    def watched(self, *arguments):
        seen.update((self.model.training, layer.cast_input_dtype_enabled) for layer in self.lora_layers)
        found = losses(self, *arguments)
        made.append(type(found.grad_fn).__name__)
        return found

    monkeypatch.setattr(trainer_module.StagedTrainer, "token_losses", watched)
    common = {"SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_OUT_LORA_DIR": tmp_path / "out"}
    rows = {"SFT_DATASET_ID": write_rows(tmp_path / "rows.jsonl", 40), "SFT_MAX_STEPS": 20, "SFT_WARMUP_STEPS": 2}
    wanted = {"SFT_DTYPE": "bfloat16", "SFT_LR_SCHEDULER": "warmup_stable_decay", "SFT_GEN_EVAL": "structured"}
    short = {"SFT_GEN_EVAL_SAMPLES": 2, "SFT_GEN_MAX_NEW_TOKENS": 4, "SFT_EVAL_STEPS": 20}
    write_stage(tmp_path, 1, common | rows | wanted | short)
    assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
    assert seen == {(True, False), (False, True)}
    assert "_TokenCrossEntropyBackward" in made
    rates = metric_lines(tmp_path / "out_stage1", "learning_rate")
    assert rates[2:19] == [1e-2] * 17
    assert rates[19] < 1e-2


@pytest.mark.slow
def test_packing_trains_the_same_tokens_in_fewer_steps(tmp_path: Path):
    """The trained tokens of an epoch are those of the unpacked run; 36 short rows fit into a few sequences."""
    write_model(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    tokens, steps = [], []
    for packing in (0, 1):
        common = {"SFT_BASE_MODEL": tmp_path / "base", "SFT_OUT_LORA_DIR": tmp_path / f"out{packing}"}
        write_stage(tmp_path, 1, common | {"SFT_DATASET_ID": rows, "SFT_PACKING": packing, "SFT_EVAL_STEPS": 100})
        assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
        folder = tmp_path / f"out{packing}_stage1"
        manifest = json.loads((folder / "stage.json").read_text())
        tokens.append(metric_lines(folder, "tokens")[-1])
        steps.append(manifest["steps"])
    assert tokens[0] == tokens[1]
    assert steps[1] < steps[0] == 5


def test_a_trainer_leaves_triton_out_where_it_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before TRL builds its head, in a stage and in a benchmark."""
    asked: list[None] = []
    monkeypatch.setattr(trainer_module, "leave_out_triton", lambda: asked.append(None))
    job = Job("one", tmp_path, 0.0, rehearse=True)
    trainer_of(job, random_model(model_config("tiny"), torch.float32), settings_of(job, "tiny"), length=8)
    assert asked == [None]


@pytest.mark.slow
def test_a_compiled_stage_trains_and_saves_as_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SFT_TORCH_COMPILE=1, traced as on a GPU and run without a compiler: losses, evaluations, names and weights."""
    plain = arguments.machine

    def traced(settings: Any, **how: Any) -> dict[str, Any]:
        return plain(settings, **how) | ({"torch_compile_backend": "aot_eager"} if settings.torch_compile else {})

    monkeypatch.setattr(arguments, "machine", traced)
    base, rows = write_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 24)
    common = {"SFT_BASE_MODEL": base, "SFT_DATASET_ID": rows, "SFT_MAX_STEPS": 3, "SFT_GEN_EVAL": "structured"}
    found = {}
    for compiled in (0, 1):
        out = tmp_path / f"out{compiled}"
        write_stage(tmp_path, 1, common | {"SFT_OUT_LORA_DIR": out, "SFT_TORCH_COMPILE": compiled})
        assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
        folder = Path(f"{out}_stage1")
        losses = [*metric_lines(folder, "loss"), *metric_lines(folder, "eval_loss")]
        found[compiled] = losses, load_file(folder / "adapter_model.safetensors")
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert found[1][1].keys() == found[0][1].keys()
    for name, weights in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weights, rtol=1e-4, atol=1e-5, msg=name)

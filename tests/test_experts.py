"""Adapters on fused experts: the routed way gives what PEFT's gives, and leaves everything but the forward as it is."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from sft.models.experts import RoutedAdapter, route_experts
from tests import tiny

TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
CLOSE = {"rtol": 0.0, "atol": 1e-5}
IDS = torch.arange(48)[None] * 7 % 61


def config(**values):
    return Qwen3MoeConfig(**{
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 20, "num_experts": 6,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "max_position_embeddings": 128,
    } | values)  # fmt: skip


def adapted(rank=4, targets=TARGETS, **values):
    """A random model with a random adapter, on PEFT's way."""
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(config(**values))
    model = get_peft_model(bare, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def routed(model):
    """A copy on the routed way."""
    other = copy.deepcopy(model)
    assert route_experts(other) == []
    assert sum(type(module) is RoutedAdapter for module in other.modules()) == 2
    return other


def step(model):
    """Logits, and the gradient of every trained parameter."""
    logits = model(input_ids=IDS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("rank", "targets"), [(8, TARGETS), (3, TARGETS), (4, ["down_proj"]), (4, ["gate_proj", "up_proj"])]
)
def test_outputs_and_gradients_are_those_of_peft(rank, targets, checkpointing):
    """Within 1e-5 in float32, where the adapter moves the logits by far more; rank 3 needs padding."""
    model = adapted(rank, targets)
    other = routed(model)
    if checkpointing:
        for each in (model, other):
            each.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            each.get_base_model().enable_input_require_grads()
    expected, wanted = step(model)
    found, gradients = step(other)
    torch.testing.assert_close(found, expected, **CLOSE)
    with other.disable_adapter():
        assert (other(input_ids=IDS).logits - expected).abs().max() > 1e-2
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], **CLOSE, msg=name)
    experts = [gradient for name, gradient in wanted.items() if "experts" in name]
    assert min(gradient.abs().max() for gradient in experts) > 1e-4


def test_experts_that_nobody_chooses_get_no_gradient():
    """With one token of one expert each, most experts are left out, in PEFT's way as in this one."""
    model = adapted(num_experts_per_tok=1)
    other = routed(model)
    results = [each(input_ids=IDS[:, :2], use_cache=False).logits for each in (model, other)]
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    for logits in results:
        logits.square().sum().backward()
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-4, msg=name)


def test_bfloat16_loses_less_than_peft():
    """PEFT rounds W + BA to bfloat16; against float32 the routed way is no further off."""
    model = adapted(8, moe_intermediate_size=24)
    expected = model(input_ids=IDS).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    errors = [(each(input_ids=IDS).logits.float() - expected).square().mean().sqrt() for each in (half, routed(half))]
    assert errors[1] <= 1.1 * errors[0]


def test_names_saving_merging_and_disabling_stay_pefts(tmp_path):
    """The same tensors, an adapter folder that plain PEFT loads, the same merged model, the base without adapter."""
    model = adapted()
    other = routed(model)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    expected = model(input_ids=IDS).logits
    other.save_pretrained(tmp_path)
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(config())
    untouched = bare(input_ids=IDS).logits
    loaded = PeftModel.from_pretrained(bare, tmp_path)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, **CLOSE)
    with other.disable_adapter():
        torch.testing.assert_close(other(input_ids=IDS).logits, untouched, **CLOSE)
    torch.testing.assert_close(other.merge_and_unload()(input_ids=IDS).logits, expected, **CLOSE)


def test_answers_are_those_of_peft():
    """Greedy decoding token by token with a cache."""
    model = adapted().eval()
    answers = [each.generate(IDS[:, :8], max_new_tokens=12, do_sample=False) for each in (model, routed(model))]
    assert answers[0].tolist() == answers[1].tolist()


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("is_transposed", True, "Qwen3MoeExperts keeps its weights in another layout"),
        ("has_post_expert_norm", True, "Qwen3MoeExperts keeps its weights in another layout"),
        ("has_bias", True, "Qwen3MoeExperts keeps its weights in another layout"),
        ("_is_expert_parallel", True, "Qwen3MoeExperts is shared out among processes"),
    ],
)
def test_what_is_not_known_stays_on_pefts_way_and_is_told(attribute, value, reason):
    """Once, however many layers there are."""
    model = adapted()
    for module in model.modules():
        if hasattr(module, "has_gate") and isinstance(module, torch.nn.Module):
            setattr(module, attribute, value)
    assert route_experts(model) == [reason]
    assert all(type(module) is ParamWrapper for module in model.modules() if isinstance(module, ParamWrapper))


def test_experts_of_an_older_transformers_are_known():
    """5.17 has no `has_post_expert_norm`, and no such norms either."""
    model = adapted()
    for module in model.modules():
        if hasattr(module, "has_post_expert_norm"):
            del module.has_post_expert_norm
    assert route_experts(model) == []


def test_zero3_keeps_pefts_way(monkeypatch):
    """It gathers a module's weights when the module is called, and here the experts' own forward is not."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert route_experts(adapted()) == ["Qwen3MoeExperts under ZeRO-3, which gathers weights module by module"]


def test_a_model_without_expert_adapters_is_left_alone():
    """Adapters on attention only: nothing is wrapped."""
    model = adapted(targets=["q_proj"])
    assert route_experts(model) == []
    assert not any(isinstance(module, ParamWrapper) for module in model.modules())


def write_mixture(folder):
    words = tiny.tokenizer()
    torch.manual_seed(0)
    special = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    AutoModelForCausalLM.from_config(config(**special, bos_token_id=None)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_attention_alone_is_said_by_check_and_run(tmp_path, capsys):
    """Before the first step, in the same words."""
    common = {"SFT_BASE_MODEL": write_mixture(tmp_path / "base"), "SFT_OUT_LORA_DIR": tmp_path / "out"}
    common |= {"SFT_DATASET_ID": tiny.write_rows(tmp_path / "rows.jsonl", 24), "SFT_MAX_STEPS": 1}
    tiny.write_stage(tmp_path, 1, common | {"SFT_LORA_TARGET_MODULES": "q_proj,v_proj"})
    for arguments in (("--check",), ()):
        assert tiny.run_train("--stage", 1, "--env-dir", tmp_path, *arguments) == 0
        assert "[WARNING] only attention is trained in this mixture of experts" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stage_trains_experts_the_routed_way(tmp_path, monkeypatch, capsys):
    """train.py: the losses of a stage on PEFT's way, and no warning; how experts are multiplied is said."""
    write_mixture(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 40)
    losses = {}
    for name in ("routed", "peft"):
        out = tmp_path / name
        common = {"SFT_BASE_MODEL": tmp_path / "base", "SFT_OUT_LORA_DIR": out, "SFT_DATASET_ID": rows}
        tiny.write_stage(tmp_path, 1, common | {"SFT_MAX_STEPS": 3})
        if name == "peft":
            monkeypatch.setattr("sft.training.trainer.route_experts", lambda model: ["told to"])
        assert tiny.run_train("--stage", 1, "--env-dir", tmp_path) == 0
        said = capsys.readouterr().out
        assert ("[WARNING] adapters on experts take PEFT's slower way" in said) is (name == "peft")
        assert ("Experts with adapters: torch's kernel for products in groups" in said) is (name == "routed")
        losses[name] = tiny.metric_lines(tmp_path / f"{name}_stage1", "loss")
        assert json.loads((tmp_path / f"{name}_stage1" / "adapter_config.json").read_text())["r"] == 4
        best = json.loads((tmp_path / f"{name}_stage1" / "best_model" / "config.json").read_text())
        assert best["output_router_logits"] is False  # the balancing loss is not added, so nobody asks for it
    assert len(losses["peft"]) == 3
    assert losses["routed"] == pytest.approx(losses["peft"], abs=1e-5)

"""The merge against PEFT's own float32 merge, bit for bit, on models small enough to build in a moment."""

import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sft.errors import Problems, RunFailed
from sft.merging import fold
from sft.merging.merge import Ingredients, is_current, merge
from sft.merging.weights import INDEX
from sft.storage.seals import sha256

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = LlamaConfig(intermediate_size=80, num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
QWEN3 = Qwen3Config(intermediate_size=80, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, **SIZES)
GPT2 = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
MOE_SIZES = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}
QWEN3_MOE = Qwen3MoeConfig(intermediate_size=40, num_key_value_heads=2, **MOE_SIZES, **SIZES)
MIXTRAL = MixtralConfig(intermediate_size=20, num_key_value_heads=2, num_local_experts=4, **SIZES)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(config: PretrainedConfig, folder: Path, dtype: str = "bfloat16", shard: str = "40KB") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 1, scale: float = 0.05, **settings) -> Path:
    """An adapter with every factor (and DoRA magnitude) away from its initial value."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) * scale
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else parameter.data + noise
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_merge(base: Path, adapters: list[Path], dtype: str) -> dict[str, torch.Tensor]:
    """PEFT's result: everything loaded in float32, one adapter after the other, rounded once."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.to(getattr(torch, dtype)).state_dict()


def assert_same_as_peft(base: Path, adapters: list[Path], target: Path, dtype: str = "bfloat16") -> None:
    expected = peft_merge(base, adapters, dtype)
    merged = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert merged.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(merged[name], expected[name])]
    assert different == []


CASES = {
    "llama": (LLAMA, {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "head and embeddings": (LLAMA, {"r": 3, "lora_alpha": 4, "target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "rslora": (LLAMA, {"r": 5, "lora_alpha": 4, "target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        LLAMA,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "dora": (LLAMA, {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_dora": True}),
    "saved in full": (LLAMA, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved as one, tied": (
        QWEN3,
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"], "ensure_weight_tying": True},
    ),
    "qwen3, tied": (QWEN3, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "gpt2": (GPT2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 dora": (GPT2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "experts": (QWEN3_MOE, {"r": 3, "lora_alpha": 4, "target_modules": LINEAR}),
    "experts and router": (QWEN3_MOE, {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}),
    "down only": (QWEN3_MOE, {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
    "mixtral": (MIXTRAL, {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "w1", "w2", "w3"]}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_one_adapter_gives_the_bits_of_pefts_float32_merge(tmp_path, case, dtype):
    """Every kind of adapter and layout: all tensors equal PEFT's, computed in float32 and rounded once."""
    config, settings = CASES[case]
    base = make_base(config, tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    record = merge(base, [adapter], tmp_path / "merged")
    assert_same_as_peft(base, [adapter], tmp_path / "merged", dtype)
    assert (record.path, record.warnings, record.dtype) == ("streaming", [], dtype)


@pytest.mark.parametrize("config", [LLAMA, GPT2, QWEN3_MOE], ids=["llama", "gpt2", "qwen3_moe"])
def test_three_adapters_in_order_are_rounded_once(tmp_path, config):
    """A lineage is folded from the original base in float32: the bits of PEFT merging in a row."""
    base = make_base(config, tmp_path / "base")
    targets = ["c_attn", "c_fc"] if config is GPT2 else LINEAR
    adapters = [
        make_adapter(
            base, tmp_path / f"adapter{n}", seed=n, r=2 + n, lora_alpha=7, target_modules=targets, use_dora=dora
        )
        for n, dora in ((1, False), (2, config is not QWEN3_MOE), (3, False))
    ]
    merge(base, adapters, tmp_path / "merged")
    assert_same_as_peft(base, adapters, tmp_path / "merged")


def test_blocks_of_large_matrices_give_the_same_bits(tmp_path):
    """Matrices of many blocks with odd sizes and a high rank: cutting them changes no bit of PEFT's product."""
    sizes = {"hidden_size": 1032, "num_attention_heads": 4, "vocab_size": 96}
    config = LlamaConfig(num_hidden_layers=1, intermediate_size=2999, num_key_value_heads=2, **sizes)
    base = make_base(config, tmp_path / "base", shard="5MB")
    adapter = make_adapter(base, tmp_path / "adapter", r=48, lora_alpha=37, target_modules=LINEAR, scale=0.01)
    merge(base, [adapter], tmp_path / "merged")
    assert_same_as_peft(base, [adapter], tmp_path / "merged")


def test_shards_stay_as_they_are_and_untouched_tensors_keep_their_bytes(tmp_path):
    """The merged folder has the base's shards, names, order and dtypes; a tensor no adapter names is copied."""
    base = make_base(LLAMA, tmp_path / "base")
    (base / "tokenizer.json").write_text("{}", encoding="utf-8")
    adapter = make_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    record = merge(base, [adapter], tmp_path / "merged")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) == 3
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    indexes = [json.loads((folder / INDEX).read_text())["weight_map"] for folder in (base, tmp_path / "merged")]
    assert indexes[0] == indexes[1]
    assert (tmp_path / "merged" / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    changed = set()
    for shard in shards:
        before, after = load_file(base / shard), load_file(tmp_path / "merged" / shard)
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert record.tensors_changed == 2


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_embeddings_changes_alone(tmp_path, target):
    """Tied embeddings are parted where training moved only one: the merged model answers as base + adapter did."""
    base = make_base(QWEN3, tmp_path / "base", "float32")
    adapter = make_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj", target])
    merge(base, [adapter], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(20).reshape(2, 10)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)
    original = AutoModelForCausalLM.from_pretrained(base).state_dict()["lm_head.weight"]
    kept = {"lm_head": "model.embed_tokens.weight", "embed_tokens": "lm_head.weight"}[target]
    assert torch.equal(merged.state_dict()[kept], original)


def test_float32_output_of_a_bfloat16_base_is_not_rounded(tmp_path):
    """SFT_MERGE_DTYPE=float32: PEFT's float32 result as it is, in the weights and in config.json."""
    base = make_base(LLAMA, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", r=4, target_modules=LINEAR)
    record = merge(base, [adapter], tmp_path / "merged", dtype="float32")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert_same_as_peft(base, [adapter], tmp_path / "merged", "float32")
    assert (record.dtype, record.rounding_loss) == ("float32", 0.0)


def test_rounding_loss_is_the_share_of_the_update_that_rounding_took(tmp_path):
    """W = 1 with an update of 2^-8: bfloat16 holds 1 and 1 + 2^-7, ties go to 1, so all of the update is lost."""
    base = make_base(LLAMA, tmp_path / "base", "float32")
    for shard in base.glob("*.safetensors"):
        ones = {name: torch.ones_like(tensor).bfloat16() for name, tensor in load_file(shard).items()}
        save_file(ones, shard, metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", r=1, lora_alpha=1, target_modules=["q_proj", "k_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    update = {"q_proj.lora_B": 2**-7, "k_proj.lora_B": 2**-8}
    for name, tensor in tensors.items():
        tensor.fill_(next((value for part, value in update.items() if part in name), 1.0))
    save_file(tensors, adapter / "adapter_model.safetensors")
    record = merge(base, [adapter], tmp_path / "merged")
    elements = {"q_proj": 48 * 48, "k_proj": 24 * 48}
    lost = elements["k_proj"] * 2**-16
    assert record.rounding_loss == pytest.approx((lost / (lost + elements["q_proj"] * 2**-14)) ** 0.5)
    assert record.tensors_changed == 2


def test_rounding_loss_of_what_was_trained_in_full_is_a_share_of_what_it_learnt(tmp_path):
    """A head moved by 2^-7 in half its rows, which bfloat16 holds, and by 2^-8 in the others, which it does not: 1 / 5
    of the squared update is lost; and half of its update is no half of its weights, which are 1."""
    base = make_base(LLAMA, tmp_path / "base", "float32")
    for shard in base.glob("*.safetensors"):
        ones = {name: torch.ones_like(tensor).bfloat16() for name, tensor in load_file(shard).items()}
        save_file(ones, shard, metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", r=1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
    rows = torch.tensor([1 + 2**-7, 1 + 2**-8]).repeat(48)[:, None]
    save_file(tensors | {"base_model.model.lm_head.weight": rows.expand(96, 48).contiguous()}, path)
    record = merge(base, [adapter], tmp_path / "merged")
    assert record.rounding_loss == pytest.approx((1 / 5) ** 0.5)
    assert record.tensors_changed == 1


def test_experts_trained_one_by_one_reach_their_own_tensors(tmp_path):
    """An adapter with factors per expert (earlier transformers) gives what PEFT makes of it on the fused experts."""
    base = make_base(QWEN3_MOE, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", r=2, lora_alpha=3, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.manual_seed(5)
    for layer, expert, name in itertools.product(range(2), range(4), ("gate_proj", "up_proj", "down_proj")):
        key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
        rows, columns = (48, 20) if name == "down_proj" else (20, 48)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = torch.randn(2, columns), torch.randn(rows, 2)
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    record = merge(base, [adapter], tmp_path / "merged")
    assert_same_as_peft(base, [adapter], tmp_path / "merged")
    assert record.tensors_changed == 2 * (1 + 4 * 3)


def test_pickled_base_becomes_safetensors(tmp_path):
    """A base of PyTorch .bin files merges to the same bits and leaves no pickle and no scratch folder behind."""
    base = make_base(LLAMA, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", r=2, target_modules=LINEAR)
    merge(base, [adapter], tmp_path / "expected")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    for number, shard in enumerate(sorted(base.glob("*.safetensors")), start=1):
        torch.save(load_file(shard), pickled / f"pytorch_model-{number:05}-of-00009.bin")
    merge(pickled, [adapter], tmp_path / "merged")
    names = {path.suffix for path in (tmp_path / "merged").iterdir()}
    assert names == {".json", ".safetensors"}
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("expected", "merged"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "expected", "merged", "pickled"]


def test_what_only_peft_can_merge_is_merged_by_peft(tmp_path):
    """A LoRA bias is more than B A: PEFT merges it, and the record says so."""
    config = LlamaConfig(attention_bias=True, intermediate_size=80, tie_word_embeddings=False, **SIZES)
    base = make_base(config, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"], lora_bias=True)
    record = merge(base, [adapter], tmp_path / "merged")
    assert_same_as_peft(base, [adapter], tmp_path / "merged")
    assert record.path == "peft"
    assert "is not plain LoRA" in record.warnings[0]


def rename(adapter: Path, old: str, new: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name.replace(old, new): value for name, value in tensors.items()}, adapter / "adapter_model.safetensors")


@pytest.fixture
def parts(tmp_path) -> tuple[Path, Path, Path]:
    """(base, adapter, target) of a small merge that would go well."""
    base = make_base(LLAMA, tmp_path / "base")
    return (
        base,
        make_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj", "lm_head"]),
        tmp_path / "merged",
    )


def assert_nothing_left(target: Path) -> None:
    assert sorted(path.name for path in target.parent.iterdir()) == ["adapter", "base"]


def test_adapter_tensors_without_a_place_are_named(parts):
    """An adapter of another model is refused with the tensors that fit nowhere, and nothing is left on disk."""
    rename(parts[1], "layers.1.self_attn.q_proj", "layers.1.attention.query")
    with pytest.raises(RunFailed, match=r"2 adapter tensors have no place .*layers\.1\.attention\.query\.lora_A"):
        merge(parts[0], [parts[1]], parts[2])
    assert_nothing_left(parts[2])


def test_an_adapter_without_a_step_is_a_warning(parts):
    """Zero B factors change nothing and are said to; the merged weights are the base's."""
    base, adapter, target = parts
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in tensors.items()}, adapter / "adapter_model.safetensors")
    record = merge(base, [adapter], target)
    assert record.warnings == [f"{adapter} changes nothing: every B is zero, as before the first step"]
    assert record.tensors_changed == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, target))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_update_that_rounding_swallows_is_an_error(parts):
    """A merge that changed no weight is a failure with the remedy, and float32 keeps the update."""
    base, adapter, target = parts
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t * 1e-9 if "lora_B" in n else t for n, t in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(RunFailed, match=r"merging it changed no weight.*SFT_MERGE_DTYPE=float32"):
        merge(base, [adapter], target)
    assert_nothing_left(target)
    assert merge(base, [adapter], target, dtype="float32").tensors_changed == 3


def test_quantised_base_is_refused(parts):
    """Nothing is merged into quantised weights."""
    config = json.loads((parts[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (parts[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(Problems, match=r"are quantised \(bitsandbytes\)"):
        merge(parts[0], [parts[1]], parts[2])


def test_a_cut_or_missing_shard_is_named(parts):
    """A base whose download broke off is a problem that names the file, before anything is written."""
    shard = sorted(parts[0].glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(Problems, match=f"{shard.name}: is not a whole safetensors file"):
        merge(parts[0], [parts[1]], parts[2])
    shard.unlink()
    with pytest.raises(Problems, match=f"misses {shard.name}, named in {INDEX}"):
        merge(parts[0], [parts[1]], parts[2])
    assert_nothing_left(parts[2])


def test_ranks_must_agree_with_the_configuration(parts):
    """Tensors and adapter_config.json of two trainings are told apart by their rank."""
    config = json.loads((parts[1] / "adapter_config.json").read_text())
    (parts[1] / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(RunFailed, match=r"has rank 2 but adapter_config\.json says 4"):
        merge(parts[0], [parts[1]], parts[2])


def test_trained_biases_are_refused(parts):
    """bias="all" lives outside the weights that are merged."""
    config = json.loads((parts[1] / "adapter_config.json").read_text())
    (parts[1] / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    with pytest.raises(Problems, match=r'bias="all" cannot be merged; train the adapter with bias="none"'):
        merge(parts[0], [parts[1]], parts[2])


def test_too_little_disk_space_is_said_before_writing(parts, monkeypatch):
    """The message has needed and free space; nothing stays behind."""
    monkeypatch.setattr("sft.storage.atomic.free_bytes", lambda path: 1000)
    with pytest.raises(RunFailed, match=r"needs 0\.07 GB and .* has 0\.00 GB free"):
        merge(parts[0], [parts[1]], parts[2])
    assert_nothing_left(parts[2])


def test_an_interrupted_merge_leaves_the_old_folder(parts):
    """What stood at the target stands until the new folder is complete."""
    base, adapter, target = parts
    merge(base, [adapter], target)
    before = (target / "merge.json").read_text()

    def interrupt(folder: Path, record: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, [adapter], target, finish=interrupt)
    assert (target / "merge.json").read_text() == before
    assert sorted(path.name for path in target.parent.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.parametrize("answer", [OSError(errno.EXDEV, "other device"), 0])
def test_file_systems_that_copy_nothing_in_the_kernel_get_the_same_bytes(parts, monkeypatch, answer):
    """Where copy_file_range is refused or copies nothing, untouched tensors are read and written."""
    base, adapter, target = parts
    merge(base, [adapter], target)
    expected = {path.name: path.read_bytes() for path in target.glob("*.safetensors")}

    def refuse(*arguments: object) -> int:
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(os, "copy_file_range", refuse)
    merge(base, [adapter], target)
    assert {path.name: path.read_bytes() for path in target.glob("*.safetensors")} == expected


def test_current_means_same_base_adapters_and_requested_format(parts, tmp_path):
    """A merged folder is current for exactly what it was made of, whatever the paths; a damaged one for nothing."""
    base, adapter, target = parts
    digest = sha256(adapter / "adapter_model.safetensors")
    merge(base, [adapter], target, fingerprint="model:1")
    made_from = Ingredients("model:1", (digest,))
    assert is_current(target, made_from)
    target.rename(tmp_path / "moved")
    target = tmp_path / "moved"
    assert is_current(target, made_from)
    others = [Ingredients("model:2", (digest,)), Ingredients("model:1", (digest, digest)), Ingredients("model:1", ())]
    assert not any(is_current(target, other) for other in others)
    assert not is_current(tmp_path / "nothing", made_from)
    (target / "config.json").write_text("{}")
    assert not is_current(target, made_from)


def test_a_disk_that_gives_back_something_else_is_noticed(parts, monkeypatch):
    """One bit of a merged tensor that turns on its way to the disk: nothing is published."""
    base, adapter, target = parts
    real = fold.write_bytes

    def flipped(descriptor: int, values: torch.Tensor, position: int) -> None:
        raw = values.clone()
        raw.view(torch.uint8)[0] ^= 1
        real(descriptor, raw, position)

    monkeypatch.setattr(fold, "write_bytes", flipped)
    with pytest.raises(RunFailed, match="reads back differently from what was written"):
        merge(base, [adapter], target)
    assert not target.exists()


def test_the_format_asked_for_counts_not_the_one_that_came_out(parts):
    """A merge asked for in the base's own format is another than one that was left to the base (trust M6)."""
    base, adapter, target = parts
    digest = sha256(adapter / "adapter_model.safetensors")
    merge(base, [adapter], target, dtype="bfloat16", fingerprint="model:1")
    assert is_current(target, Ingredients("model:1", (digest,), "bfloat16"))
    assert not is_current(target, Ingredients("model:1", (digest,)))
    assert not is_current(target, Ingredients("model:1", (digest,), "float32"))


MEASURE = """
import sys
from pathlib import Path
from sft.merging.merge import merge, peak_rss_bytes
from sft.merging import layout
before = peak_rss_bytes()
merge(sys.argv[1], [Path(sys.argv[2])], Path(sys.argv[3]))
print(peak_rss_bytes() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """200 MB of weights are merged within 60 MB beyond what the libraries take."""
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    (tmp_path / "base").mkdir()
    sizes = {"hidden_size": 2000, "intermediate_size": 25000, "num_hidden_layers": 2, "num_attention_heads": 20}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    weights = {f"{name}.weight": torch.zeros(25000, 2000, dtype=torch.bfloat16) for name in names}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    a = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, 2000) for name in names}
    b = {f"base_model.model.{name}.lora_B.weight": torch.ones(25000, 4) for name in names}
    save_file(a | b, tmp_path / "adapter" / "adapter_model.safetensors")
    arguments = [sys.executable, "-c", MEASURE, tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(run.stdout.split()[-1]) < 60e6
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(bool((tensor == 8.0).all()) for tensor in merged.values())

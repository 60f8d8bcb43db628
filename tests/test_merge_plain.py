"""Models whose files hold every matrix under its own name are merged without transformers, to the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import AutoConfig

from sft.merging import plain
from sft.merging.adapter_files import EMBEDDINGS, Adapter, LowRank, read_adapter, updates_of
from sft.merging.layout import base_layout
from sft.merging.merge import merge
from sft.merging.plain import KINDS, PlainLayout, plain_layout
from sft.merging.weights import INDEX, StoredTensor, read_header, shard_paths
from tests.test_merge import LINEAR, QWEN3_MOE, make_adapter, make_base

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 80, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def stored_of(base: Path) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for path in shard_paths(base) for tensor in read_header(path)}


def layout_of(base: Path, *adapters: Adapter) -> PlainLayout | None:
    return plain_layout(
        json.loads((base / "config.json").read_text()),
        stored_of(base),
        [name for each in adapters for name in each.tensors],
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_transformers_says_the_same_of_these_architectures(tmp_path: Path, kind: str):
    """Of every linear layer inside the model: its tensor, shape and direction, and so which updates land where."""
    base = make_base(AutoConfig.for_model(kind, **SIZES), tmp_path / "base")
    adapter = read_adapter(make_adapter(base, tmp_path / "adapter", r=3, target_modules="all-linear"))
    found = layout_of(base, adapter)
    assert found is not None
    with base_layout(base, tmp_path / "merged") as (asked, _):
        inside = {name for name, module in asked.model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
        assert len(inside) >= 8
        assert {name for name in inside if found.is_matrix(name)} == inside
        for parameter in (f"{name}.weight" for name in inside):
            assert found.whereabouts(parameter) == asked.whereabouts(parameter)
            assert found.shape(parameter) == asked.shape(parameter)
            assert found.is_transposed(parameter) == asked.is_transposed(parameter)
        updates = updates_of([adapter], found)
        assert updates == updates_of([adapter], asked)
        assert all(isinstance(each, LowRank) for landed in updates.values() for each in landed)


@pytest.mark.parametrize("rank", [1, 8, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_merge_without_transformers_gives_the_same_bytes(tmp_path: Path, monkeypatch, rank: int, dtype: str):
    """Of every file; two adapters, one with DoRA, embeddings tied."""
    config = AutoConfig.for_model("qwen3", **SIZES, tie_word_embeddings=True)
    base = make_base(config, tmp_path / "base", dtype)
    adapters = [
        make_adapter(base, tmp_path / name, seed, r=rank, target_modules=LINEAR, use_dora=dora)
        for seed, (name, dora) in enumerate([("one", False), ("two", True)])
    ]
    merge(base, adapters, tmp_path / "plain")
    monkeypatch.setattr(plain, "KINDS", frozenset())
    merge(base, adapters, tmp_path / "asked")
    files = sorted([path.name for path in shard_paths(tmp_path / "asked")] + [INDEX, "config.json"])
    assert len(files) > 3
    assert [(tmp_path / "plain" / name).read_bytes() for name in files] == [
        (tmp_path / "asked" / name).read_bytes() for name in files
    ]


def test_whatever_is_not_plain_is_left_to_transformers(tmp_path: Path):
    """Embeddings, mixtures of experts, code of the model's own, files with names of other versions."""
    config = AutoConfig.for_model("llama", **SIZES)
    base = make_base(config, tmp_path / "base")
    whole = read_adapter(make_adapter(base, tmp_path / "whole", r=3, target_modules=["q_proj", "embed_tokens"]))
    usual = read_adapter(make_adapter(base, tmp_path / "usual", r=3, target_modules=["q_proj"]))
    assert layout_of(base, usual) is not None
    assert layout_of(base, usual, whole) is None
    mixture = make_base(QWEN3_MOE, tmp_path / "mixture")
    assert (
        layout_of(mixture, read_adapter(make_adapter(mixture, tmp_path / "m", r=3, target_modules=["q_proj"]))) is None
    )
    stored, settings = stored_of(base), json.loads((base / "config.json").read_text())
    assert plain_layout(settings | {"auto_map": {}}, stored, usual.tensors) is None
    for name in ("model.language_model.norm.weight", "layers.0.mlp.up_proj.weight", "model.norm.weight_scale_inv.x-y"):
        assert plain_layout(settings, stored | {name: stored["model.norm.weight"]}, usual.tensors) is None


def test_a_plain_merge_imports_torch_alone(tmp_path: Path):
    """As a command: neither transformers nor PEFT, whose imports take longer than such a merge."""
    base = make_base(AutoConfig.for_model("llama", **SIZES), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", r=3, target_modules=LINEAR)
    code = "import sys\nfrom pathlib import Path\nfrom sft.merging.merge import merge\n"
    code += "merge(sys.argv[1], [Path(sys.argv[2])], Path(sys.argv[3]))\nprint(*sys.modules)"
    command = [sys.executable, "-c", code, base, adapter, tmp_path / "merged"]
    loaded = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert "torch" in loaded
    assert loaded & {"transformers", "peft", "accelerate", "datasets", "pandas", "huggingface_hub"} == set()


def test_the_names_of_embeddings_are_pefts():
    """Those that `ensure_weight_tying` is about."""
    assert set(EMBEDDING_LAYER_NAMES) == EMBEDDINGS

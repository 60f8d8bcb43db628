"""The launch files are ones accelerate and DeepSpeed accept, and leave to the settings what the settings decide."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DECIDED_BY_SETTINGS = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
]


def deepspeed_values(stage: int) -> dict:
    return json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").read_text(encoding="utf-8"))


def test_the_launch_files_of_the_contract_are_shipped():
    """Contract section 9 names six."""
    assert {path.stem for path in LAUNCH_FILES} == {"single", "ddp", "zero2", "zero3", "fsdp", "multinode_zero3"}


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_launch_file(path):
    """accelerate refuses unknown keys and unknown distributed types when it reads a file."""
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(path))
    assert launch.num_processes >= 1
    # A precision here could contradict SFT_DTYPE, and next to a DeepSpeed file accelerate refuses it.
    assert launch.mixed_precision is None


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_a_deepspeed_launch_file_names_only_its_json(path):
    """accelerate refuses a launch file that repeats what the DeepSpeed file says."""
    deepspeed = yaml.safe_load(path.read_text(encoding="utf-8")).get("deepspeed_config", {})
    assert set(deepspeed) <= {"deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher"}
    if deepspeed:
        stage = 2 if path.stem == "zero2" else 3
        assert deepspeed["deepspeed_config_file"] == f"configs/deepspeed/zero{stage}.json"
        assert deepspeed["zero3_init_flag"] is (stage == 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_leaves_to_the_settings_what_they_decide(stage):
    """Batch, accumulation, clipping, precision and all of AdamW's numbers are "auto"."""
    values = deepspeed_values(stage)
    assert [values[name] for name in DECIDED_BY_SETTINGS] == ["auto"] * 4
    assert values["bf16"] == {"enabled": "auto"}
    # torch_adam: nothing to compile on the machine, where DeepSpeed's own Adam wants nvcc or a C++ compiler.
    assert values["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_knows_every_zero_option(stage):
    """DeepSpeed's own schema lists the options; a misspelt one would be ignored or refused only on the GPUs."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = set(DeepSpeedZeroConfig.model_fields) | {
        field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias
    }
    zero = deepspeed_values(stage)["zero_optimization"]
    assert set(zero) <= names
    assert DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"}).stage == stage


def test_zero2_has_the_choices_of_document_001():
    """Optimizer state in pinned CPU memory, communication behind the backward pass."""
    zero = deepspeed_values(2)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["overlap_comm"] is True


def test_fsdp_is_version_two_and_saves_whole_tensors():
    """FSDP2; whole adapter tensors in a checkpoint; activation checkpointing belongs to its setting."""
    fsdp = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    assert (fsdp["fsdp_version"], fsdp["fsdp_state_dict_type"]) == (2, "FULL_STATE_DICT")
    assert fsdp["fsdp_activation_checkpointing"] is False

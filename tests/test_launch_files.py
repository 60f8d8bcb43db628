"""The launch files are ones accelerate and DeepSpeed accept, and leave to the settings what the settings decide."""

import json
from pathlib import Path

import pytest
import yaml

from tests.launching import need_deepspeed

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DECIDED_BY_SETTINGS = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
]


ENGINES = ["zero2", "zero2_offload", "zero3"]


def deepspeed_values(engine: str) -> dict:
    return json.loads((ROOT / "configs" / "deepspeed" / f"{engine}.json").read_text(encoding="utf-8"))


def test_the_launch_files_of_the_contract_are_shipped():
    """The six of the contract, and ZeRO-2 with its optimizer in CPU memory."""
    names = {"single", "ddp", "zero2", "zero2_offload", "zero3", "fsdp", "multinode_zero3"}
    assert {path.stem for path in LAUNCH_FILES} == names


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
        engine = path.stem.removeprefix("multinode_")
        assert deepspeed["deepspeed_config_file"] == f"configs/deepspeed/{engine}.json"
        assert deepspeed["zero3_init_flag"] is (engine == "zero3")
        assert "make install-deepspeed" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("engine", ENGINES)
def test_deepspeed_leaves_to_the_settings_what_they_decide(engine):
    """Batch, accumulation, clipping, precision and all of AdamW's numbers are "auto"."""
    values = deepspeed_values(engine)
    assert [values[name] for name in DECIDED_BY_SETTINGS] == ["auto"] * 4
    assert values["bf16"] == {"enabled": "auto"}
    # torch_adam: nothing to compile on the machine, where DeepSpeed's own Adam wants nvcc or a C++ compiler; fused:
    # one kernel for all weights instead of a dozen for each.
    numbers = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    assert values["optimizer"] == {"type": "AdamW", "params": numbers | {"torch_adam": True, "fused": True}}


@pytest.mark.parametrize("engine", ENGINES)
def test_deepspeed_knows_every_zero_option(engine):
    """DeepSpeed's own schema lists the options; a misspelt one would be ignored or refused only on the GPUs."""
    need_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = set(DeepSpeedZeroConfig.model_fields) | {
        field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias
    }
    zero = deepspeed_values(engine)["zero_optimization"]
    assert set(zero) <= names
    decided = {name: value for name, value in zero.items() if value != "auto"}
    assert DeepSpeedZeroConfig(**decided).stage == int(engine[4])


def test_zero2_keeps_its_optimizer_on_the_gpus_and_a_variant_does_not():
    """A LoRA's state is small and its steps many; document 001's choice, pinned CPU memory, is a file of its own."""
    plain, moved = (deepspeed_values(engine)["zero_optimization"] for engine in ("zero2", "zero2_offload"))
    assert "offload_optimizer" not in plain
    assert moved == plain | {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert plain["overlap_comm"] is True


def test_fsdp_is_version_two_and_saves_whole_tensors():
    """FSDP2; whole adapter tensors in a checkpoint; activation checkpointing belongs to its setting."""
    fsdp = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    assert (fsdp["fsdp_version"], fsdp["fsdp_state_dict_type"]) == (2, "FULL_STATE_DICT")
    assert fsdp["fsdp_activation_checkpointing"] is False

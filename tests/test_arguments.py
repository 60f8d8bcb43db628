"""What a stage's settings become for the Trainer, on machines with several GPUs and under FSDP2."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.training_args import ParallelMode

from benchmarks.gpu.models import HostPeak
from sft.distributed.launch import Launched
from sft.environment import silence_libraries, silence_torch
from sft.models import model as models
from sft.training import arguments as made
from sft.training.arguments import reduce_in_float32, training_arguments
from tests.ladders import make_settings


@pytest.fixture
def gpus(monkeypatch):
    """So many GPUs, as far as counting them goes; the device itself is the CPU."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr("accelerate.state.is_cuda_available", lambda: count > 0, raising=False)

    made.say_unused.cache_clear()
    return see


@pytest.mark.parametrize("count", [1, 2, 8])
def test_one_process_trains_on_one_of_several_gpus(tmp_path, gpus, capsys, count):
    """TRL refuses DataParallel, which the Trainer takes for every GPU it can see; the others are named once."""
    gpus(count)
    settings = make_settings(tmp_path, report_to="none", per_device_train_bs=3)
    for _ in range(2):
        arguments = training_arguments(settings, tmp_path, checkpointing=False, evaluated=False, resumed=False)
    assert (arguments.n_gpu, arguments.parallel_mode) == (1, ParallelMode.NOT_PARALLEL)
    assert (arguments.train_batch_size, arguments.device.type) == (3, "cuda")
    said = capsys.readouterr().out
    assert said.count(f"{count} GPUs are visible, this run uses 1") == (count > 1)
    assert (f"--num_processes {count} train.py" in said) == (count > 1)


@pytest.mark.parametrize(("format", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_fsdp_adds_gradients_up_in_float32(format, dtype):
    """accelerate's policy would reduce in the compute type and round log-probabilities to it."""
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=None)
    reduce_in_float32(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=format))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, None)


def test_without_fsdp_or_in_float32_no_policy_is_set():
    """float32 training and launches without FSDP keep what accelerate chose."""
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=None)
    reduce_in_float32(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no"))
    reduce_in_float32(SimpleNamespace(state=SimpleNamespace(), mixed_precision="bf16"))
    assert plugin.mixed_precision_policy is None


@pytest.mark.parametrize(
    ("gpu", "sharding", "bits", "placed"),
    [(True, "none", None, True), (True, "zero2", None, True), (True, "zero3", None, False), (True, "fsdp", None, False),
     (False, "none", None, False), (False, "none", 4, True)],
)  # fmt: skip
def test_models_are_loaded_onto_their_device(tmp_path, monkeypatch, gpu, sharding, bits, placed):
    """Eight ranks of one machine would hold eight copies in main memory otherwise; split weights stay there."""
    asked = {}
    device = torch.device("cuda:1" if gpu else "cpu")
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: gpu)
    launch = SimpleNamespace(splits_weights=sharding in ("zero3", "fsdp"), processes=2)
    monkeypatch.setattr(models, "launched", lambda: launch)
    monkeypatch.setattr(models, "PartialState", lambda: SimpleNamespace(device=device))
    loaded = (torch.nn.Linear(1, 1), {"missing_keys": set(), "unexpected_keys": set()})
    monkeypatch.setattr(
        models.AutoModelForCausalLM, "from_pretrained", lambda source, **how: asked.update(how) or loaded
    )
    settings = make_settings(tmp_path, dtype="bfloat16", **({"load_in_4bit": 1} if bits else {}))
    models.load_model("somewhere", settings)
    assert asked.get("device_map") == ({"": device} if placed else None)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_loading_onto_a_device_takes_no_main_memory_of_the_models_size(tmp_path, monkeypatch):
    """Shard by shard: a model of 52 MB in six files ends on its device, this process's own memory grows by less than a
    quarter of it on the way, so that N ranks hold no N copies. A device without memory stands for the GPU."""
    config = AutoConfig.for_model(
        "qwen3", vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base", max_shard_size="10MB")
    files = list((tmp_path / "base").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert (len(files), round(size / 1e6)) == (6, 52)
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: True)
    with HostPeak() as host:
        loaded = models.load_model(
            tmp_path / "base", make_settings(tmp_path, dtype="float32"), device=torch.device("meta")
        )
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    assert host.bytes - host.start < size / 4


def test_the_cores_of_a_machine_are_shared_among_its_ranks(monkeypatch):
    """accelerate gives each of them one thread: four ranks on 32 cores take eight, one process all of torch's."""
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    for processes, threads in ((4, [8]), (1, [])):
        monkeypatch.setattr("sft.environment.launched", lambda count=processes: Launched(0, count, count))
        taken.clear()
        silence_torch()
        assert taken == threads


@pytest.mark.parametrize(
    ("given", "then"), [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_threads_that_wait_give_their_core_away(given: dict[str, str], then: str):
    """Said before torch, and so OpenMP, is loaded; a person's own choice stays. In a program of its own."""
    code = "import os, sys; from sft.environment import silence_libraries; silence_libraries()"
    code += "; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], env=environ | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [then, "False"]


def test_memory_grows_in_blocks_unless_the_person_says_otherwise(monkeypatch):
    """Set before torch is imported, by either of the names torch reads."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    silence_libraries()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    silence_libraries()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")

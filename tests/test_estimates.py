"""The memory estimate for GPUs against what is known of their peaks, from configurations alone."""

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen3MoeConfig

from sft.distributed.launch import Launched
from sft.planning.activations import BatchShape, Device
from sft.planning.memory import estimate

pytestmark = pytest.mark.slow
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=32000,
)  # fmt: skip
QWEN_30B = Qwen3MoeConfig(
    hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
)  # fmt: skip
GEMMA_9B = Gemma2Config(
    hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8,
    head_dim=256, vocab_size=256000, sliding_window=4096,
)  # fmt: skip
ALONE, ZERO2 = Launched(0, 1), Launched(0, 4, 4, "zero2", deepspeed=True)


@pytest.mark.parametrize(
    ("config", "rows", "length", "checkpointing", "launch", "given", "gib"),
    [
        # torchtune's table of its LoRA recipe on one card (16.2 GiB measured; its batch is not stated).
        (LLAMA_8B, 2, 512, True, ALONE, {"lora_r": 8}, 16.2),
        # By hand from the sizes: weights, states and kept vectors as listed in the reading of the GPU paths.
        (LLAMA_8B, 2, 2048, True, ALONE, {"lora_r": 8}, 18.6),
        (LLAMA_8B, 4, 4096, False, ALONE, {"lora_r": 8}, 92.9),
        (LLAMA_70B, 1, 2048, True, ALONE, {"lora_r": 8, "load_in_4bit": True}, 38.6),
        (QWEN_30B, 1, 1536, True, ZERO2, {}, 62.4),
        # All scores are kept, heads x tokens x tokens in float32 and bfloat16: the eager attention of soft caps.
        (GEMMA_9B, 2, 2048, False, ALONE, {"lora_r": 8}, 116.5),
    ],
    ids=["8B", "8B-long", "8B-whole", "70B-4bit", "30B-mixture", "9B-soft-caps"],
)
def test_on_a_gpu_the_estimate_is_within_a_tenth_of_what_is_known(
    make_settings: Any,
    config: Any,
    rows: int,
    length: int,
    checkpointing: bool,
    launch: Launched,
    given: Any,
    gib: float,
):
    """From the configuration alone, as on an 80 GB card in bfloat16 with the fused head; NCCL's share left out."""
    settings = make_settings(dtype="bfloat16", **given)
    batch = BatchShape(rows * length, rows * length // 2, rows=rows)
    device = Device(torch.bfloat16, fused_head=True)
    need = estimate(
        config, settings, batch, checkpointing=checkpointing, launch=launch, available=80 * 10**9, device=device
    )
    nccl = 2**30 if launch.processes > 1 else 0
    assert (need.training - nccl) / 2**30 == pytest.approx(gib, rel=0.1)

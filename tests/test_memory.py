"""The memory estimate: exact parameter counts, one step counted on shapes, what is shared out among devices."""

import logging

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3MoeConfig

from sft.distributed.launch import Launched, launched
from sft.evaluation.at_once import AnswerBatch
from sft.models.isolation import keep_rows_apart
from sft.models.model import quantization
from sft.planning.activations import (
    Activations,
    BatchShape,
    Device,
    Tally,
    activation_bytes,
    kept_by_attention,
    with_adapter,
)
from sft.planning.memory import Estimate, estimate, optimizer_bytes, parameter_bytes
from sft.planning.need import COMFORTABLE, advice, checkpointing_needed, shortage
from sft.settings import load_settings
from sft.settings.schema import NAMES
from sft.settings.values import QUANTISING
from sft.training.batches import EpochBatches, Order, largest_items
from sft.training.loss import token_cross_entropy

CPU = Device(torch.float32, fused_head=False)
HIDDEN, WIDE, LAYERS, WORDS = 64, 160, 6, 512
BATCH = BatchShape(tokens=192, trained=64, rows=3)


@pytest.fixture(autouse=True)
def no_buffers(monkeypatch):
    """What libraries hold besides tensors is left out, so that sums can be made by hand."""
    for name in ("_CPU_BUFFERS", "_CPU_HALVES", "_CUBLAS", "_NCCL"):
        monkeypatch.setattr(f"sft.planning.memory.{name}", 0)


@pytest.fixture
def settings(tmp_path):
    def load(**values):
        lines = {"base_model": "org/model", "out_lora_dir": tmp_path / "out", "dataset_id": "rows.jsonl"} | values
        (tmp_path / "stage1.env").write_text("".join(f"SFT_{name.upper()}='{v}'\n" for name, v in lines.items()))
        return load_settings(1, env_dir=tmp_path, environ={})

    return load


def dense(**values):
    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=WORDS, max_position_embeddings=512, **values,
    )  # fmt: skip


def mixture():
    return Qwen3MoeConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=WORDS,
        max_position_embeddings=512,
    )  # fmt: skip


# By hand: query and output 64 x 64, key and value 64 x 32, three 64 x 160 matrices, two norms.
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * 32 + 3 * HIDDEN * WIDE + 2 * HIDDEN
MODEL = LAYERS * LAYER + HIDDEN + 2 * WORDS * HIDDEN
ADAPTER = LAYERS * 16 * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + 32) + 3 * (HIDDEN + WIDE))


def test_parameters_are_counted_as_they_would_be_loaded(settings):
    """Frozen weights and the rank 16 adapter of a Llama, computed by hand, in float32."""
    counted = parameter_bytes(dense(), settings(dtype="float32"))
    assert (counted.frozen, counted.trained, counted.trained_count) == (4 * MODEL, 4 * ADAPTER, ADAPTER)
    assert counted.largest_layer == 4 * (LAYER + ADAPTER // LAYERS)


def test_bfloat16_weights_take_half_and_the_adapter_stays_float32(settings):
    """2 bytes for each frozen parameter, 4 for each of the adapter's."""
    counted = parameter_bytes(dense(), settings(dtype="bfloat16"))
    assert (counted.frozen, counted.trained) == (2 * MODEL, 4 * ADAPTER)


def test_tied_embeddings_count_once(settings):
    """The head has no weights of its own."""
    counted = parameter_bytes(dense(tie_word_embeddings=True), settings(dtype="float32"))
    assert counted.frozen == 4 * (MODEL - WORDS * HIDDEN)


def test_expert_adapters_are_counted(settings):
    """Four experts with fused gate and up projections: rank 16 per expert on (64 -> 64) and (32 -> 64)."""
    counted = parameter_bytes(mixture(), settings(dtype="float32"))
    attention = 16 * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + 32))
    experts = 4 * 16 * ((HIDDEN + 2 * 32) + (32 + HIDDEN))
    only_attention = parameter_bytes(
        mixture(), settings(dtype="float32", lora_target_modules="q_proj,k_proj,v_proj,o_proj")
    )
    assert only_attention.trained_count == LAYERS * attention
    assert counted.trained_count >= LAYERS * (attention + experts)


@pytest.mark.parametrize(
    ("given", "width"),
    [
        ({"load_in_4bit": 1}, 0.5 + 1 / 64 + 4 / (64 * 256)),
        ({"load_in_4bit": 1, "bnb_4bit_use_double_quant": 0}, 0.5 + 4 / 64),
        ({"load_in_8bit": 1}, 1.0),
    ],
)
def test_quantisation_leaves_embeddings_head_and_norms(settings, given, width):
    """The linear layers shrink; embeddings, output head and norms stay bfloat16, the adapter float32."""
    counted = parameter_bytes(dense(), settings(dtype="bfloat16", **given))
    linear = LAYERS * (LAYER - 2 * HIDDEN)
    assert counted.frozen == pytest.approx(width * linear + 2 * (MODEL - linear), rel=1e-4)
    assert counted.trained == 4 * ADAPTER


def test_no_quantisation_is_forgotten(settings):
    """Each asks the library for something of its own, and takes less than the one before it."""
    chosen = [settings(dtype="bfloat16", **{NAMES[name]: 1}) for name in QUANTISING]
    frozen = [parameter_bytes(dense(), each).frozen for each in (settings(dtype="bfloat16"), *chosen)]
    assert frozen == sorted(set(frozen), reverse=True)
    asked = [quantization(each) for each in chosen]
    assert None not in asked
    assert len({str(each.to_dict()) for each in asked}) == len(QUANTISING)


def test_full_fine_tuning_has_no_adapter(settings):
    """4 bytes of weights, 4 of gradients and 8 of AdamW's state for each parameter."""
    need = estimate(dense(), settings(dtype="float32", use_lora=0), BATCH, checkpointing=False, available=10**9)
    assert (need.adapter, need.weights, need.gradients, need.optimizer) == (0, 4 * MODEL, 4 * MODEL, 8 * MODEL)


@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("adamw_torch_4bit", 1), ("paged_adamw_8bit", 0), ("sgd", 0),
        ("adafactor", 0), ("lion_32bit", 4), ("rmsprop", 4), ("schedule_free_sgd", 4), ("ademamix", 12),
    ],
)  # fmt: skip
def test_optimizer_state(settings, monkeypatch, name, bytes_per_parameter):
    """Bytes per trained parameter by the optimizer's name, as if its package were installed."""
    monkeypatch.setattr("sft.settings.values.find_spec", lambda package: object())
    chosen = settings(optim=name, dtype="float32")
    counted = parameter_bytes(dense(), chosen)
    assert optimizer_bytes(counted, chosen, Launched(0, 1)) == bytes_per_parameter * ADAPTER


def test_zero_stages_share_out_one_part_after_another(settings, monkeypatch):
    """Four devices: stage 1 the optimizer, stage 2 gradients as well, stage 3 everything; off-loading empties it."""
    monkeypatch.setattr("sft.planning.memory.activation_bytes", lambda *step, **how: Activations(1000, traced=True))
    chosen = settings(dtype="float32")

    def need(**launch):
        return estimate(dense(), chosen, BATCH, checkpointing=False, launch=Launched(0, 4, 4, **launch), available=1)

    alone = estimate(dense(), chosen, BATCH, checkpointing=False, launch=Launched(0, 1), available=1)
    one, two, three = (need(sharding=f"zero{stage}", deepspeed=True) for stage in (1, 2, 3))
    assert [each.optimizer for each in (one, two, three)] == [12 * ADAPTER // 4] * 3
    assert [each.gradients for each in (alone, one, two, three)] == [4 * ADAPTER] * 2 + [ADAPTER] * 2
    assert [each.weights for each in (one, two)] == [4 * MODEL] * 2
    assert three.weights == MODEL + 2 * 4 * (LAYER + ADAPTER // LAYERS)
    assert need(sharding="zero2", deepspeed=True, offload=frozenset({"optimizer"})).optimizer == 0
    assert need().gradients == 2 * 4 * ADAPTER
    assert {each.activations for each in (alone, one, two, three)} == {alone.activations}


@pytest.mark.parametrize("sharding", ["zero3", "fsdp"])
def test_auto_checkpointing_knows_what_is_shared_out(settings, monkeypatch, sharding):
    """Eight devices hold an eighth of weights and optimizer each: a step fits without checkpointing where one device
    alone would need it; activations are not shared out."""
    monkeypatch.setattr("sft.planning.memory.activation_bytes", lambda *step, **how: Activations(1000, traced=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    chosen = settings(dtype="float32", use_lora=0)
    shared = Launched(0, 8, 8, sharding, deepspeed=sharding == "zero3")
    alone = Launched(0, 1)
    needs = [
        estimate(dense(), chosen, BATCH, checkpointing=False, launch=launch, available=1).training
        for launch in (alone, shared)
    ]
    whole = 4 * MODEL
    adam = 3 * whole if sharding == "zero3" else 2 * whole
    assert needs == [4 * whole + 1000, (2 * whole + adam) // 8 + 2 * 4 * LAYER + 1000]
    monkeypatch.setattr("sft.planning.need.available_bytes", lambda processes: sum(needs) // 2)
    for launch, expected in ((alone, True), (shared, False)):
        for place in ("need", "memory"):
            monkeypatch.setattr(f"sft.planning.{place}.launched", lambda launch=launch: launch)
        assert checkpointing_needed(dense(), chosen, BATCH) is expected


def test_a_gpu_has_room_for_cublas_and_several_for_nccl(settings, monkeypatch):
    """Beside the tensors: one workspace on every GPU, buffers of NCCL where processes talk."""
    monkeypatch.setattr("sft.planning.memory.activation_bytes", lambda *step, **how: Activations(1000, traced=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("sft.planning.memory._CUBLAS", 7)
    monkeypatch.setattr("sft.planning.memory._NCCL", 100)
    needs = [
        estimate(dense(), settings(dtype="float32"), BATCH, checkpointing=False, launch=Launched(0, count), available=1)
        for count in (1, 2)
    ]
    assert [need.activations - 1000 for need in needs] == [7, 107]


def test_the_total_has_the_larger_of_training_and_generation(settings, monkeypatch):
    """Activations are gone while answers are made, so the larger of the two counts."""
    monkeypatch.setattr("sft.planning.memory.activation_bytes", lambda *step, **how: Activations(1000, traced=False))
    chosen = settings(dtype="float32")
    without, with_cache = (
        estimate(dense(), chosen, BATCH, checkpointing=False, available=1, answers=answers)
        for answers in (None, AnswerBatch(rows=8, tokens=100))
    )
    cache = 2 * 8 * 100 * 2 * 16 * LAYERS * 4
    assert (without.generation, with_cache.generation) == (0, cache)
    assert without.total == without.training == with_cache.training
    assert with_cache.total == without.total - without.activations + cache
    assert with_cache.record()["activations_by"] == "a rule of thumb"


def test_code_that_needs_values_gets_the_rule_of_thumb_and_says_so(settings, monkeypatch):
    """As a model does whose code looks at the numbers in its tensors."""

    def fail(*step, **how):
        raise NotImplementedError("data-dependent")

    monkeypatch.setattr("sft.planning.activations._peak", fail)
    chosen = settings(dtype="float32")
    found = activation_bytes(dense(), chosen, BATCH, device=CPU, checkpointing=False)
    kept = LAYERS * (14 * HIDDEN + 6 * WIDE)
    assert found == (BATCH.tokens * kept * 4 + BATCH.trained * WORDS * 16, False)


def test_launch_environment():
    """What accelerate puts into the environment of DeepSpeed, FSDP and plain launches."""
    assert launched({}) == Launched(0, 1)
    place = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert launched(place) == Launched(3, 8, 4)
    zero = place | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert launched(zero) == Launched(3, 8, 4, "zero3", deepspeed=True)
    zero |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero2_offload.json"}
    assert launched(zero) == Launched(3, 8, 4, "zero2", deepspeed=True, offload=frozenset({"optimizer"}))
    assert launched(place | {"ACCELERATE_USE_FSDP": "true"}) == Launched(3, 8, 4, "fsdp")


def measured(config, settings, batch, checkpointing):
    """The same step on real tensors with real attention, counted while it runs."""
    logging.disable(logging.WARNING)
    bare = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    isolation = keep_rows_apart(bare, settings)
    model = with_adapter(bare, settings).train()
    logging.disable(logging.NOTSET)
    if checkpointing:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        bare.enable_input_require_grads()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    positions = torch.arange(batch.tokens // batch.rows).repeat(batch.rows)[None]
    kept = torch.arange(batch.trained)
    with Tally(model) as tally:
        (inputs,) = isolation.passes({"input_ids": torch.zeros_like(positions), "position_ids": positions})
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits.squeeze(0)
        loss = token_cross_entropy(logits, torch.zeros_like(kept)).sum()
        del logits
        loss.backward()
    return tally.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [dense(), mixture()], ids=["dense", "mixture"])
def test_a_step_of_shapes_takes_what_a_real_step_takes(settings, config, checkpointing):
    """Within 2 % of the tensors alive at the peak of a real step: joined rows row by row, adapter on everything, keys
    and values of grouped heads repeated, as the CPU's kernel keeps them."""
    chosen = settings(dtype="float32")
    expected = measured(config, chosen, BATCH, checkpointing)
    found = activation_bytes(config, chosen, BATCH, device=CPU, checkpointing=checkpointing)
    assert found.size == pytest.approx(expected, rel=0.02)
    assert found.traced


def test_dropout_makes_attention_on_the_cpu_keep_its_scores(settings):
    """GPT-2 as it is published drops a tenth of them, which no fused kernel of the CPU does; a GPU's keeps no more."""
    config = GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=4, vocab_size=WORDS)
    chosen = settings(dtype="float32", lora_target_modules="c_attn,c_proj,c_fc")
    expected = measured(config, chosen, BATCH, checkpointing=False)
    found = activation_bytes(config, chosen, BATCH, device=CPU, checkpointing=False)
    assert found.size == pytest.approx(expected, rel=0.02)


def test_checkpointing_is_turned_on_only_where_it_must(settings, monkeypatch):
    """auto: above 90 % of what is available, and not below."""
    monkeypatch.setattr(
        "sft.planning.memory.activation_bytes", lambda *step, **how: Activations(1_000_000, traced=True)
    )
    chosen = settings(dtype="float32")
    need = estimate(dense(), chosen, BATCH, checkpointing=False, available=1).total
    monkeypatch.setattr("sft.planning.need.available_bytes", lambda processes: round(need / COMFORTABLE) + 1024)
    assert not checkpointing_needed(dense(), chosen, BATCH)
    monkeypatch.setattr("sft.planning.need.available_bytes", lambda processes: round(need / COMFORTABLE) - 1024)
    assert checkpointing_needed(dense(), chosen, BATCH)


def test_largest_micro_batch_is_the_one_the_epoch_has(settings):
    """Against a walk through the batches of both ranks in both epochs."""
    chosen = settings(per_device_train_bs=3, epochs=2, seed=5)
    lengths = np.random.default_rng(0).integers(5, 200, 50)
    batches = [EpochBatches(Order(50, seed=5), batch_size=3, rank=rank, ranks=2) for rank in (0, 1)]
    sums = []
    for epoch in (0, 1):
        for batch in batches:
            batch.set_epoch(epoch)
            sums += [lengths[np.array(keys) % 50].sum() for keys in batch]
    rows = datasets.Dataset.from_dict({"length": lengths})
    assert lengths[largest_items(rows, chosen, processes=2)].sum() == max(sums)


def test_advice_keeps_the_order_of_document_004(settings):
    """Batch and accumulation, rank, quantisation, checkpointing; and only what is not done already."""
    assert advice(settings(per_device_train_bs=4, grad_accum=4)) == (
        "in this order: SFT_PER_DEVICE_TRAIN_BS=2 with SFT_GRAD_ACCUM=8; SFT_LORA_R=8; SFT_LOAD_IN_8BIT=1 or "
        "SFT_LOAD_IN_4BIT=1; SFT_GRADIENT_CHECKPOINTING=1; SFT_MAX_SEQ_LEN below 2048; more devices with "
        "configs/accelerate/zero3.yaml"
    )
    assert advice(settings(), answering=True).startswith("in this order: SFT_GEN_BATCH_SIZE=4; SFT_PER_DEVICE")
    small = settings(per_device_train_bs=1, lora_r=8, load_in_4bit=1, gradient_checkpointing=1)
    assert advice(small).startswith("in this order: SFT_MAX_SEQ_LEN below 2048")
    assert "SFT_LORA_R=8; SFT_LOAD_IN_4BIT=1 instead of SFT_LOAD_IN_8BIT=1; SFT_G" in advice(settings(load_in_8bit=1))
    need = Estimate(weights=2**30, adapter=0, optimizer=0, gradients=2**29, activations=0, available=1)
    assert shortage(need, small).startswith("Out of memory: 1.5 GiB were estimated. Change in this order: ")


@pytest.mark.parametrize(("attn", "kept"), [("auto", "states"), ("sdpa", "mask"), ("eager", "scores")])
def test_what_attention_keeps_is_what_it_will_be(settings, attn, kept):
    """`auto` attends row by row; a model without sdpa keeps all its scores, whatever SFT_ATTN=auto promises."""
    assert kept_by_attention(dense(), settings(attn=attn, dtype="float32")) == kept
    capped = Gemma2Config(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=WORDS, sliding_window=64,
    )  # fmt: skip
    if attn == "auto":
        assert kept_by_attention(capped, settings(dtype="float32")) == "scores"


def test_memory_grows_with_the_rows_and_not_with_their_square(settings):
    """On the CPU 8 times the rows of a length take 8 times the activations, a tenth more or less."""
    chosen = settings(dtype="float32")
    sizes = [
        activation_bytes(
            dense(), chosen, BatchShape(64 * rows, 16 * rows, rows=rows), device=CPU, checkpointing=False
        ).size
        for rows in (16, 128)
    ]
    assert sizes[1] == pytest.approx(8 * sizes[0], rel=0.1)

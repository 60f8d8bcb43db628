"""Items memory, loading and answers: peaks against the estimate, onto the device shard by shard, batches of answers."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from benchmarks.common import ROOT
from benchmarks.gpu.job import Job
from benchmarks.gpu.shapes import GEMMA, LARGE, LLAMA, MISTRAL, MIXTURE, QWEN, built, shape
from benchmarks.gpu.steps import settings_of, trainer_of
from sft.evaluation.answers import generate_answers
from sft.models.model import load_model, weight_dtype
from sft.planning.activations import BatchShape
from sft.planning.memory import estimate, parameter_bytes
from sft.programs.benchmark import random_model
from sft.programs.benchmark_shapes import model_config

# What, shape, layers (None: all), rows of 2,048, settings, seconds it may take.
CASES: list[tuple[str, str, int | None, int, dict[str, Any], float]] = [
    ("Qwen3-4B", QWEN, None, 2, {"gradient_checkpointing": "0"}, 8),
    ("Qwen3-4B, checkpointing", QWEN, None, 2, {"gradient_checkpointing": "1"}, 8),
    ("Llama-3.1-8B", LLAMA, None, 2, {"gradient_checkpointing": "1"}, 10),
    ("gemma-2-2b", GEMMA, None, 2, {"gradient_checkpointing": "1"}, 8),
    ("Mistral-7B in 4 bits", MISTRAL, None, 2, {"gradient_checkpointing": "1", "load_in_4bit": True}, 15),
    ("Mistral-7B in 8 bits", MISTRAL, None, 2, {"gradient_checkpointing": "1", "load_in_8bit": True}, 15),
    ("Qwen3-30B-A3B, 6 layers", MIXTURE, 6, 1, {"gradient_checkpointing": "1"}, 8),
    ("Qwen3-30B-A3B, 12 layers", MIXTURE, 12, 1, {"gradient_checkpointing": "1"}, 10),
    ("Llama-2-70B in 4 bits", LARGE, None, 1, {"gradient_checkpointing": "1", "load_in_4bit": True}, 45),
]


def memory(job: Job) -> None:
    """The peak of a step against the estimate of --check: within a tenth, and never more than 5 % above it."""
    totals: dict[str, int] = {}
    for what, name, layers, rows, values, seconds in CASES:
        if ("load_in_4bit" in values or "load_in_8bit" in values) and job.lacks(what, "bitsandbytes"):
            continue
        if job.has_time(what, seconds):
            config = shape(job, name, layers)
            settings = settings_of(job, name, per_device_train_bs=rows, **values)
            peak, expected = step_peak(job, config, settings, rows=rows, length=job.size(2048, 16))
            totals[what] = peak
            job.figure(f"{what}: peak", peak, "bytes")
            job.figure(f"{what}: estimate", expected, "bytes")
            job.check(f"{what}: peak of the estimate", peak / expected, "<= 1.05", of_gpu=True)
            job.check(f"{what}: peak of the estimate", peak / expected, ">= 0.9", of_gpu=True)
            job.forget()
    if {CASES[6][0], CASES[7][0]} <= totals.keys():
        few, many = totals[CASES[6][0]], totals[CASES[7][0]]
        whole = few + (many - few) * (model_config(MIXTURE).num_hidden_layers - 6) / 6
        job.figure("Qwen3-30B-A3B, 48 layers by extrapolation: peak", whole, "bytes")


def step_peak(job: Job, config: Any, settings: Any, *, rows: int, length: int) -> tuple[int, int]:
    """Bytes at the peak of two steps, the model included, and what was estimated before."""
    checkpointing = settings.gradient_checkpointing == "1"
    batch = BatchShape(rows * length, rows * (length - 1), rows=rows)
    need = estimate(copy.deepcopy(config), settings, batch, checkpointing=checkpointing)
    trainer = trainer_of(job, built(job, config, settings), settings, length=length)
    taken = job.peak(trainer.train)
    held = torch.cuda.max_memory_allocated() if job.device.type == "cuda" else taken
    return held, need.total


def own_bytes() -> int:
    """Main memory that is this process's own: pages of mapped files count for nobody, the system takes them back."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


class HostPeak:
    """The most main memory this process has taken while it was on, looked at every few milliseconds."""

    def __enter__(self) -> HostPeak:
        self.start = self.bytes = own_bytes()
        self.on = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.on:
            self.bytes = max(self.bytes, own_bytes())
            time.sleep(0.005)

    def __exit__(self, *error: object) -> None:
        self.on = False
        self.thread.join()


def loading(job: Job) -> None:
    """8B from a local disk: seconds, main memory, device; then in 4 bits."""
    config = shape(job, LLAMA)
    settings = settings_of(job, LLAMA)
    folder = job.folder / "model"
    model = random_model(config, weight_dtype(settings))
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(folder, max_shard_size="2GB")
    del model
    job.forget()
    kinds: dict[str, tuple[dict[str, Any], float]] = {"as it is": ({}, 12), "in 4 bits": ({"load_in_4bit": True}, 12)}
    kept: list[Any] = []
    for name, (values, seconds) in kinds.items():
        if (values and job.lacks(name, "bitsandbytes")) or not job.has_time(name, seconds):
            continue
        these = settings_of(job, LLAMA, **values)
        parameters = parameter_bytes(copy.deepcopy(config), these)
        with HostPeak() as host:
            start = time.perf_counter()
            extra = job.peak(lambda these=these: kept.append(load_model(folder, these)))
            job.figure(f"{name}: loaded in", time.perf_counter() - start, "s")
        taken = host.bytes - host.start
        job.check(f"{name}: main memory, of the model", taken / size, "<= 0.25", of_gpu=True)
        # As it is: a tensor beside its copy; in 4 bits: what was quantised, and one layer that is being.
        room = 2**30 if not values else parameters.largest_layer
        job.check(f"{name}: device beyond the weights", extra - parameters.frozen, f"<= {room}", "bytes", of_gpu=True)
        kept.clear()
        job.forget()


def answers(job: Job) -> None:
    """64 prompts of 64 new tokens, at 8 and at 64: transformers' own answers, ms a token; training stays as it was."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "official_content" / "demo" / "model")
    prompts = [f"Convert this row: {'name and size, ' * (1 + number % 7)}{number}" for number in range(job.size(64, 6))]
    # In float32, six layers: with random weights the two best words are close, and bfloat16 would toss for them.
    exact = random_model(shape(job, QWEN, 6), torch.float32).train()
    before = [module.training for module in exact.modules()], torch.get_rng_state()
    theirs = transformers_answers(job, exact, tokenizer, prompts)
    for together in job.size((8, 64), (2, 6)):
        found, _ = our_answers(job, exact, tokenizer, prompts, together)
        same = sum(a == b for a, b in zip(found, theirs.texts, strict=True)) / len(prompts)
        job.check(f"{together} at a time: the same answers", same, job.size(">= 0.95", ">= 1"))
    after = [module.training for module in exact.modules()], torch.get_rng_state()
    kept = before[0] == after[0] and torch.equal(before[1], after[1])
    job.check("modes and random states as before", float(kept), ">= 1")
    del exact
    job.forget()
    model = random_model(shape(job, QWEN), job.dtype).train()
    new = job.size(64, 5)
    theirs = transformers_answers(job, model, tokenizer, prompts)
    for together in job.size((8, 64), (2, 6)):
        _, seconds = our_answers(job, model, tokenizer, prompts, together)
        job.figure(f"{together} at a time: a token", 1000 * seconds / (-(-len(prompts) // together) * new), "ms")
        job.figure(f"{together} at a time", len(prompts) * new / seconds, "tokens/s")
        if together == len(prompts):
            job.check("all at once: time, of transformers'", seconds / theirs.seconds, "<= 1.05", of_gpu=True)
    if job.has_time("generate_batch", 20):
        beside_generate_batch(job, model, tokenizer, prompts)


def beside_generate_batch(job: Job, model: Any, tokenizer: Any, prompts: list[str]) -> None:
    """transformers' continuous batching, paged and with CUDA graphs: a figure beside ours, which does not use it."""
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    new = job.size(64, 5)
    how = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    small = small_cache() if job.rehearse else {}
    model.eval()
    job.wait()
    start = time.perf_counter()
    try:
        found = model.generate_batch(inputs=ids, generation_config=how, **small)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        job.skip("generate_batch", f"{type(error).__name__}: {error}")
        return
    job.wait()
    seconds = time.perf_counter() - start
    made = [each.generated_tokens for each in found.values()]
    if len(made) < len(prompts) or not all(made):
        job.skip("generate_batch", f"{sum(map(bool, made))} of {len(prompts)} answers came back")
        return
    job.figure("generate_batch, all at once", len(prompts) * new / seconds, "tokens/s")


def small_cache() -> dict[str, Any]:
    """By itself it takes nearly all the memory of a device, which on a CPU is a minute of writing zeros."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=64)}


def our_answers(job: Job, model: Any, tokenizer: Any, prompts: list[str], together: int) -> tuple[list[str], float]:
    """The texts, and how long they took."""
    job.wait()
    start = time.perf_counter()
    found = generate_answers(model, tokenizer, prompts, max_new_tokens=job.size(64, 5), batch_size=together)
    job.wait()
    return [each.text for each in found], time.perf_counter() - start


def transformers_answers(job: Job, model: Any, tokenizer: Any, prompts: list[str]) -> SimpleNamespace:
    """All prompts at once, padded, through `generate` alone."""
    model.eval()
    asked = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    asked = {name: asked[name].to(job.device) for name in ("input_ids", "attention_mask")}
    ends = sorted({tokenizer.eos_token_id, model.generation_config.eos_token_id or 0})
    start = time.perf_counter()
    ids = model.generate(
        **asked, max_new_tokens=job.size(64, 5), do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    job.wait()
    seconds = time.perf_counter() - start
    model.train()
    texts = tokenizer.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return SimpleNamespace(seconds=seconds, texts=texts)

"""Item machine: what --check says of it, a kernel that is built here, quantised products, one of two GPUs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.job import Job, distance
from benchmarks.gpu.steps import settings_of
from sft.environment import triton_missing
from sft.planning.machine import devices
from sft.training.arguments import training_arguments


def machine(job: Job) -> None:
    """Nothing broken, Triton builds, bitsandbytes answers, pynvml reads, two faked devices give one."""
    # Not what packages are missing: items say that themselves.
    problems = [finding.text for finding in devices() if finding.state == "broken"]
    for problem in problems:
        job.skip("--check", problem)
    job.check("broken by --check", len(problems), "<= 0", of_gpu=True)
    if missing := triton_missing():
        job.skip("Triton", f"{', '.join(missing)} missing")
    elif not job.rehearse:
        job.check("a Triton kernel: difference", triton_difference(job), "<= 0.02")
    for bits in (4, 8):
        if not job.lacks(f"{bits} bits", "bitsandbytes"):
            job.check(f"{bits} bits: difference to the matrix", quantised_difference(job, bits), "<= 0.2")
    if not job.rehearse:
        job.check("power read by pynvml", power(), ">= 1", "W")
    folder = job.folder / "arguments"
    with mock.patch.object(torch.cuda, "device_count", lambda: 2):
        settings = settings_of(job, "none")
        args = training_arguments(settings, folder, checkpointing=False, evaluated=False, resumed=False)
        job.check("GPUs of a run that sees two", args.n_gpu, job.size("<= 1", "<= 0"))
    if not job.lacks("DeepSpeed", "deepspeed"):
        import deepspeed

        job.figure("DeepSpeed imports", float(deepspeed.__version__ is not None))


def triton_difference(job: Job) -> float:
    """Our own kernel for products in groups, built on this machine, beside plain products."""
    from sft.models import grouped_kernels

    counts, size = (100, 0, 28), 64
    rows = torch.randn(sum(counts), size, device=job.device, dtype=job.dtype)
    matrices = torch.randn(len(counts), size, size, device=job.device, dtype=job.dtype) / size**0.5
    ends = torch.tensor(counts, device=job.device).cumsum(0).to(torch.int32)
    parts = [part.float() @ matrix.float() for part, matrix in zip(rows.split(counts), matrices, strict=True)]
    return distance(grouped_kernels.rows(rows, matrices, ends), torch.cat(parts))


def quantised_difference(job: Job, bits: int) -> float:
    """A product with a quantised matrix beside that with the matrix itself, as a share of the largest value."""
    import bitsandbytes

    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 64, bias=False)
    kinds: dict[int, Any] = {
        4: lambda: bitsandbytes.nn.Linear4bit(256, 64, bias=False, compute_dtype=job.dtype, quant_type="nf4"),
        8: lambda: bitsandbytes.nn.Linear8bitLt(256, 64, bias=False, has_fp16_weights=False),
    }
    layer = kinds[bits]()
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(job.device)
    x = torch.randn(8, 256, device=job.device, dtype=job.dtype)
    return distance(layer(x).float(), plain.to(job.device)(x.float()))


def power() -> float:
    """Watts of the first card."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1000

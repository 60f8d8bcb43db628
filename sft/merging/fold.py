"""Adding adapters to one tensor of a checkpoint, a few rows at a time, in float32, rounded once.

Every step is PEFT's own (B A, times scaling, plus W; DoRA's rescaling of rows), in its order, so that the result is
bit for bit what PEFT computes on a model loaded in float32. Blocks are small enough to stay in the processor's cache.
"""

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft.errors import RunFailed
from sft.merging.adapter_files import LowRank, factors
from sft.merging.weights import DTYPES, StoredTensor, load, read_bytes, write_bytes
from sft.storage.atomic import sync

BLOCK = 256 * 1024  # elements folded at once: 1 MiB of float32 weights beside 1 MiB of update
SAMPLE = 16 * 1024  # elements of each job that the loss by rounding is estimated from
COPIED = 8 * 1024 * 1024  # bytes copied at once
JOB = 16 * 1024 * 1024  # elements one thread takes at once


@dataclass(frozen=True)
class Term:
    """A low-rank update as one tensor on disk sees it: slice `expert` of the stack (None: all) from `first_row`."""

    update: LowRank
    expert: int | None = None
    first_row: int = 0


@dataclass(frozen=True)
class Output:
    """One tensor to write: what it starts from, where it goes, what is added; `base` where the base's is another."""

    source: StoredTensor
    target: StoredTensor
    terms: tuple[Term, ...] = ()
    base: StoredTensor | None = None

    @property
    def is_copy(self) -> bool:
        return not self.terms and self.source.dtype == self.target.dtype


@dataclass(frozen=True)
class Job:
    """Rows first...last of slice `slab` of a tensor seen as (slabs, rows, columns)."""

    output: Output
    slab: int
    rows: int
    columns: int
    first: int
    last: int
    block: int

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(first row, end row, first element in the tensor) of each block."""
        for row in range(self.first, self.last, self.block):
            yield row, min(row + self.block, self.last), (self.slab * self.rows + row) * self.columns


@dataclass
class Folded:
    """What a job saw: whether any stored bit changed, the squared sizes of the update and of what rounding took of it
    (over the first elements of the job, a sample), and a checksum of what was written."""

    changed: bool = False
    update: float = 0.0
    lost: float = 0.0
    checksum: int = 0


@dataclass
class _Scratch(threading.local):
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < count or buffer.dtype != dtype:
            buffer = self.buffers[name] = torch.empty(count, dtype=dtype)
        return buffer[:count]


_scratch = _Scratch()


def write_all(outputs: Sequence[Output]) -> dict[str, list[Folded]]:
    """Writes all outputs, one thread per core, and reads changed ones back. Tensor name -> what its jobs saw.

    Files go to the disk while later ones are computed: at the end, little is left to wait for.
    """
    before = torch.get_num_threads()
    threads = min(8, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    disk = ThreadPoolExecutor(1)
    factors.cache_clear()
    try:
        return _write(outputs, pool, disk)
    finally:
        pool.shutdown(cancel_futures=True)
        disk.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
        factors.cache_clear()


def _write(outputs: Sequence[Output], pool: ThreadPoolExecutor, disk: ThreadPoolExecutor) -> dict[str, list[Folded]]:
    pending: dict[Path, list[Future[Any]]] = defaultdict(list)
    folding: list[tuple[Job, Future[Folded]]] = []
    for output in outputs:
        if output.is_copy:
            pending[output.target.path].append(pool.submit(copy, output))
            continue
        started = [(job, pool.submit(fold, job)) for job in jobs_of(output)]
        folding += started
        pending[output.target.path] += [future for _, future in started]
    synced = []
    for path, futures in pending.items():
        for future in futures:
            future.result()
        synced.append(disk.submit(sync, path))
    sums = list(pool.map(written, [job for job, _ in folding]))
    for done in synced:
        done.result()
    return _collect([(job, future.result()) for job, future in folding], sums)


def _collect(folded: list[tuple[Job, Folded]], sums: list[int]) -> dict[str, list[Folded]]:
    collected: dict[str, list[Folded]] = defaultdict(list)
    for (job, result), read_back in zip(folded, sums, strict=True):
        target = job.output.target
        if read_back != result.checksum:
            raise RunFailed(f"{target.path}: {target.name} reads back differently from what was written.")
        collected[target.name].append(result)
    return collected


def jobs_of(output: Output) -> Iterator[Job]:
    """The tensor cut into jobs; DoRA on transposed weights needs whole columns, so it stays in one piece."""
    elements, shape = output.source.elements, output.source.shape
    columns = shape[-1] if len(shape) > 1 else max(elements, 1)
    rows = shape[-2] if len(shape) > 1 else 1
    if not output.terms:
        columns, rows = 1, elements
    whole = any(term.update.magnitude and term.update.transposed for term in output.terms)
    step = rows if whole else max(1, JOB // columns)
    block = rows if whole else max(1, BLOCK // columns)
    for slab in range(elements // max(rows * columns, 1)):
        for first in range(0, rows, step):
            yield Job(output, slab, rows, columns, first, min(first + step, rows), block)


def checksum(values: torch.Tensor) -> int:
    """The 64-bit sum of a flat tensor's bytes taken eight at a time."""
    raw = values.view(torch.uint8).numpy()
    whole = len(raw) // 8 * 8
    return int(raw[:whole].view(np.uint64).sum()) + int(raw[whole:].sum())


def copy(output: Output) -> None:
    """Copies a tensor no adapter touches byte by byte, in the kernel where the file system lets it."""
    with output.source.path.open("rb", buffering=0) as source, output.target.path.open("r+b", buffering=0) as target:
        done = 0
        while done < output.source.size:
            here, there = output.source.start + done, output.target.start + done
            count = min(output.source.size - done, COPIED)
            done += _copy_some(source.fileno(), target.fileno(), here=here, there=there, count=count)


def _copy_some(source: int, target: int, *, here: int, there: int, count: int) -> int:
    """Copies up to `count` bytes between two open files and says how many."""
    try:
        if copied := os.copy_file_range(source, target, count, here, there):
            return copied
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
    chunk = os.pread(source, count, here)
    if not chunk:
        raise RunFailed("A file of the base model ended early; was it changed during the merge?")
    return os.pwrite(target, chunk, there)


def fold(job: Job) -> Folded:
    """Computes and writes the job's rows."""
    result = Folded()
    source, target = job.output.source, job.output.target
    with target.path.open("r+b", buffering=0) as file:
        for first, last, element in job.blocks():
            count = (last - first) * job.columns
            stored = read_bytes(source, element, count, into=_scratch.take("stored", count, DTYPES[source.dtype]))
            exact = _scratch.take("exact", count, torch.float32).copy_(stored)
            for term in job.output.terms:
                _add(term, job, weight=exact.view(-1, job.columns), first=first)
            rounded = _scratch.take("rounded", count, DTYPES[target.dtype]).copy_(exact)
            base = job.output.base
            before = read_bytes(base, element, count) if base else stored
            if first == job.first:
                _sample(result, before=before[:SAMPLE], exact=exact[:SAMPLE], rounded=rounded[:SAMPLE])
            result.changed = result.changed or not torch.equal(rounded, before.to(rounded.dtype))
            result.checksum += checksum(rounded)
            write_bytes(file.fileno(), rounded, target.start + element * rounded.itemsize)
    return result


def written(job: Job) -> int:
    """The checksum of the job's rows as they stand in the written file."""
    target = job.output.target
    sums = 0
    for first, last, element in job.blocks():
        count = (last - first) * job.columns
        sums += checksum(read_bytes(target, element, count, into=_scratch.take("read", count, DTYPES[target.dtype])))
    return sums


def _sample(result: Folded, *, before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
    result.changed = not torch.equal(rounded, before.to(rounded.dtype))
    result.update = float((exact - before.float()).square_().sum())
    result.lost = float((rounded.float() - exact).square_().sum())


def _add(term: Term, job: Job, *, weight: torch.Tensor, first: int) -> None:
    """Adds one update to `weight`, the rows from `first` of the job's slab."""
    update = term.update
    expert = job.slab if term.expert is None else term.expert
    a, b = (stack[expert] for stack in factors(update))
    rows, columns = weight.shape
    if update.transposed:
        delta = torch.mm(b, a[:, first : first + rows]).mul_(update.scaling).T
    else:
        start = term.first_row + first
        delta = _scratch.take("delta", rows * columns, torch.float32).view(rows, columns)
        torch.mm(b[start : start + rows], a, out=delta).mul_(update.scaling)
    if update.magnitude is None:
        weight.add_(delta)
    elif update.transposed:
        _rescale(weight.T, delta.T, load(update.magnitude))
    else:
        _rescale(weight, delta, load(update.magnitude)[start : start + rows])


def _rescale(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> None:
    """DoRA (https://arxiv.org/abs/2402.09353): the sum, each output's weights scaled to their learnt length."""
    norm = torch.linalg.norm(weight + delta, dim=1)
    weight.copy_((magnitude / norm).view(-1, 1) * (weight + delta))

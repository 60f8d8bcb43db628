"""A step's rows in as few forward passes as memory allows, whatever micro-batches they were read in.

The loss of a step is a sum over its trained tokens, so that neither it nor its gradient depends on how the rows are
divided among passes: only rounding does, and what is drawn at random for a whole pass (dropout). A GPU takes few large
passes in less time than many small ones: 9,000 kernels a pass through 36 layers cost the same for 600 tokens and 6,000.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft.data.chosen import numbers_of
from sft.distributed import ranks
from sft.distributed.launch import launched
from sft.distributed.ranks import say
from sft.models.model import RandomState
from sft.training.batches import heaviest_step, largest_items, pack

if TYPE_CHECKING:
    import datasets

    from sft.settings import Settings

Row = dict[str, Any]
# What a pass of these rows gives; `last` is the one after which ranks add up their gradients.
OnePass = Callable[[list[Row], bool], torch.Tensor]


@dataclass(frozen=True)
class StepStart:
    """What the micro-batches of a step change before its optimizer step: random states, loss and tokens counted."""

    random: RandomState
    loss: torch.Tensor
    tokens: int


def divide(lengths: Sequence[int], tokens: int, *, at_least: int = 1) -> list[list[int]]:
    """Rows of these lengths in as few passes of at most `tokens` as packing finds, and of about equal size where that
    many suffice; a longer row goes alone. The largest pass comes first: memory runs out at once or not at all."""

    def size(rows: list[int]) -> int:
        return sum(lengths[row] for row in rows)

    packed = sorted(pack(lengths, tokens), key=lambda rows: -size(rows))
    count = max(at_least, len(packed))
    even = balanced(lengths, count)
    fits = all(len(rows) < 2 or size(rows) <= tokens for rows in even)
    return even if fits else packed + [[]] * (count - len(packed))


def balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Rows in `count` passes, longest first, each to the pass with fewest tokens; the last ones may be empty."""
    passes: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        lightest = sizes.index(min(sizes))
        passes[lightest].append(row)
        sizes[lightest] += lengths[row]
    return [sorted(passes[place]) for place in sorted(range(count), key=lambda place: -sizes[place])]


def largest_pass(rows: datasets.Dataset, settings: Settings, tokens: int, *, processes: int | None = None) -> list[int]:
    """Rows of the largest pass of the run, passes holding at most `tokens`; 0 takes micro-batches as they are."""
    if not tokens:
        return largest_items(rows, settings, processes=processes)
    step = heaviest_step(rows, settings, processes=processes)
    lengths = numbers_of(rows, "length")[step].tolist()
    return [step[row] for row in divide(lengths, tokens)[0]]


def rows_of(batch: dict[str, Any]) -> list[Row]:
    """The rows of a joined micro-batch, as `join_rows` takes them; [] for one without rows."""
    if batch["rows"][0] < 0:
        return []
    names = [name for name in ("input_ids", "labels", "loss_weights") if name in batch]
    parts = {name: batch[name][0].split(batch["row_lengths"]) for name in names}
    places = zip(batch["rows"], batch["epochs"], strict=True)
    return [
        {"position": position, "epoch": epoch} | {name: parts[name][row].numpy() for name in names}
        for row, (position, epoch) in enumerate(places)
    ]


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in main memory."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


def machine_kind() -> str:
    """What a division of rows among passes was chosen for: the devices, their memory and how they share the model."""
    launch = launched()
    if not torch.cuda.is_available():
        return f"{launch.processes} x CPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{launch.processes} x {torch.cuda.get_device_name()} of {memory:.0f} GiB, sharding {launch.sharding}"


def peak_memory() -> str:
    """A GPU's peak so far as the end of a sentence; "" on a CPU."""
    if not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak"


class Passes:
    """How the rows of each step are divided: passes of at most `tokens`; 0 leaves micro-batches as they are.

    Where memory runs out all the same, passes of half as many tokens are taken from then on. That needs all ranks to
    learn of it between two passes: alone, or in plain data parallel training, where only the last pass of a step waits
    for others. DeepSpeed and FSDP wait inside every pass: there it ends the run.
    """

    def __init__(self, tokens: int, *, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        launch = launched()
        self.together = launch.processes > 1
        self.recovers = not self.together or launch.sharding == "none"

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: a resumed run on such a machine divides its steps in the same way."""
        return {"tokens": self.tokens, "machine": machine_kind()}

    def regroup(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As many batches as the Trainer counts, the last of which has all the rows, the others nothing."""
        if not self.tokens or not batches:
            return batches
        rows = [row for batch in batches for row in rows_of(batch)]
        ids = torch.cat([batch["input_ids"] for batch in batches], dim=1)  # the Trainer counts operations by them
        return [{"step_rows": None}] * (len(batches) - 1) + [{"step_rows": rows, "input_ids": ids}]

    def of(self, rows: list[Row]) -> list[list[Row]]:
        """The passes of a step; on all ranks equally many, which engines that wait in every pass need."""
        lengths = [len(row["input_ids"]) for row in rows]
        found = divide(lengths, self.tokens)
        if self.together:
            found = divide(lengths, self.tokens, at_least=ranks.largest(len(found), self.device))
        return [[rows[row] for row in each] for each in found]

    def run(self, rows: list[Row], one_pass: OnePass, *, undo: Callable[[], None], step: int) -> torch.Tensor:
        """The loss of a step, pass by pass; from the start in smaller ones where memory runs out.

        Args:
            undo: makes it as if the step had not begun.
            step: its number; 0 is a trial of the largest pass alone.

        Raises:
            RuntimeError: memory ran out with a single row, or where the other ranks can't be told.
        """
        while True:
            passes = self.of(rows)
            loss = self.attempt(passes if step else passes[:1], one_pass, synced=step > 0)
            if loss is not None:
                if not step:
                    say(f"Passes of up to {self.tokens:,} tokens: tried{peak_memory()}")
                return loss
            undo()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.halve(passes[0], step)

    def attempt(self, passes: list[list[Row]], one_pass: OnePass, *, synced: bool) -> torch.Tensor | None:
        """The sum over the passes; None where memory ran out, here or on another rank."""
        total, short = torch.zeros((), device=self.device), False
        for number, rows in enumerate(passes):
            last = synced and number == len(passes) - 1
            if last and number and self.together and self.recovers and ranks.any_rank(short):
                return None
            if short:
                continue
            try:
                total += one_pass(rows, last)
            except (RuntimeError, MemoryError) as error:
                if not is_shortage(error) or not self.recovers or (last and self.together):
                    raise
                short = True
        return None if (ranks.any_rank(short) if self.together and not synced else short) else total

    def halve(self, largest: list[Row], step: int) -> None:
        """Half as many tokens as in the largest pass of all ranks, said once.

        Raises:
            RuntimeError: that pass is a single row already.
        """
        count, size = len(largest), sum(len(row["input_ids"]) for row in largest)
        if self.together:
            count, size = ranks.largest(count, self.device), ranks.largest(size, self.device)
        if count < 2:
            raise torch.OutOfMemoryError(f"out of memory with a single row of {size:,} tokens")
        self.tokens = size // 2
        where = f" of step {step}" if step else ""
        say(
            f"[WARNING] Out of memory with {size:,} tokens in a pass{where}: from here on a pass holds at most "
            f"{self.tokens:,}; SFT_MICRO_BATCH_TOKENS={self.tokens} begins with that"
        )

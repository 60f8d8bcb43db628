"""Whether an adapter that was written holds what was trained: no part of it is still what it began as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback

from sft.distributed.launch import launched
from sft.errors import RunFailed
from sft.models.saved import saved_in_full
from sft.stages.paths import ADAPTER

LOOKS = 8  # steps whose gradients are looked at: a parameter that learns anything has one by then
FEWEST_STEPS = 4  # with fewer nothing is judged
_PART = ".lora_B."  # begins as 0.0; lora_A and the factors of embeddings don't
_SAVED = ".modules_to_save."
_WRAPPERS = (
    "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.", "module.", ".modules_to_save", ".default",
)  # fmt: skip

Rows = Mapping[str, torch.Tensor]


class GradientRows(TrainerCallback):
    """Which rows of each lora_B, and of matrices trained in full beside them, had a gradient (finite, not 0, at a rate
    above 0) in the first steps of this process.

    Under FSDP each rank sees its own rows, the main process the first ones. DeepSpeed takes the gradients away and has
    made the step when the Trainer asks for it: there they are seen as they arise, those of this rank's rows.
    """

    def __init__(self) -> None:
        self.rows: dict[str, torch.Tensor] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.looks = 0
        self.looking = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if launched().deepspeed:
            for name, parameter in _watched(kwargs["model"]):
                parameter.register_hook(partial(self._see, name))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.looking = self.looks < LOOKS and any(group["lr"] > 0 for group in groups)
        self.looks += self.looking
        self.before = dict(self.rows)

    def left_out(self) -> None:
        """float16's loss scaler skips this step: what had a gradient in it does not move."""
        self.rows = self.before
        self.looks -= self.looking

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in _watched(kwargs["model"]) if self.looking else ():
            if parameter.grad is not None:
                self._see(name, parameter.grad)

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        if self.looking and gradient.ndim > 1:
            own = getattr(gradient, "_local_tensor", gradient)
            found = (own.isfinite() & (own != 0)).flatten(1).any(dim=1)
            self.rows[name] = found | self.rows[name] if name in self.rows else found


def _watched(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (_PART in name or _SAVED in name):
            yield name, parameter


def beginnings(model: torch.nn.Module) -> Rows:
    """What the matrices that are trained in full began as, by name; not those that are split over processes."""
    return {
        f"{_plain(name)}.{part}": parameter.detach()
        for name, (_, original) in saved_in_full(model).items()
        for part, parameter in original.named_parameters()
        if parameter.ndim > 1 and not hasattr(parameter, "device_mesh")
    }


def require_moved(folder: Path, gradients: Rows, *, step: int, ranks: int, began: Rows | None = None) -> None:
    """The adapter in a folder, if there is one, after `step` steps of `ranks` processes. `began`: `beginnings`.

    A row of lora_B that had a gradient at a rate above 0 has moved, whatever the optimizer, and exactly 0.0 again
    happens to a number, not to a matrix. So a lora_B, or one rank's contiguous share of its rows, that is 0.0
    throughout is refused where a row of it had a gradient: another tensor was saved than was trained. Where each rank
    kept only its own gradients nothing shows that, but the pattern does: of several processes' adapters, a share of
    0.0 in most of the matrices that moved. An unrouted expert, a layer nothing passes through or a rate of 0 has no
    gradient, and a router with rows for unrouted experts is not most matrices: these may stay 0.0.

    Raises:
        RunFailed: names the matrix, and the rows where it is not the whole.
    """
    if step < FEWEST_STEPS or not (folder / ADAPTER).is_file():
        return
    seen = {_plain(name): rows.cpu() for name, rows in gradients.items()}
    partial, moved = [], 0
    for name, changed in _changes(folder / ADAPTER, began or {}):
        shares = torch.arange(len(changed)).chunk(ranks)
        still = [share for share in shares if not changed[share].any()]
        for share in still:
            if _had_gradient(seen.get(_plain(name)), share):
                raise _unmoved(name, share, len(changed), step=step, why="although they had a gradient")
        if _PART in name:  # rows of an embedding whose tokens don't occur stay as they are
            moved += len(still) < len(shares)
            partial += [(name, still[0], len(changed))] if 0 < len(still) < len(shares) else []
    if ranks > 1 and 2 * len(partial) > moved:
        why = f"as is a rank's share in {len(partial)} of {moved} matrices"
        raise _unmoved(*partial[0], step=step, why=why)


def _changes(path: Path, began: Rows) -> Iterator[tuple[str, torch.Tensor]]:
    """Which numbers of each matrix are another than at the beginning."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping, it can't be iterated
            if _PART in name:
                yield name, file.get_tensor(name) != 0
            elif (before := began.get(_plain(name))) is not None:
                yield name, file.get_tensor(name) != before.cpu()


def _plain(name: str) -> str:
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _had_gradient(rows: torch.Tensor | None, share: torch.Tensor) -> bool:
    return rows is not None and bool(rows[share[share < len(rows)]].any())


def _unmoved(name: str, share: torch.Tensor, rows: int, *, step: int, why: str) -> RunFailed:
    where = "all rows" if len(share) == rows else f"rows {int(share[0])} to {int(share[-1])} of {rows}"
    what = "0.0" if _PART in name else "what they were at first"
    return RunFailed(
        f"{name}: {where} are exactly {what} after step {step}, {why}: what was saved is not what was trained, and the "
        "stage is not complete. Train it on one process, or with another accelerate configuration, with --fresh; "
        "please report this with the versions of peft and accelerate."
    )

"""Which tensors the merged checkpoint has, what each starts from and which updates land on it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sft.errors import RunFailed
from sft.merging.adapter_files import Replacement, Update
from sft.merging.fold import Term
from sft.merging.plain import Place, Places, UnknownLayout
from sft.merging.weights import FLOATS, StoredTensor, load


@dataclass(frozen=True)
class Wanted:
    """One tensor of the merged checkpoint before its place in a file is known."""

    name: str
    dtype: str
    source: StoredTensor
    terms: tuple[Term, ...] = ()
    adapters: frozenset[int] = frozenset()
    base: StoredTensor | None = None
    """The base's tensor, where an adapter's full copy takes its place."""


def place(
    layout: Places, shards: Mapping[str, list[StoredTensor]], *, updates: Mapping[str, list[Update]], dtype: str | None
) -> tuple[dict[str, list[Wanted]], bool]:
    """The tensors of every shard, and whether tied embeddings had to be parted because only one of them changes."""
    landed: dict[str, list[tuple[Update, Place]]] = defaultdict(list)
    parted: dict[str, list[Wanted]] = defaultdict(list)
    for parameter, found in updates.items():
        places = _places(parameter, layout)
        if not places and not _trained_as_one(parameter, layout, updates):
            tensor = _tied_tensor(parameter, layout)
            parted[tensor.name].append(_wanted(parameter, tensor, dtype, landed=[(u, Place(parameter)) for u in found]))
        for spot in places:
            landed[spot.key] += [(update, spot) for update in found]
    untied = bool(parted)
    for parameter in _left_behind(layout, updates):
        untied = True
        tensor = _tied_tensor(parameter, layout)
        parted[tensor.name].append(_wanted(parameter, tensor, dtype))
    wanted = {
        name: [
            each
            for tensor in tensors
            for each in (
                _wanted(tensor.name, tensor, dtype, landed=landed.get(tensor.name, ())),
                *parted.get(tensor.name, []),
            )
        ]
        for name, tensors in shards.items()
    }
    return wanted, untied


def _places(parameter: str, layout: Places) -> list[Place]:
    if parameter not in layout.parameters:
        return [Place(parameter)]  # updates_of only names checkpoint keys besides parameters
    return layout.whereabouts(parameter)


def _partner(parameter: str, layout: Places) -> str | None:
    """The parameter that shares its weights with this one."""
    pairs = {**layout.tied, **{source: target for target, source in layout.tied.items()}}
    if len(pairs) != 2 * len(layout.tied):
        raise UnknownLayout("more than two parameters share their weights")
    return pairs.get(parameter)


def _trained_as_one(parameter: str, layout: Places, updates: Mapping[str, list[Update]]) -> bool:
    """Whether both of a tied pair end as the same full copy: then they stay one."""
    last = [updates[name][-1] for name in (parameter, _partner(parameter, layout)) if name and name in updates]
    copies = [load(update.value) for update in last if isinstance(update, Replacement)]
    return len(copies) == 2 and torch.equal(*copies)


def _tied_tensor(parameter: str, layout: Places) -> StoredTensor:
    """The stored tensor of the parameter this one is tied to; RunFailed when there is none."""
    partner = _partner(parameter, layout)
    places = layout.whereabouts(partner) if partner else []
    if len(places) != 1:
        raise RunFailed(f"{parameter} is changed by an adapter but the base model's files do not hold it.")
    return layout.keys[places[0].key]


def _left_behind(layout: Places, updates: Mapping[str, list[Update]]) -> list[str]:
    """Tied parameters that stay as they are while their partner changes and that have no tensor of their own."""
    partners = [_partner(name, layout) for name in updates if name in layout.parameters]
    return [name for name in partners if name and name not in updates and not layout.whereabouts(name)]


def _wanted(
    name: str, tensor: StoredTensor, dtype: str | None, *, landed: Sequence[tuple[Update, Place]] = ()
) -> Wanted:
    """A tensor replaced by the last full copy an adapter brings, with the low-rank updates that follow it."""
    terms: list[Term] = []
    source = tensor
    for update, spot in landed:
        if isinstance(update, Replacement):
            if spot.expert is not None or update.value.shape != tensor.shape:
                raise RunFailed(f"{name} is {tensor.shape} in the base model and {update.value.shape} in the adapter.")
            source, terms = update.value, []
        else:
            terms.append(Term(update, spot.expert, spot.first_row))
    if landed and tensor.dtype not in FLOATS:
        raise UnknownLayout(f"{name} is stored as {tensor.dtype}")
    kind = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
    adapters = frozenset(update.adapter for update, _ in landed)
    return Wanted(name, kind, source, tuple(terms), adapters, base=None if source is tensor else tensor)

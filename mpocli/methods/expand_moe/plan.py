"""Which feed-forward networks become experts, and which of their matrices are the first ones and the last."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpocli.errors import InputError
from mpocli.hf.routing import last_of
from mpocli.hf.weight import Weight
from mpocli.methods.skipped import Skipped

# Everything up to the last number of a module's path: its layer, and in T5 its place in the layer.
_LAYER = re.compile(r"(.*\.\d+)\.")


@dataclass(frozen=True)
class Network:
    """One feed-forward network: its first matrices (up, and gate where there is one), each (F, D), or both in one,
    (2F, D), and its last, (D, F)."""

    layer: str
    first: tuple[Weight, ...]
    last: Weight

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (*self.first, self.last)


def networks(weights: Sequence[Weight]) -> tuple[list[Network], list[Skipped]]:
    """The networks that the chosen matrices make up, in the model's order.

    Two or three matrices of a layer of which the last takes what the others make. Raises `InputError` where there is
    none.
    """
    layers: dict[str, list[Weight]] = {}
    found, kept = [], []
    for weight in weights:
        if weight.role not in ("ffn", None):
            kept.append(Skipped(weight.name, weight.role, f"its role is {weight.role}, and networks are ffn"))
            continue
        match = _LAYER.match(weight.name)
        layers.setdefault(match[1] if match else weight.name, []).append(weight)
    for layer, members in layers.items():
        reason = _why_not(members)
        if reason:
            kept += [Skipped(weight.name, weight.role, reason) for weight in members]
        else:
            found.append(_network(layer, members))
    if not found:
        why = f": {kept[0].name}: {kept[0].reason}" if kept else ""
        raise InputError(f"no feed-forward network to make experts of{why}", hint="see --layers and --target")
    return found, kept


def placed(
    found: Sequence[Network], kept: Sequence[Skipped], layouts: Mapping[str, str]
) -> tuple[list[Network], list[Skipped]]:
    """The networks whose inputs are tokens, and all that is kept. A router has to know which of its vectors are
    padding. Raises `InputError` where none is left."""
    left, others = [], list(kept)
    for network in found:
        told = [layouts.get(weight.name, "batch") for weight in network.weights]
        reason = next((layout for layout in told if layout not in ("batch", "length")), None)
        if reason is None:
            left.append(network)
        else:
            others += [Skipped(weight.name, weight.role, reason) for weight in network.weights]
    if not left:
        raise InputError(
            f"no feed-forward network to make experts of: {others[-1].name}: {others[-1].reason}",
            hint="a router sends tokens, one vector each, to experts",
        )
    return left, others


def _why_not(members: Sequence[Weight]) -> str:
    for weight in members:
        if weight.obstacle:
            return weight.obstacle
        if len(weight.members) > 1:
            return f"its weight is tied to {weight.members[1].name}"
        if weight.entry is not None and weight.entry.spec.experts:
            return "is experts already"
    if _last(members) is None:
        shapes = ", ".join("x".join(map(str, weight.shape)) for weight in members)
        return f"matrices of {shapes} in one layer make no network of one or two first layers and a last one"
    return ""


def _last(members: Sequence[Weight]) -> Weight | None:
    last = last_of([weight.shape for weight in members])
    return None if last is None else members[last]


def _network(layer: str, members: Sequence[Weight]) -> Network:
    last = _last(members)
    assert last is not None
    return Network(layer, tuple(weight for weight in members if weight is not last), last)

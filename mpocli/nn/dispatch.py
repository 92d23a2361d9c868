"""Rows grouped by the experts of their tokens, and what these make of them put back in place.

The first layers of a feed-forward network route, its last ones take the sum with the gates; what lies between is the
network's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpocli.nn.router import Router, Routing

# `in`: routes its input and returns what each token's experts make of it; `out`: takes that and sums it with the gates.
Place = Literal["in", "out"]
Kind = Literal["linear", "conv1d"]
# (rows of the routed experts one after another, the routing) → the product with their weights, bias added.
Multiply = Callable[[Tensor, Routing], Tensor]


class ExpertLayer(Protocol):
    """A linear layer of n experts, whatever their O×I weights are stored as."""

    experts: int
    place: Place
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    router: Router | None

    def weight_matrix(self, expert: int) -> Tensor: ...


def attach_router(layer: ExpertLayer, router: Router, *, own: bool) -> None:
    """Give a layer its router. One layer of a network owns it, as a submodule that is stored; the others see it."""
    if own:
        layer.router = router
    else:
        object.__setattr__(layer, "router", router)  # as a submodule it would be stored again


def dispatch(x: Tensor, router: Router | None, place: Place, out_features: int, multiply: Multiply) -> Tensor:
    """Group the rows by expert, multiply, and put the results back where their tokens are.

    `in`: (…, I) → (…, O), or (…, k, O) for k ≥ 2; `out`: these → (…, O).
    """
    if router is None:
        raise RuntimeError("a layer of experts without a router")
    routing = router(x) if place == "in" else router.take()
    k = routing.k
    if place == "in":
        leading, source = x.shape[:-1], routing.tokens  # of a token
    else:
        leading, source = (x.shape[:-2] if k > 1 else x.shape[:-1]), routing.order  # of a slot
    rows = x.reshape(-1, x.shape[-1]).index_select(0, source)
    made = multiply(rows, routing) if routing.routed else rows.new_zeros(0, out_features)
    # (T·k, O), zero where a choice was dropped
    slots = made.new_zeros(routing.experts.numel(), out_features).index_copy_(0, routing.order, made)
    if place == "in":
        return slots.reshape(*leading, *((k,) if k > 1 else ()), out_features)
    weighted = slots.reshape(-1, k, out_features) * routing.gates.to(slots.dtype)[:, :, None]
    return (weighted.sum(1) if k > 1 else weighted).reshape(*leading, out_features)


def dispatch_traced(x: Tensor, layer: ExpertLayer) -> Tensor:
    """The same in a compiled graph, whose shapes must not depend on the routing: every expert multiplies every row."""
    router = layer.router
    if router is None:
        raise RuntimeError("a layer of experts without a router")
    routing = router(x) if layer.place == "in" else router.take()
    k, first = routing.k, layer.place == "in"
    leading = x.shape[:-1] if first or k == 1 else x.shape[:-2]
    rows = x.reshape(-1, layer.in_features)
    if first and k > 1:
        rows = rows.repeat_interleave(k, 0)  # a row for each slot
    slots = rows.new_zeros(rows.shape[0], layer.out_features)
    for expert in range(layer.experts):
        mine = (routing.experts == expert) & routing.kept
        made = F.linear(rows, layer.weight_matrix(expert), layer.bias)
        slots = torch.where(mine.reshape(-1, 1), made, slots.to(made.dtype))
    if first:
        return slots.reshape(*leading, *((k,) if k > 1 else ()), layer.out_features)
    weighted = slots.reshape(-1, k, layer.out_features) * routing.gates.to(slots.dtype)[:, :, None]
    return weighted.sum(1).reshape(*leading, layer.out_features)


def linear_by_expert(rows: Tensor, weights: Sequence[Tensor], bias: Tensor | None, counts: Sequence[int]) -> Tensor:
    """(S, I) → (S, O) with one O×I matrix for each group of rows."""
    parts = zip(rows.split(list(counts)), weights, strict=True)
    made = [F.linear(part, weight, bias) for part, weight in parts]
    return made[0] if len(made) == 1 else torch.cat(made)

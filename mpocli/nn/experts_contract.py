"""Multiply tokens with the weights of several experts: the ways there are, and the cost model that chooses.

An expert's weight is (left side) · (central core) · (right side): the sides join its auxiliary cores and are small,
the central core is large and may be everybody's. Everything here is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mpocli.mpo.contract import chain_macs
from mpocli.mpo.shape import SiteShape


class Way(NamedTuple):
    """`rebuild` the routed experts' matrices, or take each token through the `chain`; and with which side to begin."""

    kind: Literal["rebuild", "chain"]
    near: Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Sides:
    """r experts as three cores: `near` (r, out, in, χ_near), `core` (χ_near, out, in, χ_far) or one for each expert
    (r, χ_near, …), and `far` (r, out, in, χ_far). `mirrored` where the near side is the right one."""

    near: Tensor
    core: Tensor
    far: Tensor
    mirrored: bool


def join_sides(cores: Sequence[Tensor], near: Literal["left", "right"]) -> Sides:
    """The sides of cores with a leading dimension of r experts; the central core has none where it is shared."""
    central = (len(cores) - 1) // 2
    core = cores[central]
    experts = cores[-1].shape[0]
    # (r, 1, O_l, I_l, χ) → (r, O_l, I_l, χ). The first of two sites is the central one and has no left side.
    left = reduce(_join, cores[:central]).squeeze(1) if central else core.new_ones(experts, 1, 1, 1)
    right = reduce(_join, cores[central + 1 :]).squeeze(4).movedim(1, 3)  # (r, O_r, I_r, χ)
    if near == "left":
        return Sides(left, core, right, mirrored=False)
    return Sides(right, core.transpose(-4, -1), left, mirrored=True)


def _join(left: Tensor, right: Tensor) -> Tensor:
    """Two neighbours of each expert as one: (r,a,o,i,b) · (r,b,p,j,c) → (r, a, o·p, i·j, c)."""
    experts, a, o, i, b = left.shape
    _, _, p, j, c = right.shape
    product = torch.bmm(left.reshape(experts, a * o * i, b), right.reshape(experts, b, p * j * c))
    # (r, a, o, i, p, j, c) → (r, a, o, p, i, j, c)
    return product.reshape(experts, a, o, i, p, j, c).transpose(3, 4).reshape(experts, a, o * p, i * j, c)


def rebuild(sides: Sides) -> Tensor:
    """The padded matrices (r, Π out, Π in): one product with a shared central core, then one for each expert."""
    experts, near_out, near_in, near_bond = sides.near.shape
    _, far_out, far_in, far_bond = sides.far.shape
    out, in_ = sides.core.shape[-3:-1]
    near = sides.near.reshape(experts, near_out * near_in, near_bond)
    if sides.core.dim() == 4:
        first = near.reshape(-1, near_bond) @ sides.core.reshape(near_bond, -1)
    else:
        first = torch.bmm(near, sides.core.reshape(experts, near_bond, -1))
    far = sides.far.reshape(experts, far_out * far_in, far_bond).transpose(1, 2)
    product = torch.bmm(first.reshape(experts, -1, far_bond), far)
    product = product.reshape(experts, near_out, near_in, out, in_, far_out, far_in)
    # rows beside rows, columns beside columns, the left side's first
    order = (0, 5, 3, 1, 6, 4, 2) if sides.mirrored else (0, 1, 3, 5, 2, 4, 6)
    return product.permute(order).reshape(experts, near_out * out * far_out, near_in * in_ * far_in)


def apply_chain(x: Tensor, sides: Sides, counts: Sequence[int]) -> Tensor:
    """(S, Π in) → (S, Π out) without building a matrix; the first counts[0] rows are of the first expert, and so on.

    A shared central core is one product over the rows of all experts.
    """
    rows = x.shape[0]
    experts, near_out, near_in, near_bond = sides.near.shape
    _, far_out, far_in, far_bond = sides.far.shape
    out, in_ = sides.core.shape[-3:-1]
    if sides.mirrored:
        state = x.reshape(rows, far_in, in_, near_in).transpose(1, 2)
    else:
        state = x.reshape(rows, near_in, in_, far_in).permute(0, 2, 3, 1)
    # (S, i·I_f, I_n) @ (r, I_n, O_n·χ_n)
    near = sides.near.permute(0, 2, 1, 3).reshape(experts, near_in, near_out * near_bond)
    state = by_expert(state.reshape(rows, in_ * far_in, near_in), near, counts)
    # (S, i, I_f, O_n, χ_n) → (S, I_f·O_n, i·χ_n) @ (i·χ_n, o·χ_f)
    state = state.reshape(rows, in_, far_in * near_out, near_bond).transpose(1, 2)
    core = sides.core.movedim(-4, -2).movedim(-4, -2)  # (χ_n, o, i, χ_f) → (o, i, χ_n, χ_f) → (i, χ_n, o, χ_f)
    core = core.reshape(*core.shape[:-4], in_ * near_bond, out * far_bond)
    state = state.reshape(rows, far_in * near_out, in_ * near_bond)
    state = state @ core if core.dim() == 2 else by_expert(state, core, counts)
    # (S, I_f, O_n, o, χ_f) → (S, O_n·o, I_f·χ_f) @ (r, I_f·χ_f, O_f)
    state = state.reshape(rows, far_in, near_out * out, far_bond).transpose(1, 2)
    far = sides.far.permute(0, 2, 3, 1).reshape(experts, far_in * far_bond, far_out)
    state = by_expert(state.reshape(rows, near_out * out, far_in * far_bond), far, counts)
    state = state.reshape(rows, near_out, out, far_out)
    return (state.transpose(1, 3) if sides.mirrored else state).reshape(rows, near_out * out * far_out)


def by_expert(rows: Tensor, weights: Tensor | Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """rows (S, …, a), grouped as `counts` says, times each group's matrix (a, b) → (S, …, b)."""
    # `unbind`, whose gradient is one stack: indexing would make a whole tensor of zeros for every expert.
    weights = weights.unbind(0) if isinstance(weights, Tensor) else weights
    parts = [part @ weight for part, weight in zip(rows.split(list(counts)), weights, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def join_macs(sites: SiteShape, bond_dims: Sequence[int]) -> int:
    """Multiply-accumulates of `join_sides` for one expert."""
    sizes, central = sites.site_sizes, sites.central
    return sum(
        bond_dims[first] * math.prod(sizes[first:k]) * bond_dims[k] * sizes[k] * bond_dims[k + 1]
        for first, last in ((0, central), (central + 1, sites.sites))
        for k in range(first + 1, last)
    )


def way_macs(way: Way, rows: int, experts: int, sites: SiteShape, bond_dims: Sequence[int]) -> int:
    """Multiply-accumulates of one call with `rows` rows for `experts` routed experts.

    A shared central core saves passes over memory and the memory itself, no multiplications: the same count either
    way.
    """
    central = sites.central
    parts = (slice(None, central), slice(central, central + 1), slice(central + 1, None))
    out_dims = [math.prod(sites.out_dims[part]) for part in parts]
    in_dims = [math.prod(sites.in_dims[part]) for part in parts]
    bonds = (1, bond_dims[central], bond_dims[central + 1], 1)
    joined = experts * join_macs(sites, bond_dims)
    if way.kind == "chain":
        return joined + rows * chain_macs(out_dims, in_dims, bonds, way.near)
    left, core, right = (o * i for o, i in zip(out_dims, in_dims, strict=True))
    first = left * bonds[1] * core * bonds[2] if way.near == "left" else right * bonds[2] * core * bonds[1]
    second = left * core * right * (bonds[2] if way.near == "left" else bonds[1])
    return joined + experts * (first + second) + rows * math.prod(sites.padded_shape)


def choose_way(rows: int, experts: int, sites: SiteShape, bond_dims: Sequence[int]) -> Way:
    """The way with the fewest multiply-accumulates for `rows` rows spread over `experts` routed experts.

    >>> choose_way(1000, 8, SiteShape((768, 1), (1, 768)), (1, 64, 1))
    Way(kind='chain', near='right')
    """
    ways = [Way(kind, near) for kind in ("rebuild", "chain") for near in ("left", "right")]
    return min(ways, key=lambda way: way_macs(way, rows, experts, sites, bond_dims))


def expert_params(sites: SiteShape, bond_dims: Sequence[int], experts: int, *, shared: bool = True) -> int:
    """Elements of the cores of n experts: central + n·auxiliary where the central core is shared, else n times all.

    >>> expert_params(SiteShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)), (1, 12, 192, 384, 16, 1), 8)
    3837056
    """
    sizes = sites.core_sizes(bond_dims)
    central = sizes[sites.central]
    return central * (1 if shared else experts) + experts * (sum(sizes) - central)


def sharing_ratio(experts: int, gamma: float) -> float:
    """Parameters with a shared central core / without: (n + γ) / (n (γ + 1)), γ = central/auxiliary (MPOE, §3).

    >>> round(sharing_ratio(8, 12.77), 3)
    0.189
    """
    return (experts + gamma) / (experts * (gamma + 1))

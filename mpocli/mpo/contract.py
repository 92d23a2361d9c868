"""Contract a chain of cores: into its matrix, or with a batch of vectors; and which of the two is cheaper.

Cores are 4-way, (left bond, out, in, right bond). Everything here is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

Path = Literal["rebuild", "left", "right"]


def to_dense(cores: Sequence[Tensor]) -> Tensor:
    """The padded matrix (Π out, Π in) of a chain of cores, W = T_1 T_2 … T_n over the bonds (MPOP, Eq. 1).

    Both outer groups are small and contracted first, so that the work is two large matrix products with the
    central core between them.
    """
    central = (len(cores) - 1) // 2
    core = cores[central]
    bond_in, out, in_, bond_out = core.shape
    result = core.reshape(bond_in, out, in_, bond_out)
    if central:
        left = join(cores[:central])  # (1, O_l, I_l, χ)
        result = _join(left, result)
    if central + 1 < len(cores):
        result = _join(result, join(cores[central + 1 :]))
    return result.reshape(result.shape[1], result.shape[2])


def join(cores: Sequence[Tensor]) -> Tensor:
    """Neighbouring cores as one: (left bond, Π out, Π in, right bond)."""
    return reduce(_join, cores)


def _join(left: Tensor, right: Tensor) -> Tensor:
    """Two neighbours as one core: (a,o,i,b) · (b,p,j,c) → (a, o·p, i·j, c)."""
    a, o, i, b = left.shape
    _, p, j, c = right.shape
    product = left.reshape(a * o * i, b) @ right.reshape(b, p * j * c)
    # (a, o, i, p, j, c) → (a, o, p, i, j, c): rows beside rows, columns beside columns
    return product.reshape(a, o, i, p, j, c).transpose(2, 3).reshape(a, o * p, i * j, c)


def apply_chain(x: Tensor, cores: Sequence[Tensor], path: Path) -> Tensor:
    """y = x Wᵀ for x (B, Π in) without building W: core by core from the `left` or from the `right` end."""
    batch = x.shape[0]
    if path == "left":
        state = x.reshape(batch, 1, 1, x.shape[1])  # (B, out_1..out_k, χ_k, in_{k+1}..in_n)
        for core in cores:
            bond, out, in_, next_bond = core.shape
            done, rest = state.shape[1], state.shape[3] // in_
            # sum over the bond and in_k: (B, done, rest, χ·in) @ (χ·in, out·χ')
            flat = state.reshape(batch, done, bond * in_, rest).transpose(2, 3)
            weight = core.transpose(1, 2).reshape(bond * in_, out * next_bond)
            state = (flat @ weight).reshape(batch, done, rest, out, next_bond)
            state = state.permute(0, 1, 3, 4, 2).reshape(batch, done * out, next_bond, rest)
        return state.reshape(batch, state.shape[1])
    state = x.reshape(batch, x.shape[1], 1, 1)  # (B, in_1..in_k, χ_k, out_{k+1}..out_n)
    for core in reversed(cores):
        next_bond, out, in_, bond = core.shape
        rest, done = state.shape[1] // in_, state.shape[3]
        # sum over in_k and the bond: (B, rest, done, in·χ) @ (in·χ, χ'·out)
        flat = state.reshape(batch, rest, in_ * bond, done).transpose(2, 3)
        weight = core.permute(2, 3, 0, 1).reshape(in_ * bond, next_bond * out)
        state = (flat @ weight).reshape(batch, rest, done, next_bond, out)
        state = state.permute(0, 1, 3, 4, 2).reshape(batch, rest, next_bond, out * done)
    return state.reshape(batch, state.shape[3])


def rebuild_macs(out_dims: Sequence[int], in_dims: Sequence[int], bond_dims: Sequence[int]) -> int:
    """Multiply-accumulates of `to_dense`, paid once a forward pass whatever the number of tokens."""
    sizes = [o * i for o, i in zip(out_dims, in_dims, strict=True)]
    n, central = len(sizes), (len(sizes) - 1) // 2

    def grow(first: int, last: int) -> int:
        """Cost of joining sites first..last from the left."""
        return sum(
            bond_dims[first] * math.prod(sizes[first:k]) * bond_dims[k] * sizes[k] * bond_dims[k + 1]
            for k in range(first + 1, last)
        )

    total = grow(0, central) + grow(central + 1, n)
    left, right = math.prod(sizes[:central]), math.prod(sizes[central + 1 :])
    if central:
        total += left * bond_dims[central] * sizes[central] * bond_dims[central + 1]
    if central + 1 < n:
        total += left * sizes[central] * bond_dims[central + 1] * right
    return total


def chain_macs(out_dims: Sequence[int], in_dims: Sequence[int], bond_dims: Sequence[int], path: Path) -> int:
    """Multiply-accumulates of `apply_chain` for one vector."""
    total = 0
    for k, (out, in_) in enumerate(zip(out_dims, in_dims, strict=True)):
        others = (
            math.prod(out_dims[:k]) * math.prod(in_dims[k + 1 :])
            if path == "left"
            else math.prod(in_dims[:k]) * math.prod(out_dims[k + 1 :])
        )
        total += others * bond_dims[k] * out * in_ * bond_dims[k + 1]
    return total


def choose_path(tokens: int, out_dims: Sequence[int], in_dims: Sequence[int], bond_dims: Sequence[int]) -> Path:
    """The cheapest of: rebuild W then one matrix product; the chain from the left; from the right.

    At the papers' bond dimensions a chain costs hundreds of times the dense product, so that `rebuild` wins
    from a few tokens on; a truncated SVD (out_dims (O,1), in_dims (1,I)) is a chain from the right.

    >>> choose_path(1000, (768, 1), (1, 768), (1, 64, 1))
    'right'
    """
    dense = math.prod(out_dims) * math.prod(in_dims)
    right, left = (chain_macs(out_dims, in_dims, bond_dims, path) for path in ("right", "left"))
    chain: Path = "right" if right <= left else "left"
    # A token costs so much more in the chain, and rebuilding W costs so much once.
    more, once = min(right, left) - dense, rebuild_macs(out_dims, in_dims, bond_dims)
    if more <= 0:
        return chain if more < 0 or once else "rebuild"
    return chain if _is_known(tokens * more < once) else "rebuild"


def _is_known(condition: bool) -> bool:
    """Whether it holds; of a number of tokens that a compiled graph leaves open, whether it holds for every number."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)

"""A matrix, or the cores of one, on grids of few bits, with a small error in the norm of its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpocli.mpo.canonical import canonicalize
from mpocli.mpo.gram import FLOOR, regularised
from mpocli.mpo.linalg import working_dtype
from mpocli.mpo.mpo import MPO
from mpocli.mpo.weighted import weighted_square
from mpocli.quant.gptq import gptq
from mpocli.quant.grid import Grid, Rounded, searched
from mpocli.sparse.one_shot import core_gram

# Shares of the bond's weights that a pair's first factor may carry: its entries' sizes decide what rounding takes.
_GAUGES = (0.0, 0.5)


@dataclass(frozen=True, eq=False)
class RoundedChain:
    """Cores on their grids, each as a matrix (left · out, in · right), the MPO of all cores, and its loss. What is not
    rounded is in `mpo` too: its gauge may have changed."""

    rounded: tuple[Rounded, ...]
    mpo: MPO
    loss: float


def round_matrix(matrix: Tensor, gram: Tensor | None, grid: Grid) -> Rounded:
    """W (R, C) on its grids: by `gptq` in the norm of its inputs' G (C, C), without one on those of least squared
    error."""
    return searched(matrix, grid) if gram is None else gptq(matrix, gram, grid)


def round_chain(
    mpo: MPO,
    gram: Tensor | None,
    grids: Sequence[Grid | None],
    *,
    output: Tensor | None = None,
    moves: bool = True,
    quick: bool = False,
) -> RoundedChain:
    """The cores of an MPO on their grids, from the last to the first, each seen through its neighbours.

    A core is rounded with those before it left-canonical, so that its error counts as itself, and in the norm of what
    reaches it through those after it, rounded already (`core_gram`). Of a pair, the second factor's error is then made
    up for by the first one, which is fitted anew before it is rounded; and of `_GAUGES` the better one is taken.
    `grids` has one for every core, None for one that is not rounded. Without `moves` such a core stays as it is to the
    bit, and the others are rounded in the gauge that they have. The norm is tr(H D G Dᵀ), `gram` G (I, I) of the
    inputs and `output` H (O, O); None is the identity. A `quick` look rounds the factors of a pair to nearest, on grids
    that are searched for, in one gauge: it loses more, by much the same factor at every bond.
    """
    wide = mpo.to(dtype=working_dtype(mpo.cores[0].device))
    matrix = wide.to_matrix()
    if None in grids or not _is_svd(wide):
        last = max(k for k, grid in enumerate(grids) if grid is not None)
        seen = _gauged(wide, last) if moves or None not in grids else wide
        return _measured(_round_each(seen, gram, grids), matrix, gram, output)
    gauges = _GAUGES[-1:] if quick else _GAUGES
    made = (_round_pair(wide, matrix, gram, grids, share, quick=quick) for share in gauges)
    tried = [_measured(one, matrix, gram, output) for one in made]
    return min(tried, key=lambda one: one.loss)


def _gauged(mpo: MPO, center: int) -> MPO:
    """Canonical around `center`; as it is where that is known, or where a bond that is wider than it can be would
    shrink."""
    if mpo.center == center:
        return mpo
    made = canonicalize(mpo, center)
    return made if made.bond_dims == mpo.bond_dims else mpo


_Made = tuple[list[Rounded | None], list[Tensor], tuple[int, int]]


def _measured(made: _Made, matrix: Tensor, gram: Tensor | None, output: Tensor | None) -> RoundedChain:
    rounded, cores, shape = made
    mpo = MPO(tuple(cores), shape)
    loss = weighted_square(matrix - mpo.to_matrix().to(matrix), gram, output)
    return RoundedChain(tuple(one for one in rounded if one is not None), mpo, loss)


def _round_each(mpo: MPO, gram: Tensor | None, grids: Sequence[Grid | None]) -> _Made:
    """From the last core to the first."""
    cores = list(mpo.cores)
    rounded: list[Rounded | None] = [None] * len(cores)
    in_dims = mpo.site_shape.in_dims
    for k in reversed(range(len(cores))):
        left, out, in_, right = cores[k].shape
        grid = grids[k]
        if grid is None:
            continue
        flat = cores[k].reshape(left * out, in_ * right)
        made = round_matrix(flat, _seen(cores[k + 1 :], gram, in_dims, k), grid)
        cores[k] = made.values(torch.float32).to(cores[k]).reshape(left, out, in_, right)
        rounded[k] = made
    return rounded, cores, mpo.shape


def _seen(after: Sequence[Tensor], gram: Tensor | None, in_dims: Sequence[int], k: int) -> Tensor | None:
    """The Gram matrix of what reaches core k, regularised; None without one of the inputs."""
    if gram is None:
        if not after:
            return None
        size = math.prod(in_dims)
        gram = torch.eye(size, dtype=after[0].dtype, device=after[0].device)
    made = core_gram(list(after), gram, in_dims, k)
    return regularised(made, 10**9, least=FLOOR * 100, name="a core's inputs")


def _is_svd(mpo: MPO) -> bool:
    sites = mpo.site_shape
    return sites.sites == 2 and sites.in_dims[0] == sites.out_dims[1] == 1


def _round_pair(
    mpo: MPO, matrix: Tensor, gram: Tensor | None, grids: Sequence[Grid | None], share: float, *, quick: bool
) -> _Made:
    """U V of a truncated SVD: V's rows have the shapes (1, I), U's the bond's. Both may be padded."""
    first, second = grids
    assert first is not None and second is not None
    sites = mpo.site_shape
    left = _gauged(mpo, 1)
    rest = left.cores[1].reshape(left.bond_dims[1], -1)
    # Every row of V has scales of its own: what U's entries are is all that the gauge decides.
    sizes = torch.linalg.vector_norm(rest, dim=1).clamp_min(torch.finfo(rest.dtype).tiny) ** share
    padded = gram is not None and len(gram) < rest.shape[1]
    seen = _seen([], gram, sites.in_dims, 1) if padded else gram
    back = _round(rest / sizes[:, None], seen, second, quick=quick)
    values = back.values(torch.float32).to(rest)
    core = values.reshape(len(values), 1, -1, 1)
    fitted = _fitted(matrix, values[:, : mpo.shape[1]], gram)
    fitted = torch.nn.functional.pad(fitted, (0, 0, 0, sites.out_dims[0] - len(fitted)))
    front = _round(fitted, _seen([core], gram, sites.in_dims, 0), first, quick=quick)
    return [front, back], [front.values(torch.float32).to(rest)[None, :, None, :], core], mpo.shape


def _round(matrix: Tensor, gram: Tensor | None, grid: Grid, *, quick: bool) -> Rounded:
    if quick:
        return searched(matrix, grid, None if gram is None else gram.diagonal())
    return round_matrix(matrix, gram, grid)


def _fitted(matrix: Tensor, second: Tensor, gram: Tensor | None) -> Tensor:
    """U (O, r) of least error beside a V (r, I) that is rounded: W G Vᵀ (V G Vᵀ)⁻¹, 0 beside a V of zeros."""
    weighted = second if gram is None else second @ gram
    square = weighted @ second.T
    square.diagonal().add_(1e-9 * float(square.diagonal().mean()) or 1.0)
    made: Tensor = torch.linalg.solve(square, weighted @ matrix.T)
    return made.T

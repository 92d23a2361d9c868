"""A matrix as a tuple of cores (left bond, out, in, right bond): split off it, shifted, brought to canonical form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpocli.mpo.linalg import check_finite, left_split, working_dtype
from mpocli.mpo.shape import SiteShape
from mpocli.mpo.truncation import Truncation, TruncationError, choose_bond

Cores = tuple[Tensor, ...]


def split(matrix: Tensor, sites: SiteShape, truncation: Truncation, name: str) -> tuple[Cores, TruncationError]:
    """The cores of an O×I matrix, canonical around the central one, in float64, and what was discarded.

    Raises `InputError` for a matrix that is not finite or does not fit `sites`.
    """
    matrix = matrix.detach()
    sites.check_fits((matrix.shape[0], matrix.shape[1]), name)
    check_finite(matrix, name)
    tensor = by_site(matrix, sites)
    norm_squared = float(torch.linalg.vector_norm(tensor)) ** 2
    n, centre = sites.sites, sites.central
    allowance = truncation.allowance(norm_squared, n - 1)
    caps = truncation.caps(sites)
    cores: list[Tensor | None] = [None] * n
    discarded = [0.0] * (n - 1)

    bond = 1
    for k in range(centre):  # left of the centre: split rows (χ · o_k · i_k) off
        tensor = tensor.reshape(bond * sites.site_sizes[k], -1)
        basis, rest, weights = left_split(tensor)
        kept, discarded[k] = choose_bond(weights, caps[k + 1], allowance)
        cores[k] = basis[:, :kept].reshape(bond, sites.out_dims[k], sites.in_dims[k], kept)
        tensor, bond = rest[:kept], kept
        del rest  # or it would stand beside its successor
    left_bond, bond = bond, 1
    for k in range(n - 1, centre, -1):  # right of the centre: split columns (o_k · i_k · χ) off
        tensor = tensor.reshape(-1, sites.site_sizes[k] * bond).T
        basis, rest, weights = left_split(tensor)
        kept, discarded[k - 1] = choose_bond(weights, caps[k], allowance)
        cores[k] = basis[:, :kept].T.reshape(kept, sites.out_dims[k], sites.in_dims[k], bond)
        tensor, bond = rest[:kept].T, kept
        del rest
    cores[centre] = tensor.reshape(left_bond, sites.out_dims[centre], sites.in_dims[centre], bond)

    # Slices of larger work arrays must not keep those alive.
    owned = tuple(core.clone(memory_format=torch.contiguous_format) for core in cores if core is not None)
    return trimmed(owned), TruncationError(tuple(discarded), norm_squared)


def by_site(matrix: Tensor, sites: SiteShape) -> Tensor:
    """(O, I) → padded, float64, flat in the order (o_1, i_1, o_2, i_2, …)."""
    padded = matrix.new_zeros(sites.padded_shape, dtype=working_dtype(matrix.device))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    n = sites.sites
    order = [axis for k in range(n) for axis in (k, n + k)]
    return padded.reshape(*sites.out_dims, *sites.in_dims).permute(order).reshape(-1)


def canonical(cores: Sequence[Tensor], center: int) -> Cores:
    """The same matrix, left-canonical before `center`, right-canonical after it, by QR in float64."""
    found = [core.to(working_dtype(core.device)) for core in cores]
    for k in range(center):
        found[k], found[k + 1] = _shift_right(found[k], found[k + 1])
    for k in range(len(found) - 1, center, -1):
        found[k - 1], found[k] = _shift_left(found[k - 1], found[k])
    # QR hands back transposed views; cores are stored and joined row by row.
    return tuple(core.contiguous() for core in found)


def _shift_right(core: Tensor, neighbour: Tensor) -> tuple[Tensor, Tensor]:
    bond, out, in_, _ = core.shape
    q, r = torch.linalg.qr(core.reshape(bond * out * in_, -1))
    return q.reshape(bond, out, in_, -1), torch.tensordot(r, neighbour, 1)


def _shift_left(neighbour: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    _, out, in_, bond = core.shape
    q, r = torch.linalg.qr(core.reshape(-1, out * in_ * bond).T)
    return torch.tensordot(neighbour, r.T, 1), q.T.reshape(-1, out, in_, bond)


def trimmed(cores: Cores) -> Cores:
    """The same matrix without bonds wider than a neighbour can carry, from and to canonical around the central core.

    Caps given bond by bond leave such bonds: cutting one makes the next one partly idle. Cutting that one first
    would lose more, so that it is done afterwards, where it loses nothing.
    """
    bonds = [core.shape[3] for core in cores[:-1]]
    sites = SiteShape(tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores))
    if (1, *bonds, 1) == sites.capped_bond_dims(tuple(bonds)):
        return cores
    return canonical(canonical(canonical(cores, len(cores) - 1), 0), sites.central)

"""A two-site MPO close to the best one in the Frobenius norm, by random projection: where a fit may begin."""

from __future__ import annotations

import torch
from torch import Tensor

from mpocli.mpo.chain import by_site
from mpocli.mpo.linalg import left_split
from mpocli.mpo.mpo import MPO
from mpocli.mpo.shape import SiteShape

# Columns beside the wanted ones, and passes over the matrix after the first.
_MORE, _POWERS = 8, 1


def sketched(matrix: Tensor, sites: SiteShape, bond: int, seed: int = 0) -> MPO:
    """Cores of W (O, I) in two sites with bond χ, as `decompose` makes them but for a few per cent of the error.

    With A (o_1 i_1, o_2 i_2) the matrix by sites and Ω random, the columns of (A Aᵀ) A Ω span nearly what the first χ
    left singular vectors do (Halko, Martinsson and Tropp, SIAM Review 2011, Alg. 4.4): products with χ + 8 columns, in
    single precision, instead of a factorisation.
    """
    tall = by_site(matrix, sites).reshape(sites.site_sizes[0], sites.site_sizes[1])
    largest = float(tall.abs().max())
    narrow = (tall / largest if largest else tall).float()  # squares must neither overflow nor vanish
    columns = min(bond + _MORE, *tall.shape)
    # Drawn on the CPU, so that a seed means the same on every device.
    drawn = torch.randn(tall.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    basis = _orthonormal(narrow @ drawn.to(narrow.device))
    for _ in range(_POWERS):
        basis = _orthonormal(narrow @ (narrow.T @ basis))
    turn, rest, _ = left_split(basis.to(tall).T @ tall)
    bond = min(bond, rest.shape[0])
    first = (basis.to(tall) @ turn[:, :bond]).reshape(1, sites.out_dims[0], sites.in_dims[0], bond)
    second = rest[:bond].reshape(bond, sites.out_dims[1], sites.in_dims[1], 1)
    return MPO((first, second.contiguous()), (matrix.shape[0], matrix.shape[1]))


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns).Q
    return q

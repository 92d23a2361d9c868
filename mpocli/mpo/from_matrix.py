"""Decompose a matrix into an MPO by a truncating sweep, and measure what that cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpocli.mpo.chain import split
from mpocli.mpo.contract import to_dense
from mpocli.mpo.linalg import working_dtype
from mpocli.mpo.mpo import MPO
from mpocli.mpo.shape import SiteShape
from mpocli.mpo.truncation import Truncation, TruncationError

# The rebuilt matrix is compared in about this many blocks of rows, so that it never stands in memory whole.
_ERROR_BLOCKS = 8


def decompose(
    matrix: Tensor,
    sites: SiteShape,
    truncation: Truncation = Truncation(),  # noqa: B008 (frozen)
    *,
    name: str = "matrix",
) -> tuple[MPO, TruncationError]:
    """Decompose an O×I matrix into an MPO by a truncating sweep from both ends towards the central core.

    Reshape to (o_1..o_n, i_1..i_n), permute to (o_1 i_1, …, o_n i_n) and split site after site off the left end
    up to the centre, then off the right end (MPOP, ACL 2021, Alg. 1, which sweeps from the left alone; from both
    ends every split is of a matrix with few rows). The result is canonical around the central core, and the sum
    of the discarded weights is the squared error exactly. Without truncation it is lossless: 4e-15 relative.

    Computes in float64 on the matrix's device and returns cores of that dtype. Raises `InputError` for a matrix
    that is not finite or does not fit `sites`; `name` is how the message calls it.
    """
    cores, error = split(matrix, sites, truncation, name)
    return MPO(cores, (matrix.shape[0], matrix.shape[1]), sites.central), error


def stored_error(matrix: Tensor, mpo: MPO) -> tuple[float, float]:
    """‖W−Ŵ‖_F and ‖W‖_F of a matrix and its MPO as stored, in float64, some rows at a time.

    Measured, not derived: it holds for cores that were rounded to half precision too.
    """
    wide = working_dtype(matrix.device)
    out_dims, central = mpo.site_shape.out_dims, mpo.central
    cores: list[Tensor] = [core if k == central else core.to(wide) for k, core in enumerate(mpo.cores)]
    rows_by_site = torch.arange(math.prod(out_dims), device=matrix.device).reshape(out_dims)
    step = -(-out_dims[central] // _ERROR_BLOCKS)
    difference = norm = 0.0
    for first in range(0, out_dims[central], step):  # a few row digits of the central core, the large one
        digits = slice(first, first + step)
        rows = rows_by_site.movedim(central, 0)[digits].movedim(0, central).reshape(-1)
        inside = rows < mpo.shape[0]
        target = matrix[rows[inside]].to(wide)
        norm += float(target.square().sum())
        block = to_dense([*cores[:central], cores[central][:, digits].to(wide), *cores[central + 1 :]])
        difference += float(block[inside, : mpo.shape[1]].sub_(target).square_().sum())
    return math.sqrt(difference), math.sqrt(norm)

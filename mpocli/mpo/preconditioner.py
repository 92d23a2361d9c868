"""The inverse of a core's normal equations, exact or close to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpocli.errors import NumericsError
from mpocli.mpo.environment import Environment

_JITTER = 1e-12

Solver = Callable[[Tensor], Tensor]


def by_inputs(environment: Environment, gram: Tensor | None, output: Tensor | None, dtype: torch.dtype) -> Solver:
    """(Eᵀ (1 ⊗ G) E)⁻¹ ⊗ (mean of H over the other sites)⁻¹, on cores (a, o, i, b).

    Exact without output weights. Forms and factorises a matrix of (a i b) unknowns.
    """
    columns = _factored(environment.normal(gram).to(dtype))
    _, own, _ = environment.means(output, rows=True)
    rows = _factored(own.to(dtype)) if own is not None else None

    def solve(x: Tensor) -> Tensor:
        a, o, i, b = x.shape
        flat = torch.cholesky_solve(x.permute(0, 2, 3, 1).reshape(-1, o), columns)
        x = flat.reshape(a, i, b, o).permute(0, 3, 1, 2)
        return x if rows is None else _along(x, 1, rows)

    return solve


def by_factors(environment: Environment, gram: Tensor | None, output: Tensor | None, dtype: torch.dtype) -> Solver:
    """The inverse of a Kronecker product with one factor for each side of the core (a, o, i, b).

    H and G are taken for the product of their means over this site and the sites on either side, as in Kronecker-
    factored curvature (Martens and Grosse, ICML 2015, §3): the sites on the left then make the factor of a, those on
    the right that of b.
    """
    row_left, row, row_right = environment.means(output, rows=True)
    column_left, column, column_right = environment.means(gram, rows=False)
    lefts = environment.left.permute(2, 0, 1)  # (a, o_<, i_<)
    factors = [_seen(lefts, row_left, column_left), row, column, _seen(environment.right, row_right, column_right)]
    factored = [None if factor is None else _factored(factor.to(dtype)) for factor in factors]

    def solve(x: Tensor) -> Tensor:
        for dim, factor in enumerate(factored):
            x = x if factor is None else _along(x, dim, factor)
        return x

    return solve


def _seen(around: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Eᵀ (H ⊗ G) E of the cores on one side, E (b, o, i): (b, b)."""
    weighted = around if rows is None else rows @ around
    weighted = weighted if columns is None else weighted @ columns
    return weighted.reshape(len(around), -1) @ around.reshape(len(around), -1).T


def _along(x: Tensor, dim: int, factor: Tensor) -> Tensor:
    moved = x.movedim(dim, 0)
    return torch.cholesky_solve(moved.reshape(len(moved), -1), factor).reshape(moved.shape).movedim(0, dim)


def _factored(matrix: Tensor) -> Tensor:
    """A Cholesky factor of a positive semi-definite matrix, with as little added as it takes."""
    matrix = (matrix + matrix.T) / 2
    scale = float(matrix.diagonal().mean())
    jitter = _JITTER
    while jitter < 1.0:
        matrix.diagonal().add_(jitter * scale if scale > 0.0 else 1.0)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor
        jitter *= 100
    raise NumericsError("the normal equations of a core cannot be solved", hint="look for extreme values in the inputs")

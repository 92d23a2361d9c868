"""Rounding that knows the inputs: each column's error is made up for by the columns that are still to be rounded.

Frantar, Ashkboos, Hoefler and Alistarh, GPTQ (ICLR 2023), which is Babai's nearest-plane algorithm in the lattice of
the inputs' Gram matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpocli.quant.grid import Grid, Rounded, best_scales, codes_of, nearest, searched

# Columns after which the errors are passed on to all that follow, at once.
_BLOCK = 128


def gptq(matrix: Tensor, gram: Tensor, grid: Grid) -> Rounded:
    """W (R, C) on its grids, with a small tr(D G Dᵀ) of the difference D; G (C, C) positive definite.

    Never worse in that norm than `nearest` and `searched`, the best of the three is given back. A group's scales are
    those of least squared error of what its columns are when their turn comes, each column counted by 1/[G⁻¹]_jj of the
    columns that are left. `gram` is expected regularised (`mpo.gram`): its Cholesky factor is taken once, in float64.
    Raises `NumericsError` where it is not positive definite, and what `nearest` raises.
    """
    rounded = [nearest(matrix, grid), searched(matrix, grid, gram.diagonal()), _passed_on(matrix, gram, grid)]
    wide = matrix.to(gram.dtype)

    def loss(made: Rounded) -> float:
        difference = wide - made.values(torch.float32).to(gram.dtype)
        return float(((difference @ gram) * difference).sum())

    return min(rounded, key=loss)


def _passed_on(matrix: Tensor, gram: Tensor, grid: Grid) -> Rounded:
    rows, columns = matrix.shape
    root = inverse_root(gram).to(torch.float32)
    work = matrix.to(torch.float32).T.contiguous()  # a row of it is a column: contiguous
    size = grid.size(columns)
    counts = root.diagonal().reciprocal().square()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(grid.groups(columns), rows, dtype=torch.float16, device=matrix.device)
    offsets = torch.empty_like(scales) if grid.offsets else scales.new_empty(0, rows)
    block = size if size >= _BLOCK else _BLOCK // size * size
    steps = torch.zeros(rows, 1)
    starts = torch.zeros(rows, 1)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part, local = work[first:last], root[first:last, first:last]
        errors = torch.empty_like(part)
        for j in range(last - first):
            if (first + j) % size == 0:
                here = part[j : j + size].T.unsqueeze(1).contiguous()  # (R, 1, S)
                weights = counts[first + j : first + j + size].reshape(1, 1, -1)
                found = best_scales(here, grid, weights)
                number = (first + j) // size
                scales[number] = found[0][:, 0]
                if grid.offsets:
                    offsets[number] = found[1][:, 0]
                steps, starts = found
            column = part[j].unsqueeze(-1).unsqueeze(-1)  # (R, 1, 1)
            code = codes_of(column, steps, starts, grid)
            codes[first + j] = code.reshape(-1).to(torch.uint8)
            value = (starts.float() if grid.offsets else -(grid.levels // 2) * steps.float()) + steps.float() * code[
                ..., 0
            ]
            errors[j] = (part[j] - value[:, 0]) / local[j, j]
            part[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        work[last:].addmm_(root[first:last, last:].T, errors, alpha=-1)
    return Rounded(grid, codes.T.contiguous(), scales.T.contiguous(), offsets.T.contiguous())


def inverse_root(gram: Tensor) -> Tensor:
    """Upper triangular U with UᵀU = G⁻¹; U_jj² is [G⁻¹]_jj of the columns from j on.

    With J G J = L Lᵀ, J the reversal, U = J L⁻¹ J. Raises `torch.linalg.LinAlgError` where G is not positive definite.

    >>> inverse_root(torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]], dtype=torch.float64)
    """
    lower = torch.linalg.cholesky(gram.flip(0, 1))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1)

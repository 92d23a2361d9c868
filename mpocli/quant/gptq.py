"""Rounding that knows the inputs: each column's error is made up for by the columns that are still to be rounded.

Frantar, Ashkboos, Hoefler and Alistarh, GPTQ (ICLR 2023), which is Babai's nearest-plane algorithm in the lattice of
the inputs' Gram matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpocli.mpo.gram import inverse_root
from mpocli.quant.grid import Grid, Rounded, best_scales, codes_of, nearest, searched, start_of

# Columns after which the errors are passed on to all that follow, at once.
_BLOCK = 128
# Of the mean of the diagonal, what is added to it until its inverse has a root.
_DAMPINGS = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)


def gptq(matrix: Tensor, gram: Tensor, grid: Grid) -> Rounded:
    """W (R, C) on its grids, with a small tr(D G Dᵀ) of the difference D; G (C, C) positive semi-definite.

    Never worse in that norm than `nearest` and `searched`, the best of the three is given back. A group's scales are
    those of least squared error of what its columns are when their turn comes, each column counted by 1/[G⁻¹]_jj of the
    columns that are left. `gram` is expected regularised (`mpo.gram`): its Cholesky factor is taken once, in float64,
    with the least of `_DAMPINGS` that it takes. Raises `NumericsError` where none of them suffices, and what `nearest`
    raises.
    """
    rounded = [nearest(matrix, grid), searched(matrix, grid, gram.diagonal()), _passed_on(matrix, gram, grid)]
    wide = matrix.to(gram.dtype)

    def loss(made: Rounded) -> float:
        difference = wide - made.values(torch.float32).to(gram.dtype)
        return float(((difference @ gram) * difference).sum())

    return min(rounded, key=loss)


def _passed_on(matrix: Tensor, gram: Tensor, grid: Grid) -> Rounded:
    rows, columns = matrix.shape
    root = inverse_root(gram, _DAMPINGS, hint="round to nearest").to(torch.float32)
    work = matrix.to(torch.float32).T.contiguous()  # a row of it is a column: contiguous
    size = grid.size(columns)
    counts = root.diagonal().reciprocal().square()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(grid.groups(columns), rows, dtype=torch.float16, device=matrix.device)
    offsets = torch.empty_like(scales) if grid.offsets else scales.new_empty(0, rows)
    block = _block(size, columns)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part, local = work[first:last], root[first:last, first:last]
        errors = torch.empty_like(part)
        for j in range(last - first):
            group, begun = divmod(first + j, size)
            if not begun:
                here = slice(first + j, first + j + size)
                found = best_scales(work[here].T.unsqueeze(1).contiguous(), grid, counts[here].reshape(1, 1, -1))
                scales[group] = found[0][:, 0]
                if grid.offsets:
                    offsets[group] = found[1][:, 0]
                steps, starts = found[0].float(), start_of(found[0].float().unsqueeze(-1), found[1], grid)[..., 0]
            code = codes_of(part[j].reshape(rows, 1, 1), *found, grid)[..., 0]
            codes[first + j] = code[:, 0].to(torch.uint8)
            errors[j] = (part[j] - (starts + steps * code)[:, 0]) / local[j, j]
            part[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        work[last:].addmm_(root[first:last, last:].T, errors, alpha=-1)
    return Rounded(grid, codes.T.contiguous(), scales.T.contiguous(), offsets.T.contiguous())


def _block(size: int, columns: int) -> int:
    """Columns of a block, in which no group begins but with it or to end in it: its scales are found of columns that
    all the errors before them have reached."""
    if size <= _BLOCK:
        return _BLOCK // size * size
    return _BLOCK if size == columns or size % _BLOCK == 0 else size

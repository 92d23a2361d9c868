"""Grids for the entries that a sparse matrix keeps, and for those alone.

A group is a run of `group` kept entries, row after row (the last one may be shorter), or with `group` 0 what a row
keeps. Codes (kept,) are in that order, scales and offsets (groups,).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpocli.quant.grid import Grid, Rounded, dequantised, nearest, searched


def round_kept(matrix: Tensor, mask: Tensor, grid: Grid, *, searches: bool = True) -> Rounded:
    """What a mask (R, C) of booleans keeps of a matrix, to nearest, or on the grids of least squared error.

    Raises `NumericsError` where an entry is so large that no float16 scale reaches it.
    """
    if not bool(mask.any()):
        none = torch.zeros(len(mask) if grid.group == 0 else 0, dtype=torch.float16, device=matrix.device)
        return Rounded(grid, mask.new_empty(0, dtype=torch.uint8), none, none if grid.offsets else none[:0])
    if grid.group:
        values = matrix[mask].reshape(1, -1)
        made = searched(values, grid) if searches else nearest(values, grid)
        codes = made.codes.reshape(-1)
    else:
        # What is dropped is given a value that its row keeps, so that no grid is wider for it, and counts nothing.
        largest = matrix.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
        filled = torch.where(mask, matrix, largest.nan_to_num(neginf=0.0))
        made = searched(filled, grid, mask) if searches else nearest(filled, grid)
        codes = made.codes[mask]
    return replace(made, codes=codes, scales=made.scales.reshape(-1), offsets=made.offsets.reshape(-1))


def kept_values(codes: Tensor, scales: Tensor, offsets: Tensor, mask: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The matrix (R, C) of codes on their grids, with zeros where the mask drops."""
    if not len(codes):
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    if grid.group:
        values = dequantised(codes.reshape(1, -1), scales.reshape(1, -1), offsets.reshape(1, -1), grid, dtype)
    else:
        rows = mask.nonzero()[:, 0]
        own = offsets[rows].unsqueeze(1) if grid.offsets else offsets.new_empty(len(codes), 0)
        values = dequantised(codes.unsqueeze(1), scales[rows].unsqueeze(1), own, grid, dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter_(mask, values)

"""From packed codes to values: what `unpack_codes` and `dequantised` give one after the other, in fewer passes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mpocli.quant.codes import unpack_codes
from mpocli.quant.grid import Grid, dequantised, narrowed

# Entries at a time: what lies between codes and values stays in a cache, and a large table has no second copy.
_ENTRIES = 1 << 22
# By bits: those of an index into the table of codes, and what holds the index's two or four float32 side by side.
_TOGETHER = {4: (8, torch.float64), 3: (12, torch.complex128), 2: (8, torch.complex128)}


def values(packed: Tensor, scales: Tensor, offsets: Tensor, grid: Grid, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix (R, columns) in `dtype` of codes as `pack_codes` makes them; scales and offsets as in `Rounded`.

    Computed in float32, bit by bit what `dequantised` gives. Raises what `unpack_codes` raises.
    """
    rows = len(packed)
    if rows * columns <= _ENTRIES:
        return _values(packed, scales, offsets, grid, columns, dtype)
    found = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    step = max(1, _ENTRIES // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found[part] = _values(packed[part], scales[part], offsets[part], grid, columns, dtype)
    return found


def _values(packed: Tensor, scales: Tensor, offsets: Tensor, grid: Grid, columns: int, dtype: torch.dtype) -> Tensor:
    rows, width = packed.shape
    size, groups = grid.size(columns), grid.groups(columns)
    # A traced tensor must not meet a table that is kept between calls; rows that end inside a byte or group are rare.
    is_even = columns * grid.bits == width * 8 and columns == size * groups
    if not is_even or type(packed) is not Tensor or packed.dtype != torch.uint8:
        return dequantised(unpack_codes(packed, grid.bits, columns), scales, offsets, grid, dtype)
    start = 0 if grid.offsets else grid.levels // 2
    if grid.bits == 8:
        steps = packed.to(torch.float32)
        steps = steps.sub_(start) if start else steps
    else:
        steps = _table(grid.bits, start, packed.device).index_select(0, _indices(packed, grid.bits)).view(torch.float32)
    steps = steps.view(rows, groups, size)
    scale = scales.float().unsqueeze(-1)
    # With 0 added what is −0.0 is 0.0, as `dequantised` has it.
    steps = torch.addcmul(offsets.float().unsqueeze(-1), steps, scale) if grid.offsets else steps.mul_(scale).add_(0.0)
    return narrowed(steps, dtype).view(rows, columns)


def _indices(packed: Tensor, bits: int) -> Tensor:
    """Where the table has the codes of each byte, or of each half of three bytes."""
    if bits != 3:
        return packed.reshape(-1).to(torch.int32)
    low, middle, high = packed.reshape(-1, 3).to(torch.int32).unbind(1)
    return torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], 1).reshape(-1)


@cache
def _table(bits: int, start: int, device: torch.device) -> Tensor:
    """For every index its codes less `start`, as float32 side by side in one wider number."""
    width, together = _TOGETHER[bits]
    index = torch.arange(2**width)
    codes = [((index >> shift) & (2**bits - 1)) - start for shift in range(0, width, bits)]
    return torch.stack(codes, -1).to(torch.float32).view(together).squeeze(-1).to(device)

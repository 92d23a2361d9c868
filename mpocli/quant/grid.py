"""A grid of 2^b levels for every group of a matrix's entries: its scales, rounding to it, and back.

A group is a run of `group` entries along a row (the last one of a row may be shorter), or with `group` 0 the whole row.
Levels are s·(k − 2^{b−1}) for k = 0 … 2^b − 1 without offsets, and s·k + m with them; s and m are float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpocli.errors import InputError, NumericsError
from mpocli.quant.sizes import BITS

# Shares of the largest entry that a search for scales tries as the end of the grid.
_SHARES = tuple(1.0 - 0.05 * k for k in range(13))
_LARGEST = 65504.0  # of float16
_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Grid:
    """Which grids a matrix is rounded to: bits a code, entries a group (0: a row), and whether they have offsets.

    Raises `InputError` for bits that cannot be packed or a group below 0.
    """

    bits: int
    group: int = 64
    offsets: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"grids of {self.bits} bits: there are 2, 3, 4 and 8")
        if self.group < 0:
            raise InputError(f"groups of {self.group} entries: at least 1, or 0 for a row")

    def groups(self, columns: int) -> int:
        """Groups of a row."""
        return -(-columns // self.group) if self.group else 1

    @property
    def levels(self) -> int:
        return int(1 << self.bits)

    def size(self, columns: int) -> int:
        """Entries of a full group of a row of so many columns."""
        return min(self.group or columns, columns)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix (R, C) on its grids: `codes` (R, C) in uint8, `scales` and `offsets` (R, groups; or 0) in float16."""

    grid: Grid
    codes: Tensor
    scales: Tensor
    offsets: Tensor

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (R, C), computed in float32."""
        return dequantised(self.codes, self.scales, self.offsets, self.grid, dtype)


def dequantised(codes: Tensor, scales: Tensor, offsets: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The matrix (R, C) of codes on their grids."""
    rows, columns = codes.shape
    size, groups = grid.size(columns), grid.groups(columns)
    padded = torch.nn.functional.pad(codes, (0, groups * size - columns)) if groups * size != columns else codes
    scale = scales.float().unsqueeze(-1)
    # Exact without offsets, so that a level of 0 is never −0.0.
    steps = torch.addcmul(start_of(scale, offsets, grid), padded.reshape(rows, groups, size).to(torch.float32), scale)
    return narrowed(steps, dtype).reshape(rows, -1)[:, :columns].contiguous()


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (float32, which may be overwritten) in another dtype: the last level may lie beyond float16's end, where
    no entry was."""
    return (values.clamp_(-_LARGEST, _LARGEST) if dtype == torch.float16 else values).to(dtype)


def nearest(matrix: Tensor, grid: Grid) -> Rounded:
    """Round to nearest: every entry at most half a step off, and no entry beyond the ends of its grid.

    Raises `NumericsError` where an entry is so large that no float16 scale reaches it.
    """
    grouped = _grouped(matrix, grid)
    scales, offsets = _spanning(grouped, grid)
    return _rounded(matrix, grouped, scales, offsets, grid)


def searched(matrix: Tensor, grid: Grid, weights: Tensor | None = None) -> Rounded:
    """Round to nearest on the grids of least squared error among those that end at a share of the largest entry.

    `weights` (C,) count the columns, or (R, C) the entries; None counts all the same. Raises what `nearest` does.
    """
    grouped = _grouped(matrix, grid)
    columns = matrix.shape[1]
    missing = grid.groups(columns) * grid.size(columns) - columns
    if weights is None and missing:
        weights = grouped.new_ones(columns)
    if weights is not None:  # what fills up a last group counts nothing
        weights = torch.nn.functional.pad(weights.reshape(-1, columns).to(grouped), (0, missing))
        weights = weights.reshape(len(weights), *grouped.shape[1:])
    scales, offsets = best_scales(grouped, grid, weights)
    return _rounded(matrix, grouped, scales, offsets, grid)


def best_scales(grouped: Tensor, grid: Grid, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and offsets of (R, G, S) groups, of least squared error in `weights` (1 or R, G, S); one a group."""
    first = _spanning(grouped, grid)
    best, least = first, _error(grouped, *first, grid, weights)
    for share in _SHARES:
        for sign in (1.0,) if grid.offsets else (1.0, -1.0):
            tried = _spanning(grouped, grid, share, sign)
            error = _error(grouped, *tried, grid, weights)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1])
    return best


def codes_of(grouped: Tensor, scales: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of (…, G, S) groups on grids of (…, G), as floating-point numbers."""
    steps = scales.to(grouped).unsqueeze(-1)
    start = start_of(steps, offsets, grid)
    inverse = torch.where(steps == 0, torch.zeros_like(steps), 1 / steps)
    return ((grouped - start) * inverse).round_().clamp_(0, grid.levels - 1)


def start_of(steps: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
    """What the codes 0 stand for, of the steps (…, G, 1) of grids and their offsets (…, G)."""
    return offsets.to(steps).unsqueeze(-1) if grid.offsets else -(grid.levels // 2) * steps


def _error(grouped: Tensor, scales: Tensor, offsets: Tensor, grid: Grid, weights: Tensor | None) -> Tensor:
    codes = codes_of(grouped, scales, offsets, grid)
    steps = scales.to(grouped).unsqueeze(-1)
    start = start_of(steps, offsets, grid)
    squares = codes.mul_(steps).add_(start).sub_(grouped).square_()
    return (squares if weights is None else squares.mul_(weights)).sum(-1)


def _spanning(grouped: Tensor, grid: Grid, share: float = 1.0, sign: float = 0.0) -> tuple[Tensor, Tensor]:
    """Grids that reach a share of the largest entries of (R, G, S): (scales, offsets) in float16, rounded outwards.

    Without offsets 0 is a level, and one side has a level more: with a `sign` of ±1 that is the side of the entry of
    that sign; with 0 both sides are reached by the shorter one.
    """
    if grid.offsets:
        low, high = grouped.amin(-1).mul(share), grouped.amax(-1).mul(share)
        offsets = _half(low, up=False)
        return _half((high - offsets.to(high)) / (grid.levels - 1), up=True), offsets
    half = grid.levels // 2
    if sign == 0.0:
        scales = _half(grouped.abs().amax(-1) / (half - 1), up=True)
    else:
        low, high = grouped.amin(-1), grouped.amax(-1)
        larger = torch.where(-low > high, low, high).mul(share)
        scales = _half(larger.abs() / half, up=True) * torch.sign(-larger).to(torch.float16) * sign
    return scales, scales.new_zeros(*scales.shape[:-1], scales.shape[-1])


def _half(values: Tensor, *, up: bool) -> Tensor:
    """float16, rounded up (or down): a grid has to reach what it is to hold."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > _LARGEST:
        raise NumericsError(
            f"an entry needs a scale of {largest:.3g}, and float16 ends at {_LARGEST:g}",
            hint="keep this tensor wide with ‹ignore›",
        )
    rounded = values.to(torch.float16)
    short = rounded.to(values) < values if up else rounded.to(values) > values
    towards = torch.full_like(rounded, float("inf") if up else -float("inf"))
    return torch.where(short, torch.nextafter(rounded.cpu(), towards.cpu()).to(rounded.device), rounded)


def _grouped(matrix: Tensor, grid: Grid) -> Tensor:
    """(R, G, S) in float32, a last group that is shorter filled with copies of its last entry."""
    rows, columns = matrix.shape
    size, groups = grid.size(columns), grid.groups(columns)
    wide = matrix.to(torch.float32)
    missing = groups * size - columns
    if missing:
        wide = torch.cat([wide, wide[:, -1:].expand(rows, missing)], 1)
    return wide.reshape(rows, groups, size)


def _rounded(matrix: Tensor, grouped: Tensor, scales: Tensor, offsets: Tensor, grid: Grid) -> Rounded:
    rows, columns = matrix.shape
    codes = codes_of(grouped, scales, offsets, grid).to(torch.uint8).reshape(rows, -1)[:, :columns].contiguous()
    return Rounded(grid, codes, scales, offsets if grid.offsets else offsets.new_zeros(rows, 0))

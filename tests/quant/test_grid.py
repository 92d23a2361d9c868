"""Grids, and codes that are packed: laws that hold for every number of bits, group and width."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from mpocli.errors import InputError, NumericsError
from mpocli.quant.codes import pack_codes, unpack_codes
from mpocli.quant.grid import Grid, Rounded, nearest, searched
from mpocli.quant.kept import kept_values, round_kept
from mpocli.quant.sizes import BITS, row_bytes

GRIDS = [Grid(bits, group, offsets) for bits, group, offsets in product(BITS, (0, 1, 16), (False, True))]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


AWKWARD = {
    "random": _random(0, 5, 37),
    "equal": torch.full((3, 37), 0.3),
    "equal and large": torch.full((3, 37), -1e4),
    "zero rows": torch.cat([torch.zeros(2, 37), _random(1, 2, 37)]),
    "outliers": _random(2, 3, 37).index_fill(1, torch.tensor([5]), 1e4),
    "one sided": _random(3, 4, 37).abs() + 5,
    "subnormal": (_random(4, 3, 37) * 1e-39).to(torch.bfloat16),
    "half": _random(5, 3, 37).mul(1e4).clamp(-65504, 65504).to(torch.float16),
    "double": _random(6, 3, 37).double(),
    "one entry": _random(7, 1, 1),
}


def _step(rounded: Rounded, columns: int) -> Tensor:
    return rounded.scales.float().abs().repeat_interleave(rounded.grid.size(columns), 1)[:, :columns]


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_come_back_and_take_no_bit_more(bits: int) -> None:
    for columns in (*range(1, 18), 31, 64, 255):
        codes = torch.randint(
            0, 1 << bits, (3, columns), generator=torch.Generator().manual_seed(columns), dtype=torch.uint8
        )
        packed = pack_codes(codes, bits)
        assert packed.shape == (3, row_bytes(columns, bits)) == (3, (columns * bits + 7) // 8)
        assert torch.equal(unpack_codes(packed, bits, columns), codes)
        for row, line in zip(codes.tolist(), packed.tolist(), strict=True):  # as one number, the first code lowest
            number = sum(code << (bits * place) for place, code in enumerate(row))
            assert bytes(line) == number.to_bytes(len(line), "little")


@pytest.mark.parametrize("bits", BITS)
def test_rows_that_are_cut_short_or_no_bytes_are_refused(bits: int) -> None:
    packed = pack_codes(torch.ones(2, 11, dtype=torch.uint8), bits)
    with pytest.raises(InputError, match="were expected"):
        unpack_codes(packed[:, :-1], bits, 11)
    with pytest.raises(InputError, match="were expected"):
        unpack_codes(packed.to(torch.int16), bits, 11)


@pytest.mark.parametrize("name", AWKWARD)
def test_nearest_is_at_most_half_a_step_off_and_a_search_no_worse_in_squares(name: str) -> None:
    matrix = AWKWARD[name]
    for grid in GRIDS:
        made, found = nearest(matrix, grid), searched(matrix, grid)
        step, wide = _step(made, matrix.shape[1]), matrix.double()
        error = (made.values().double() - wide).abs()
        assert bool((error <= step * 0.5 * (1 + 1e-5) + wide.abs() * 1e-6).all()), grid
        assert int(made.codes.max()) < 1 << grid.bits and made.scales.dtype == torch.float16
        squares = [float((one.values().double() - wide).square().sum()) for one in (made, found)]
        assert squares[1] <= squares[0] * (1 + 1e-5) + 1e-12, grid
        values = made.values(matrix.dtype)
        assert bool(torch.isfinite(values).all())
        # Without offsets 0 is a level, and it is never −0.0.
        assert grid.offsets or not bool(torch.signbit(values[values == 0]).any()), grid


def test_codes_are_those_of_a_loop_over_every_entry() -> None:
    matrix = _random(8, 4, 21)
    for grid in (Grid(2, 1), Grid(2, 7, offsets=True), Grid(3, 0), Grid(3, 16, offsets=True), Grid(4, 7), Grid(8, 16)):
        made = searched(matrix, grid)
        half = 0 if grid.offsets else grid.levels // 2
        for row, column in product(range(4), range(21)):
            group = column // (grid.group or 21)
            scale = float(made.scales[row, group])
            start = float(made.offsets[row, group]) if grid.offsets else 0.0
            levels = [start + scale * (code - half) for code in range(grid.levels)]
            best = min(abs(level - float(matrix[row, column])) for level in levels)
            chosen = levels[int(made.codes[row, column])]
            assert abs(chosen - float(matrix[row, column])) <= best + 1e-5
            assert float(made.values()[row, column]) == pytest.approx(chosen, abs=1e-6)


def test_constants_are_kept_where_a_grid_has_an_offset() -> None:
    matrix = torch.tensor([[0.25] * 9, [-4096.0] * 9])
    assert torch.equal(nearest(matrix, Grid(2, 4, offsets=True)).values(), matrix)


@pytest.mark.parametrize("do", [nearest, searched])
def test_what_no_float16_scale_reaches_is_one_clear_line(do: object) -> None:
    with pytest.raises(NumericsError, match=r"an entry needs a scale of 1e\+06, and float16 ends at 65504"):
        do(torch.tensor([[1.0, 1e6]]), Grid(2, 0))  # type: ignore[operator]


@pytest.mark.parametrize(("bits", "group"), [(5, 64), (1, 64), (4, -1)])
def test_grids_that_cannot_be_packed_are_refused(bits: int, group: int) -> None:
    with pytest.raises(InputError, match=r"grids of|groups of"):
        Grid(bits, group)


@pytest.mark.parametrize("searches", [False, True])
def test_kept_entries_have_grids_of_their_own_and_what_is_dropped_stays_zero(searches: bool) -> None:
    matrix = _random(9, 6, 23) + 3.0  # far from 0: no grid of the kept entries has to reach it
    mask = _random(10, 6, 23) > 0.6
    mask[2] = False
    for grid in GRIDS:
        made = round_kept(matrix, mask, grid, searches=searches)
        kept = int(mask.sum())
        groups = -(-kept // grid.group) if grid.group else 6
        assert made.codes.shape == (kept,) and made.scales.shape == (groups,)
        values = kept_values(made.codes, made.scales, made.offsets, mask, grid, torch.float32)
        assert not bool(values[~mask].any())
        error = (values - matrix)[mask].abs()
        if grid.group:
            step = made.scales.float().abs().repeat_interleave(grid.group)[:kept]
        else:
            step = made.scales.float().abs()[mask.nonzero()[:, 0]]
        assert searches or bool((error <= step / 2 * (1 + 1e-5) + 1e-5).all())
        if grid.group and not searches:  # and they are rounded as if nothing lay between them
            assert torch.equal(made.codes, nearest(matrix[mask][None], grid).codes[0])


def test_a_matrix_that_keeps_nothing_has_no_codes() -> None:
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    for grid in GRIDS:
        made = round_kept(torch.zeros(3, 4), nothing, grid)
        assert not made.codes.numel()
        values = kept_values(made.codes, made.scales, made.offsets, nothing, grid, torch.bfloat16)
        assert torch.equal(values, torch.zeros(3, 4, dtype=torch.bfloat16))

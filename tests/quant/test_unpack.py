"""Codes to values in few passes, against the two steps that say what they are."""

from __future__ import annotations

import pytest
import torch

from mpocli.errors import InputError
from mpocli.quant import unpack
from mpocli.quant.codes import pack_codes, unpack_codes
from mpocli.quant.grid import Grid, dequantised, searched


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(48, 16), (48, 0), (40, 16), (13, 5), (1, 0)])
def test_values_are_bit_by_bit_those_of_the_two_steps(
    monkeypatch: pytest.MonkeyPatch, bits: int, offsets: bool, columns: int, group: int
) -> None:
    grid = Grid(bits, group, offsets)
    matrix = torch.randn(7, columns, generator=torch.Generator().manual_seed(bits))
    matrix[2] *= (65504 if bits == 8 else 5e4) / float(matrix[2].abs().max())  # as far as float16 goes
    rounded = searched(matrix, grid)
    packed = pack_codes(rounded.codes, bits)
    for dtype, word in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        codes = unpack_codes(packed, bits, columns)
        expected = dequantised(codes, rounded.scales, rounded.offsets, grid, dtype)
        for entries in (1 << 22, 3 * columns, 1):  # whole, in pieces of three rows, and of one
            monkeypatch.setattr(unpack, "_ENTRIES", entries)
            found = unpack.values(packed, rounded.scales, rounded.offsets, grid, columns, dtype)
            assert found.dtype == dtype and bool(found.isfinite().all())
            assert torch.equal(found.view(word), expected.view(word))  # −0.0 is not 0.0


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="8 bytes were expected"):
        unpack.values(torch.zeros(2, 7, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 0), Grid(4), 16, torch.half)

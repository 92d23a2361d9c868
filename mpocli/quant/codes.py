"""Codes of 2, 3, 4 or 8 bits packed without waste, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from mpocli.errors import InputError
from mpocli.quant.sizes import row_bytes

# (codes, bytes) of the shortest run of codes that fills whole bytes.
_RUNS = {8: (1, 1), 4: (2, 1), 3: (8, 3), 2: (4, 1)}


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 … 2^bits − 1 of (R, C) as bytes of (R, ⌈C · bits / 8⌉), the first code in the lowest bits.

    >>> pack_codes(torch.tensor([[1, 2, 3]]), 4)
    tensor([[33,  3]], dtype=torch.uint8)
    """
    rows, columns = codes.shape
    count, width = _RUNS[bits]
    runs = torch.nn.functional.pad(codes.to(torch.int32), (0, -columns % count)).reshape(rows, -1, count)
    word = torch.zeros(runs.shape[:2], dtype=torch.int32, device=codes.device)
    for k in range(count):
        word |= runs[..., k] << (bits * k)
    parts = torch.stack([(word >> (8 * k)) & 255 for k in range(width)], -1)
    return parts.reshape(rows, -1)[:, : row_bytes(columns, bits)].to(torch.uint8).contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """What `pack_codes` was given, (R, columns) as uint8. Raises `InputError` where the rows have another length."""
    rows, width_found = packed.shape
    if width_found != row_bytes(columns, bits) or packed.dtype != torch.uint8:
        raise InputError(
            f"rows of {width_found} elements of {packed.dtype} for {columns} codes of {bits} bits: "
            f"{row_bytes(columns, bits)} bytes were expected"
        )
    if bits == 8:
        return packed
    count, width = _RUNS[bits]
    runs = -(-columns // count)
    whole = torch.nn.functional.pad(packed, (0, runs * width - width_found)).reshape(rows, runs, width)
    if width == 1:
        found = [(whole[..., 0] >> (bits * k)) & (2**bits - 1) for k in range(count)]
    else:
        word = whole[..., 0].to(torch.int32)
        for k in range(1, width):
            word |= whole[..., k].to(torch.int32) << (8 * k)
        found = [((word >> (bits * k)) & (2**bits - 1)).to(torch.uint8) for k in range(count)]
    return torch.stack(found, -1).reshape(rows, -1)[:, :columns].contiguous()

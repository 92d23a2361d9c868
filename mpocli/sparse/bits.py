"""Sparse tensors as a bitmask and the values it keeps: one bit an entry, and each kept value in its own dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpocli.errors import InputError

_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_bits(mask: Tensor) -> Tensor:
    """Booleans of any shape as ⌈n/8⌉ bytes, in row-major order, the first entry in the lowest bit.

    >>> pack_bits(torch.tensor([True, False, True, False, False, False, False, False, True]))
    tensor([5, 1], dtype=torch.uint8)
    """
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    packed = flat[:, 0].clone()
    for bit in range(1, 8):
        packed |= flat[:, bit] << bit
    return packed


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """What `pack_bits` was given. Raises `InputError` where the number of bytes is not that of the shape."""
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != -(-numel // 8):
        raise InputError(
            f"a bitmask of {packed.numel()} {packed.dtype} elements for {numel} entries: {-(-numel // 8)} bytes "
            "were expected"
        )
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=packed.device)
    bits = (packed.reshape(-1, 1) & weights) != 0
    return bits.reshape(-1)[:numel].reshape(tuple(shape))


def pack_sparse(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(bitmask, values) of a tensor; an entry is dropped if all its bits are zero, so that −0.0 comes back too."""
    flat = tensor.detach().reshape(-1).contiguous()
    kept = is_kept(flat)
    return pack_bits(kept), flat[kept]


def is_kept(tensor: Tensor) -> Tensor:
    """Where not all bits of an entry are zero: −0.0 is kept."""
    whole = tensor.contiguous()
    return whole.view(_WORDS[whole.element_size()]) != 0


def unpack_sparse(packed: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense tensor, bit for bit. Raises `InputError` where mask and values do not belong together."""
    mask = unpack_bits(packed, shape)
    kept = int(mask.sum())
    if values.dim() != 1 or kept != values.numel():
        raise InputError(f"a bitmask that keeps {kept} entries, and {values.numel()} values")
    tensor = torch.zeros(tuple(shape), dtype=values.dtype, device=values.device)
    return tensor.masked_scatter_(mask, values)

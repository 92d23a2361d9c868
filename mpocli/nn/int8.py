"""torch's product of bfloat16 rows with whole numbers of eight bits, on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

# The kernel reads the weight anew for every row of the inputs: with more of them an unpacked one is as fast, where the
# processor multiplies bfloat16 itself.
_FEW_ROWS = 32


def is_faster(x: Tensor) -> bool:
    """Whether the kernel takes inputs (rows, I), and is faster than unpacking the weight for them."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not x.numel():
        return False
    return len(x) <= _FEW_ROWS or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(x: Tensor, whole: Tensor, scales: Tensor) -> Tensor:
    """x (rows, I) · (scales · whole)ᵀ for int8 (O, I) and a factor a row (O,): (rows, O) in bfloat16, rounded twice.

    A scale has more digits than bfloat16, in which the kernel would take it: it is multiplied apart.
    """
    ones = torch.ones_like(scales, dtype=x.dtype)
    found: Tensor = torch.ops.aten._weight_int8pack_mm.default(x.contiguous(), whole, ones)
    return (found.float() * scales.float()).to(x.dtype)

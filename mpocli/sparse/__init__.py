"""Numerics of sparsity: which entries go, how the rest is packed, and what one-shot pruning computes. torch only."""

from mpocli.sparse.bits import bitmask_bytes, pack_bits, pack_sparse, unpack_bits, unpack_sparse
from mpocli.sparse.masks import Pattern, global_masks, n_of_m_mask, rowwise_mask, smallest_mask, zeros_in
from mpocli.sparse.schedule import CubicSchedule

__all__ = [
    "CubicSchedule",
    "Pattern",
    "bitmask_bytes",
    "global_masks",
    "n_of_m_mask",
    "pack_bits",
    "pack_sparse",
    "rowwise_mask",
    "smallest_mask",
    "unpack_bits",
    "unpack_sparse",
    "zeros_in",
]

"""Numerics of sparsity: which entries go, how the rest is packed, and what one-shot pruning computes. torch only."""

from typing import TYPE_CHECKING

from mpocli.lazy import attributes

if TYPE_CHECKING:
    from mpocli.sparse.bits import pack_bits, pack_sparse, unpack_bits, unpack_sparse
    from mpocli.sparse.masks import Pattern, global_masks, n_of_m_mask, rowwise_mask, smallest_mask, zeros_in
    from mpocli.sparse.schedule import CubicSchedule

__all__ = [
    "CubicSchedule",
    "Pattern",
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

__getattr__ = attributes(
    __name__,
    {
        "bits": "pack_bits pack_sparse unpack_bits unpack_sparse",
        "masks": "Pattern global_masks n_of_m_mask rowwise_mask smallest_mask zeros_in",
        "schedule": "CubicSchedule",
    },
)

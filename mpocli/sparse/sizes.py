"""What a sparse tensor takes in the files."""

from __future__ import annotations


def bitmask_bytes(numel: int, nonzero: int, itemsize: int) -> int:
    """⌈n/8⌉ for the mask and `itemsize` for every kept value.

    >>> bitmask_bytes(1000, 100, 2)
    325
    """
    return -(-numel // 8) + nonzero * itemsize

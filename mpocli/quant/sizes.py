"""Bytes of packed codes, without torch."""

from __future__ import annotations

BITS = (8, 4, 3, 2)


def row_bytes(columns: int, bits: int) -> int:
    """Bytes that a row of so many codes takes: ⌈columns · bits / 8⌉.

    >>> row_bytes(10, 3), row_bytes(7, 4)
    (4, 4)
    """
    return -(-columns * bits // 8)

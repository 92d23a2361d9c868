"""Write a tensor as a bitmask and the values it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from mpocli.io.encoding import Adds, has_tombstone, part_names
from mpocli.sparse.bits import pack_sparse


def add_encoded(sink: Adds, name: str, tensor: Tensor) -> None:
    """Write a tensor as bitmask and values.

    One zero is left where a dense weight was: a loader that does not know the encoding then stops at its shape.
    """
    for part, stored in encode(name, tensor).items():
        sink.add(part, stored)


def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that stand for one in the files."""
    bits, values = pack_sparse(tensor)
    parts = dict(zip(part_names(name), (bits, values), strict=True))
    if has_tombstone(name):
        parts[name] = torch.zeros(1, dtype=tensor.dtype)
    return parts

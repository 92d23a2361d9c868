"""Tensors that the files hold as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpocli.io.encodings.base import Encoding, Part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dense(Encoding):
    """The tensor itself, of which no config.json says anything."""

    name = "dense"
    phrase = "a tensor"
    account = "a tensor"
    adjective = "dense"
    parts = (Part("", "tensor"),)

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)

    def unpack(self, *parts: Tensor) -> Tensor:
        return parts[0]

    def nbytes(self, zeros: int, itemsize: int) -> int:
        return math.prod(self.shape) * itemsize

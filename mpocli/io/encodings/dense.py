"""Tensors that the files hold as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpocli.io.encodings.base import D, Encoding, Part
from mpocli.io.tensor_spec import TensorSpec

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

    @property
    def code_bits(self) -> None:
        return None

    def misfit(self, name: str, parts: Sequence[TensorSpec[D]], dtypes: Mapping[str, D]) -> str:
        return ""

"""A stored tensor as its file's header has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from mpocli.io.dtypes import DType

D = TypeVar("D", bound=DType)


@dataclass(frozen=True)
class TensorSpec(Generic[D]):
    """Name, dtype and shape."""

    name: str
    dtype: D
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

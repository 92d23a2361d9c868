"""The size of a whole model, now and dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Totals:
    """The size of the whole model: parameters now and dense, their ratio (below 1 is smaller), and bytes.

    `bytes` = the weight files, `dense_bytes` = dense parameters × the stored dtype.
    """

    params: int
    dense_params: int
    ratio: float
    bytes: int
    dense_bytes: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Totals:
        counts = {name: int(data[name]) for name in ("params", "dense_params", "bytes", "dense_bytes")}
        return cls(ratio=float(data["ratio"]), **counts)

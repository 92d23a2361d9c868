"""Matrices rounded to grids of few bits, and a low rank of what the rounding took, in eight bits beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mpocli.io.encodings.base import Part, RoundedEncoding
from mpocli.io.encodings.quantised import Quantised

if TYPE_CHECKING:
    from torch import Tensor

    from mpocli.quant.grid import Rounded

FACTOR_BITS = 8


@dataclass(frozen=True)
class Corrected(RoundedEncoding):
    """W ≈ Q + U V: Q as a `Quantised` of the same fields, U (O, rank) and V (rank, I) in eight bits, a scale a row.

    The form of LQER, QERA and their kind (Zhang et al. 2024; Zhang et al. 2025); the matrix is whole in memory.

    >>> Corrected((768, 3072), bits=2, rank=16).nbytes(0, 0)
    726560
    """

    bits: int = 4
    group: int = 64
    offsets: bool = False
    transposed: bool = False
    dtype: str = "F32"
    rank: int = 8

    name = "corrected"
    phrase = "packed codes with a low rank beside them"
    account = "packed codes of few bits, corrected by a low rank in eight"
    adjective = "quantised"
    parts = (
        *(Part("_base", "codes", "U8"), Part("_base_s", "scales", "F16"), Part("_base_m", "offsets", "F16")),
        *(Part("_left", "left factor", "U8"), Part("_left_s", "scales of the left factor", "F16")),
        *(Part("_right", "right factor", "U8"), Part("_right_s", "scales of the right factor", "F16")),
    )

    @cached_property
    def base(self) -> Quantised:
        """Of Q."""
        return Quantised(self.shape, self.bits, self.group, self.offsets, self.transposed, self.dtype)

    @cached_property
    def factors(self) -> tuple[Quantised, Quantised]:
        """Of U and V."""
        rows, columns = self.base.matrix_shape
        made = (Quantised(shape, bits=FACTOR_BITS, group=0) for shape in ((rows, self.rank), (self.rank, columns)))
        left, right = made
        return left, right

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def layout(self) -> str:
        return f"{self.base.layout} and rank {self.rank}"

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Rounded to the grids of least squared error, and the truncated SVD of what that took."""
        import torch

        from mpocli.quant.grid import searched

        matrix = self.base.matrix(tensor).to(torch.float32)
        rounded = searched(matrix, self.base.grid)
        left, sizes, right = torch.linalg.svd(matrix - rounded.values(), full_matrices=False)
        left, right = left[:, : self.rank] * sizes[: self.rank], right[: self.rank]
        return self.parts_of(rounded, searched(left, self.factors[0].grid), searched(right, self.factors[1].grid))

    def parts_of(self, rounded: Rounded, left: Rounded, right: Rounded) -> tuple[Tensor, ...]:
        """The parts of Q, U and V that are on their grids."""
        outer, inner = self.factors
        return *self.base.parts_of(rounded), *outer.parts_of(left)[:2], *inner.parts_of(right)[:2]

    def unpack(self, *parts: Tensor) -> Tensor:
        outer, inner = self.factors
        none = parts[1].new_zeros(0)
        left = outer.unpack(*parts[3:5], none.reshape(len(parts[3]), 0))
        right = inner.unpack(*parts[5:7], none.reshape(len(parts[5]), 0))
        whole = self.base.unpack(*parts[:3])
        return whole + self.base.tensor(left @ right).to(whole.dtype)

    def problem(self, read: Any) -> str:
        return "" if bool(read().isfinite().all()) else "scales: not finite"

    def nbytes(self, zeros: int, itemsize: int) -> int:
        return self.base.nbytes(0, 0) + sum(factor.nbytes(0, 0) for factor in self.factors)

    def part_shapes(self) -> tuple[tuple[tuple[int, int], str], ...]:
        outer, inner = self.factors
        return *self.base.part_shapes(), *outer.part_shapes()[:2], *inner.part_shapes()[:2]

    @classmethod
    def own_fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        rank = int(data["rank"])
        if rank < 1:
            raise ValueError(f"a correction of rank {rank}")
        return Quantised.own_fields(data) | {"rank": rank}

"""Tensors rounded to grids of few bits: packed codes, and a scale (and an offset) for every group of entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from mpocli.io.dtypes import STORED_DTYPES
from mpocli.io.encodings.base import Part, RoundedEncoding

if TYPE_CHECKING:
    from torch import Tensor

    from mpocli.quant.grid import Grid, Rounded


@dataclass(frozen=True)
class Quantised(RoundedEncoding):
    """`bits` a code, groups of `group` entries along a row (0: whole rows) with or without `offsets`.

    A tensor is seen as a matrix: one of four dimensions or more by its last two together, others by the last one;
    `transposed` says that the rows are the tensor's columns, as where a layer stores its inputs first. `dtype` is that
    of the tensor it stands for, by safetensors' word.

    >>> Quantised((768, 3072), bits=4).nbytes(0, 4)
    1253376
    """

    bits: int = 4
    group: int = 64
    offsets: bool = False
    transposed: bool = False
    dtype: str = "F32"

    name = "quantised"
    phrase = "packed codes"
    account = "packed codes of few bits with their scales"
    adjective = "quantised"
    parts = (Part("_codes", "codes", "U8"), Part("_scales", "scales", "F16"), Part("_offsets", "offsets", "F16"))
    stays_packed = True

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns, the groups along the columns."""
        if self.transposed:
            return self.shape[1], self.shape[0]
        columns = math.prod(self.shape[-2:]) if len(self.shape) > 3 else self.shape[-1]
        return math.prod(self.shape) // columns, columns

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def layout(self) -> str:
        return f"{self.bits} bits in groups of {self.group or 'a row'}"

    @property
    def grid(self) -> Grid:
        from mpocli.quant.grid import Grid

        return Grid(self.bits, self.group, self.offsets)

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor as (rows, columns)."""
        return (tensor.T if self.transposed else tensor).reshape(self.matrix_shape)

    def tensor(self, matrix: Tensor) -> Tensor:
        """What `matrix` was given."""
        return (matrix.T if self.transposed else matrix).reshape(self.shape).contiguous()

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Rounded to the grids of least squared error. What was rounded already has its parts (`parts_of`)."""
        from mpocli.quant.grid import searched

        return self.parts_of(searched(self.matrix(tensor), self.grid))

    def parts_of(self, rounded: Rounded) -> tuple[Tensor, ...]:
        """The parts of a matrix that is on its grids."""
        from mpocli.quant.codes import pack_codes

        return pack_codes(rounded.codes, self.bits), rounded.scales, rounded.offsets

    def unpack(self, *parts: Tensor) -> Tensor:
        import torch

        from mpocli.quant.unpack import values

        codes, scales, offsets = parts
        dtype = getattr(torch, STORED_DTYPES[self.dtype].name)
        return self.tensor(values(codes, scales, offsets, self.grid, self.matrix_shape[1], dtype))

    def selected(self, parts: tuple[Tensor, ...], rows: Tensor) -> tuple[Self, tuple[Tensor, ...]] | None:
        """The encoding and parts of some rows (n,) of a matrix alone; None where its rows are no rows of codes."""
        if self.transposed or len(self.shape) != 2:
            return None
        chosen = replace(self, shape=(len(rows), self.shape[1]))
        return chosen, tuple(part.index_select(0, rows) for part in parts)

    def as_int8(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
        """Whole numbers (rows, columns) in int8 and a factor (rows,) for each row; None for any other grid."""
        import torch

        codes, scales, _ = parts
        if self.bits != 8 or self.offsets or self.groups != 1:
            return None
        return codes.bitwise_xor(128).view(torch.int8), scales.squeeze(1)

    def problem(self, read: Callable[[], Tensor]) -> str:
        """Every value is on its grid by construction; but a scale may be none."""
        return "" if bool(read().isfinite().all()) else "scales: not finite"

    def nbytes(self, zeros: int, itemsize: int) -> int:
        """Codes packed row by row, and two bytes for every scale and offset."""
        from mpocli.quant.sizes import row_bytes

        rows, columns = self.matrix_shape
        return rows * (row_bytes(columns, self.bits) + 2 * (1 + self.offsets) * self.groups)

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.matrix_shape[1] // self.group) if self.group else 1

    def part_shapes(self) -> tuple[tuple[tuple[int, int], str], ...]:
        from mpocli.quant.sizes import row_bytes

        rows, columns = self.matrix_shape
        codes = (rows, row_bytes(columns, self.bits))
        return (codes, "U8"), ((rows, self.groups), "F16"), ((rows, self.groups if self.offsets else 0), "F16")

    @classmethod
    def own_fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        bits, group, dtype = int(data["bits"]), int(data["group"]), str(data["dtype"])
        if bits not in (2, 3, 4, 8) or group < 0 or dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{bits} bits in groups of {group} for {dtype}")
        offsets, transposed = data["offsets"], data["transposed"]
        if not isinstance(offsets, bool) or not isinstance(transposed, bool):
            raise TypeError("offsets and transposed are true or false")
        if transposed and len(data["shape"]) != 2:
            raise ValueError(f"transposed, with {len(data['shape'])} dimensions")
        return {"bits": bits, "group": group, "offsets": offsets, "transposed": transposed, "dtype": dtype}

"""Sparse tensors of which the values that are kept are rounded to grids of few bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from mpocli.errors import InputError
from mpocli.io.dtypes import STORED_DTYPES
from mpocli.io.encodings.base import Part, RoundedEncoding
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.encodings.quantised import Quantised
from mpocli.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mpocli.quant.grid import Rounded


@dataclass(frozen=True)
class QuantisedBitmask(RoundedEncoding):
    """`bits`, `offsets`, `transposed` and `dtype` as in `Quantised`, `pattern` as in `Bitmask`. Of the matrix that
    `Quantised` sees, `kept` values are left, row after row, in groups of `group` (0: what a row keeps).

    >>> QuantisedBitmask((768, 3072), bits=4, kept=1000).nbytes(0, 4) - 768 * 3072 // 8
    532
    """

    bits: int = 4
    group: int = 64
    offsets: bool = False
    transposed: bool = False
    dtype: str = "F32"
    pattern: str = "unstructured"
    kept: int = 0

    name = "quantised_bitmask"
    phrase = "a bitmask and packed codes"
    account = "a bitmask and packed codes of few bits, with their scales, of the values it keeps"
    adjective = "sparse"
    parts = (
        Part("_kept", "bitmask", "U8"),
        Part("_levels", "codes", "U8"),
        Part("_steps", "scales", "F16"),
        Part("_starts", "offsets", "F16"),
    )
    holds_zeros = True

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def whole(self) -> Quantised:
        """The encoding of the same tensor with all its entries on grids."""
        return Quantised(self.shape, self.bits, self.group, self.offsets, self.transposed, self.dtype)

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Rounded to the grids of least squared error. What was rounded already has its parts (`parts_of`)."""
        from mpocli.quant.kept import round_kept

        matrix, mask = self.entries(tensor)
        return self.parts_of(mask, round_kept(matrix, mask, self.whole.grid))

    def entries(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix that a tensor is seen as, and what is kept of it: all that is no zero to the bit."""
        from mpocli.sparse.bits import is_kept

        matrix = self.whole.matrix(tensor.detach())
        return matrix, is_kept(matrix)

    def parts_of(self, mask: Tensor, rounded: Rounded) -> tuple[Tensor, ...]:
        """The parts of kept entries that are on their grids."""
        from mpocli.quant.codes import pack_codes
        from mpocli.sparse.bits import pack_bits

        levels = pack_codes(rounded.codes.reshape(1, -1), self.bits)[0]
        return pack_bits(mask), levels, rounded.scales, rounded.offsets

    def unpack(self, *parts: Tensor) -> Tensor:
        import torch

        from mpocli.quant.codes import unpack_codes
        from mpocli.quant.kept import kept_values
        from mpocli.sparse.bits import unpack_bits

        bits, levels, scales, offsets = parts
        mask = unpack_bits(bits, self.whole.matrix_shape)
        if int(mask.sum()) != self.kept:
            raise InputError(f"a bitmask that keeps {int(mask.sum())} entries, and codes of {self.kept}")
        codes = unpack_codes(levels.reshape(1, -1), self.bits, self.kept)[0]
        dtype = getattr(torch, STORED_DTYPES[self.dtype].name)
        return self.whole.tensor(kept_values(codes, scales, offsets, mask, self.whole.grid, dtype))

    def suits(self, tensor: Tensor) -> bool:
        """An adapter may have been merged into it: without a zero it is an ordinary one."""
        return not bool(tensor.all())

    def of(self, tensor: Tensor) -> Self:
        """With as many kept values as it has now."""
        made = replace(self, shape=tuple(tensor.shape))
        return replace(made, kept=int(made.entries(tensor)[1].sum()))

    def problem(self, read: Callable[[], Tensor]) -> str:
        return Bitmask(self.shape, self.pattern).problem(read) or self.whole.problem(read)

    def nbytes(self, zeros: int, itemsize: int) -> int:
        """⌈n/8⌉ for the mask, the packed codes, and two bytes for every scale and offset."""
        return -(-math.prod(self.shape) // 8) + -(-self.kept * self.bits // 8) + 2 * (1 + self.offsets) * self.groups

    @property
    def groups(self) -> int:
        return -(-self.kept // self.group) if self.group else self.whole.matrix_shape[0]

    @property
    def layout(self) -> str:
        return f"{self.kept} kept values of {self.whole.layout}"

    def part_shapes(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        mask, levels = -(-math.prod(self.shape) // 8), -(-self.kept * self.bits // 8)
        sizes = mask, levels, self.groups, self.groups if self.offsets else 0
        return tuple(((size,), dtype) for size, dtype in zip(sizes, ("U8", "U8", "F16", "F16"), strict=True))

    def zeros(self, parts: Sequence[TensorSpec[Any]]) -> int:
        """What the mask drops; of the others some may have been rounded to zero."""
        return math.prod(self.shape) - self.kept

    @classmethod
    def own_fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        kept, pattern = int(data["kept"]), str(data["pattern"])
        if not 0 <= kept <= math.prod(map(int, data["shape"])):
            raise ValueError(f"{kept} kept values")
        return {**Quantised.own_fields(data), "kept": kept, "pattern": pattern}

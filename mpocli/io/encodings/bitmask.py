"""Sparse tensors as a bitmask and the values it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpocli.io.encodings.base import D, Encoding, Part
from mpocli.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Bitmask(Encoding):
    """`pattern` is what the zeros follow (`unstructured`, 2:4 …).

    >>> Bitmask.part_names("layer.weight")
    ('layer.weight_bitmask', 'layer.weight_values')
    """

    pattern: str = "unstructured"

    name = "bitmask"
    phrase = "a bitmask"
    account = "a bitmask and the values it keeps"
    adjective = "sparse"
    parts = (Part("_bitmask", "bitmask", "U8"), Part("_values", "values"))
    holds_zeros = True

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        from mpocli.sparse.bits import pack_sparse

        return pack_sparse(tensor)

    def unpack(self, *parts: Tensor) -> Tensor:
        from mpocli.sparse.bits import unpack_sparse

        bits, values = parts
        return unpack_sparse(bits, values, self.shape)

    def suits(self, tensor: Tensor) -> bool:
        """An adapter may have been merged into it: without a zero it is an ordinary one."""
        return not bool(tensor.all())

    def problem(self, read: Callable[[], Tensor]) -> str:
        from mpocli.sparse.masks import Pattern, most_in_group

        pattern = Pattern.parse(self.pattern)
        if pattern.keep is None or pattern.group is None or most_in_group(read(), pattern.group) <= pattern.keep:
            return ""
        return f"pattern: its zeros do not lie as {pattern}"

    def nbytes(self, zeros: int, itemsize: int) -> int:
        """⌈n/8⌉ for the mask and `itemsize` for every kept value.

        >>> Bitmask((10, 100)).nbytes(900, 2)
        325
        """
        numel = math.prod(self.shape)
        return -(-numel // 8) + (numel - zeros) * itemsize

    @property
    def code_bits(self) -> None:
        return None

    def misfit(self, name: str, parts: Sequence[TensorSpec[D]], dtypes: Mapping[str, D]) -> str:
        bits, values = parts
        needed = -(-math.prod(self.shape) // 8)
        if bits.dtype == dtypes["U8"] and bits.numel == needed and len(values.shape) == 1:
            return ""
        return (
            f"the bitmask of {name} has {bits.numel} elements of {bits.dtype} and values of shape {values.shape}, "
            f"shape {'x'.join(map(str, self.shape))} needs {needed} bytes and a list"
        )

    def zeros(self, parts: Sequence[TensorSpec[Any]]) -> int:
        return math.prod(self.shape) - parts[1].numel

    @classmethod
    def own_fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return {"pattern": str(data.get("pattern", "unstructured"))}

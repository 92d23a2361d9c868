"""The element types that safetensors files name and mpocli reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class DType(Protocol):
    """What metadata say of an element type, `torch.dtype` and `StoredDType` alike."""

    @property
    def itemsize(self) -> int: ...


@dataclass(frozen=True)
class StoredDType:
    """Stands for a `torch.dtype`, with its name and its size in bytes, where nothing computes.

    >>> str(STORED_DTYPES["BF16"]), STORED_DTYPES["BF16"].itemsize
    ('torch.bfloat16', 2)
    """

    name: str
    itemsize: int

    def __str__(self) -> str:
        return f"torch.{self.name}"


STORED_DTYPES: Mapping[str, StoredDType] = {
    code: StoredDType(name, itemsize)
    for code, name, itemsize in (
        ("F64", "float64", 8),
        ("F32", "float32", 4),
        ("F16", "float16", 2),
        ("BF16", "bfloat16", 2),
        ("F8_E4M3", "float8_e4m3fn", 1),
        ("F8_E5M2", "float8_e5m2", 1),
        ("F8_E8M0", "float8_e8m0fnu", 1),
        ("C64", "complex64", 8),
        ("I64", "int64", 8),
        ("I32", "int32", 4),
        ("I16", "int16", 2),
        ("I8", "int8", 1),
        ("U64", "uint64", 8),
        ("U32", "uint32", 4),
        ("U16", "uint16", 2),
        ("U8", "uint8", 1),
        ("BOOL", "bool", 1),
    )
}

"""Tensors stored as a bitmask and the values it keeps: what describes them, and what their parts are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from mpocli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BITMASK = "bitmask"
_BITS, _VALUES = "_bitmask", "_values"


@dataclass(frozen=True)
class Encoding:
    """Of one tensor: its dense shape, and the pattern that its zeros follow (`unstructured`, 2:4 …).

    `key` is its name in the files where that is not the model's: transformers renames some tensors on loading.
    """

    shape: tuple[int, ...]
    pattern: str = "unstructured"
    key: str | None = None

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"encoding": BITMASK, "shape": list(self.shape), "pattern": self.pattern}
        return data if self.key is None else data | {"key": self.key}

    def stored_as(self, name: str, key: str) -> Encoding:
        """The same for a tensor that the model calls `name` and the files `key`."""
        return replace(self, key=None if key == name else key)

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> Encoding:
        """Raises `InputError` for an encoding that this mpocli does not know."""
        try:
            kind, shape = str(data["encoding"]), tuple(map(int, data["shape"]))
            pattern = str(data.get("pattern", "unstructured"))
            key = None if data.get("key") is None else str(data["key"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                f"tensor {name}: its encoding is malformed ({error!r})", hint="restore config.json and mpo.json"
            ) from error
        if kind != BITMASK or not shape or min(shape) < 1:
            raise InputError(
                f"tensor {name}: stored as {kind!r} of shape {list(shape)}, which this mpocli does not read",
                hint="update mpocli",
            )
        return cls(shape, pattern, key)


Encodings = Mapping[str, Encoding]


def encodings_from(data: object) -> dict[str, Encoding]:
    """`encodings` of a `quantization_config` or manifest; `InputError` where they cannot be read."""
    if not isinstance(data, Mapping):
        raise InputError(f"the encodings are a {type(data).__name__}, a JSON object was expected")
    return {str(name): Encoding.from_dict(str(name), entry) for name, entry in data.items()}


def part_names(name: str) -> tuple[str, str]:
    """What a tensor's bitmask and values are called in the files.

    >>> part_names("layer.weight")
    ('layer.weight_bitmask', 'layer.weight_values')
    """
    return name + _BITS, name + _VALUES


def encoded_names(stored: Iterable[str]) -> set[str]:
    """The tensors that the files hold as a bitmask and values."""
    names = set(stored)
    return {name.removesuffix(_BITS) for name in names if name.endswith(_BITS) and _value_name(name) in names}


def _value_name(bits: str) -> str:
    return bits.removesuffix(_BITS) + _VALUES


def encoding_of(encodings: Encodings, stored: str) -> str | None:
    """The entry of a tensor in the files, by its key, its name, or a shorter or longer path; None for none."""
    by_key = [name for name, encoding in encodings.items() if encoding.key == stored]
    if by_key:
        return by_key[0]
    if stored in encodings:
        return stored
    found = [name for name in encodings if name.endswith(f".{stored}") or stored.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


class Adds(Protocol):
    def add(self, name: str, tensor: Tensor) -> None: ...


def has_tombstone(name: str) -> bool:
    """Whether one zero stays under the tensor's own name: a dense weight's, not a core's, whose module has one."""
    return re.fullmatch(r"core_\d+", name.rpartition(".")[2]) is None

"""What an encoding is: the parts that stand for a tensor in the files, and the way there and back.

Everything but `pack` and `unpack` is asked where metadata are read, and works without torch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from mpocli.io.dtypes import DType
from mpocli.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

D = TypeVar("D", bound=DType)


@dataclass(frozen=True)
class Part:
    """A tensor in the files: the end of its name, the noun for it in messages, and its dtype as safetensors calls it
    (None: that of the tensor it stands for, in which it is trained where it is trained).

    The end is what an encoding is known by: no other part of any encoding may end so (`known.py` refuses it).
    """

    suffix: str
    noun: str
    dtype: str | None = None


@dataclass(frozen=True)
class Encoding(ABC):
    """One tensor's encoding: its dense shape, and in a subclass what else must be known to read it, all of it JSON.

    `key` is the tensor's name in the files where that is not the model's: transformers renames some on loading.
    `name` is the word for the encoding in JSON, `phrase` what a tensor is stored as, `account` the same at length,
    `adjective` what such tensors are called.

    A subclass is a frozen dataclass that has these words, `parts`, and all that is abstract here. Beyond that it gives

    - `own_fields` where it adds fields: they are written by themselves, and read by that alone;
    - `dense_dtype` and `in_dtype` where no part has the tensor's dtype: those of `RoundedEncoding`, which has a field
      for it, and tells what the parts must be from `part_shapes`;
    - `of` where a field tells of the values, `problem` where values can contradict one;
    - `suits` where a tensor may be stored so no longer once it was changed;
    - `zeros` where the parts' shapes tell how many there are, `holds_zeros` where training must leave them alone;
    - `is_exact` where packing loses something, `stays_packed` where layers compute with its parts.
    """

    shape: tuple[int, ...]
    key: str | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    phrase: ClassVar[str]
    account: ClassVar[str]
    adjective: ClassVar[str]
    parts: ClassVar[tuple[Part, ...]]
    holds_zeros: ClassVar[bool] = False  # whether training leaves zeros exactly zero
    # Whether any tensor comes back as it was. Where not, it is frozen in training, and its parts are kept beside it in
    # memory, so that it is stored by them again, and not rounded twice.
    is_exact: ClassVar[bool] = True
    # Whether memory may hold its parts in the place of the tensor: it is a `Codec` (`nn/packed.py`) then.
    stays_packed: ClassVar[bool] = False

    # --- values ---

    @abstractmethod
    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts of a tensor, in their order."""

    @abstractmethod
    def unpack(self, *parts: Tensor) -> Tensor:
        """The dense tensor. Raises `InputError` where the parts contradict one another."""

    def encode(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for one in the files.

        One zero is left where a dense weight was: a loader that does not know the encoding then stops at its shape.
        """
        return self.named(name, self.pack(tensor), tensor.new_zeros(1))

    def named(self, name: str, parts: Sequence[Tensor], zero: Tensor) -> dict[str, Tensor]:
        """The parts by their names in the files, and the one zero, of the dense tensor's dtype, where it belongs."""
        found = dict(zip(self.part_names(name), parts, strict=True))
        if has_tombstone(name) and name not in found:
            found[name] = zero
        return found

    def of(self, tensor: Tensor) -> Self:
        """The same for a tensor that was changed, for storing it."""
        return replace(self, shape=tuple(tensor.shape))

    def suits(self, tensor: Tensor) -> bool:
        """Whether a tensor that was read so is to be stored so again."""
        return True

    def problem(self, read: Callable[[], Tensor]) -> str:
        """What the tensor's (O, I) matrix contradicts of the encoding's own fields, "field: why"; empty for nothing."""
        return ""

    # --- metadata ---

    @property
    @abstractmethod
    def code_bits(self) -> int | None:
        """Bits of a code, None where there are no codes but values."""

    @abstractmethod
    def nbytes(self, zeros: int, itemsize: int) -> int:
        """Bytes of the parts of a tensor with so many zeros, of `itemsize` bytes an entry."""

    @abstractmethod
    def misfit(self, name: str, parts: Sequence[TensorSpec[D]], dtypes: Mapping[str, D]) -> str:
        """Why stored parts cannot be those of the dense shape, with the numbers; empty where they can."""

    def zeros(self, parts: Sequence[TensorSpec[Any]]) -> int | None:
        """Zeros of the tensor, None where its parts' shapes do not tell."""
        return None

    def dense_dtype(self, parts: Sequence[TensorSpec[D]], dtypes: Mapping[str, D]) -> D:
        """The tensor's dtype, told by its parts; `dtypes` are by safetensors' words."""
        own = [spec.dtype for part, spec in zip(self.parts, parts, strict=True) if part.dtype is None]
        if not own:
            raise TypeError(f"{type(self).__name__}: no part tells the tensor's dtype; make it a RoundedEncoding")
        return own[0]

    def converted(self, name: str, parts: Sequence[TensorSpec[D]], dtype: D) -> list[TensorSpec[D]]:
        """What `encode` leaves of the same tensor in another dtype, told by its parts."""
        pairs = zip(self.parts, parts, strict=True)
        specs = [spec if part.dtype else replace(spec, dtype=dtype) for part, spec in pairs]
        lost = has_tombstone(name) and all(spec.name != name for spec in specs)
        return [*specs, *([TensorSpec(name, dtype, (1,))] if lost else [])]

    def in_dtype(self, dtype: str) -> Self:
        """The same for the tensor in another dtype, by safetensors' word for it."""
        return self

    @classmethod
    def part_names(cls, name: str) -> tuple[str, ...]:
        """What a tensor's parts are called in the files."""
        return tuple(name + part.suffix for part in cls.parts)

    @classmethod
    def found_in(cls, stored: Iterable[str]) -> set[str]:
        """The tensors of which the files hold all parts."""
        names, suffix = set(stored), cls.parts[0].suffix
        whole = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
        return {name for name in whole if names.issuperset(cls.part_names(name))}

    def stored_as(self, name: str, key: str) -> Self:
        """The same for a tensor that the model calls `name` and the files `key`."""
        return replace(self, key=None if key == name else key)

    def to_dict(self) -> dict[str, Any]:
        """In JSON. `TypeError` where `own_fields` would not read a field that a subclass added."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("shape", "key")}
        data = {"encoding": self.name, "shape": list(self.shape), **own}
        if lost := sorted(own.keys() - self.own_fields(data).keys()):
            raise TypeError(f"{type(self).__name__}.own_fields does not read {', '.join(lost)}, which would be lost")
        return data if self.key is None else data | {"key": self.key}

    @classmethod
    def own_fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """All fields that a subclass adds, from JSON; `KeyError`, `TypeError` or `ValueError` for what they cannot be.

        It reads what others wrote: a value of the wrong kind or size must not come through.
        """
        return {}


class RoundedEncoding(Encoding):
    """An encoding all of whose parts have a dtype of their own, so that the tensor's is a field in JSON.

    A subclass declares that field, `dtype: str = "F32"`, and reads it in `own_fields`.
    """

    is_exact = False

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The dtype of the tensor it stands for, by safetensors' word."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """What is stored, for messages: "4 bits in groups of 64"."""

    @abstractmethod
    def part_shapes(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and dtype, by safetensors' word, of every part."""

    def misfit(self, name: str, parts: Sequence[TensorSpec[D]], dtypes: Mapping[str, D]) -> str:
        for part, spec, (shape, dtype) in zip(self.parts, parts, self.part_shapes(), strict=True):
            if spec.shape != shape or spec.dtype != dtypes[dtype]:
                return (
                    f"the {part.noun} of {name} are {spec.dtype} of shape {spec.shape}, {self.layout} for shape "
                    f"{'x'.join(map(str, self.shape))} need {dtype} of {shape}"
                )
        return ""

    def dense_dtype(self, parts: Sequence[TensorSpec[D]], dtypes: Mapping[str, D]) -> D:
        return dtypes[self.dtype]

    def in_dtype(self, dtype: str) -> Self:
        other: dict[str, Any] = {"dtype": dtype}
        return replace(self, **other)


def has_tombstone(name: str) -> bool:
    """Whether one zero stays under the tensor's own name: a dense weight's, not a core's, whose module has one."""
    return re.fullmatch(r"core_\d+", name.rpartition(".")[2]) is None

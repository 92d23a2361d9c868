"""A frozen tensor that stays packed in memory, and whose values exist only while something computes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mpocli.nn import int8

_aten = torch.ops.aten
# What only looks at a tensor otherwise is put off until its values are asked for: autograd then keeps codes.
_VIEWS = {
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.select.int,
    _aten.slice.Tensor,
}
_SAME = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}

Parts = tuple[Tensor, ...]
Step = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]


class Codec(Protocol):
    """What a packed tensor must know of its encoding; compared by value."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def transposed(self) -> bool: ...
    def in_dtype(self, dtype: str) -> Self: ...
    def unpack(self, *parts: Tensor) -> Tensor: ...
    def selected(self, parts: Parts, rows: Tensor) -> tuple[Self, Parts] | None: ...
    def as_int8(self, parts: Parts) -> tuple[Tensor, Tensor] | None: ...


# By safetensors' words, in which encodings speak.
_WORDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class PackedTensor(Tensor):
    """A tensor of which memory holds the `parts` of its encoding; its shape and dtype are those of its values.

    Every operation works on it: with the values, unpacked for this once. What copies, moves or converts it, or looks
    at it from another side, gives another packed one. It is a constant: gradients go through it to what it meets, and
    writing to it raises `RuntimeError`, but for a copy of one of the same encoding or of equal values. As a module's
    weight it is `parameter(…)`.
    """

    parts: Parts
    encoding: Codec
    steps: tuple[Step, ...]

    @staticmethod
    def __new__(
        cls,
        parts: Iterable[Tensor],
        encoding: Codec,
        dtype: torch.dtype = torch.float32,
        *,
        steps: tuple[Step, ...] = (),
        shape: tuple[int, ...] | None = None,
        strides: tuple[int, ...] | None = None,
    ) -> PackedTensor:
        parts = tuple(parts)
        made: PackedTensor = Tensor._make_wrapper_subclass(
            cls,
            encoding.shape if shape is None else shape,
            strides,
            dtype=dtype,
            device=parts[0].device,
            requires_grad=False,
        )
        made.parts, made.encoding, made.steps = parts, encoding.in_dtype(_WORDS[dtype]), steps
        return made

    # A wrapper adds nothing to functions of Python: what they are made of comes to `__torch_dispatch__`.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts)

    @torch.no_grad()
    def unpacked(self) -> Tensor:
        """The values, (shape) in dtype."""
        found = self.encoding.unpack(*self.parts)
        for function, args, kwargs in self.steps:
            found = function(found, *args, **dict(kwargs))
        return found

    def like(self, parts: Parts, dtype: torch.dtype | None = None) -> PackedTensor:
        """The same of other parts."""
        shape, strides = tuple(self.shape), tuple(self.stride())
        steps = self.steps
        return PackedTensor(parts, self.encoding, dtype or self.dtype, steps=steps, shape=shape, strides=strides)

    def seen(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PackedTensor:
        """What a function that keeps all values makes of it, put off."""
        if function is _aten.t.default and self.dim() == 2:
            shape, strides = tuple(self.shape)[::-1], tuple(self.stride())[::-1]
        else:
            like: Tensor = torch.empty_strided(tuple(self.shape), self.stride(), dtype=self.dtype, device="meta")
            like = function(like, *args, **kwargs)
            shape, strides = tuple(like.shape), like.stride()
        step: Step = function, _hashable(args), tuple((name, _hashable(value)) for name, value in kwargs.items())
        twice = bool(self.steps) and step[0] is _aten.t.default and self.steps[-1] == step
        steps = self.steps[:-1] if twice else (*self.steps, step)
        return PackedTensor(self.parts, self.encoding, self.dtype, steps=steps, shape=shape, strides=strides)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PackedTensor):
            if function in _SAME:
                return first.like(first.parts)
            if function in _VIEWS:
                return first.seen(function, args[1:], kwargs)
            if function in _OWN:
                return _OWN[function](first, *args[1:], **kwargs)
        if function in (_aten.mm.default, _aten.addmm.default):
            product = _int8_product(function, args, kwargs)
            if product is not None:
                return product
        _check_written(function, args, kwargs)
        args, kwargs = tree_map_only(PackedTensor, PackedTensor.unpacked, (args, kwargs))
        return function(*args, **kwargs)

    # --- what Python and torch ask of a tensor that they keep ---

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {self.packed_bytes:,} bytes)"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        if id(self) not in memo:
            made = self.like(tuple(part.clone() for part in self.parts))
            made.__dict__.update({k: v for k, v in self.__dict__.items() if k not in made.__dict__})
            memo[id(self)] = made
        return cast(PackedTensor, memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.steps:
            return self.unpacked().__reduce_ex__(protocol)
        return _restored, (self.parts, self.encoding, self.dtype, isinstance(self, nn.Parameter))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Its inner tensors and the rest, for graph compilers and `Module.to`."""
        names = [f"part_{k}" for k in range(len(self.parts))]
        return names, (self.encoding, self.dtype, self.steps)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("part_") and "parts" in self.__dict__:
            return self.parts[int(name.removeprefix("part_"))]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], rest: Any, shape: Any, strides: Any) -> PackedTensor:
        encoding, dtype, steps = rest
        return PackedTensor(inner.values(), encoding, dtype, steps=steps, shape=tuple(shape), strides=tuple(strides))


def parameter(parts: Iterable[Tensor], encoding: Codec, dtype: torch.dtype) -> nn.Parameter:
    """A frozen parameter that is a `PackedTensor`. That the parts fit the encoding is the caller's business."""
    return nn.Parameter(PackedTensor(parts, encoding, dtype), requires_grad=False)


def is_packed(tensor: object) -> bool:
    """Whether memory holds codes for it."""
    return isinstance(tensor, PackedTensor)


def packed_names(module: nn.Module) -> list[str]:
    """The parameters of a module that are packed, each once."""
    return [name for name, found in module.named_parameters() if is_packed(found)]


def resident_bytes(module: nn.Module) -> int:
    """Bytes that a module's parameters and buffers take in memory, each once."""
    found: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        for part in tensor.parts if isinstance(tensor, PackedTensor) else (tensor,):
            found[id(part)] = part.numel() * part.element_size()
    return sum(found.values())


def _restored(parts: Parts, encoding: Codec, dtype: torch.dtype, is_parameter: bool) -> Tensor:
    made = PackedTensor(parts, encoding, dtype)
    return nn.Parameter(made, requires_grad=False) if is_parameter else made


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


# --- operations of its own --------------------------------------------------------------------------------------------


def _clone(packed: PackedTensor, *, memory_format: Any = None) -> Tensor:
    if packed.steps or not packed.is_contiguous():
        # What `reshape` makes of a view: on the way to a product, and never written to.
        return packed.seen(_aten.clone.default, (), {"memory_format": memory_format})
    return packed.like(tuple(part.clone() for part in packed.parts))


def _to_copy(packed: PackedTensor, *, dtype: Any = None, device: Any = None, **how: Any) -> Tensor:
    if dtype is not None and dtype not in _WORDS:
        converted: Tensor = _aten._to_copy.default(packed.unpacked(), dtype=dtype, device=device, **how)
        return converted
    moved = {"device": device, "non_blocking": bool(how.get("non_blocking"))}
    parts = tuple(part.to(**moved) for part in packed.parts) if device is not None else packed.parts
    return packed.like(parts, dtype)


def _copy(packed: PackedTensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """In place: of the same encoding, or nothing where the values are the same."""
    if isinstance(source, PackedTensor) and not (packed.steps or source.steps):
        word = _WORDS[packed.dtype]
        if source.encoding.in_dtype(word) == packed.encoding:
            for mine, theirs in zip(packed.parts, source.parts, strict=True):
                mine.copy_(theirs, non_blocking)
            return packed
    values = source.unpacked() if isinstance(source, PackedTensor) else source
    own = packed.unpacked()
    # The source may have been rounded to a narrower dtype on its way here.
    same = any(torch.equal(own.to(dtype), values.to(own).to(dtype)) for dtype in {own.dtype, values.dtype})
    if not same:
        raise RuntimeError("other values cannot be copied into packed codes: unpack them first (model.dequantize())")
    return packed


def _embedding(packed: PackedTensor, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The rows that are asked for, and no others, are unpacked."""
    flat = ids.reshape(-1)
    chosen = packed.encoding.selected(packed.parts, flat) if len(flat) and not packed.steps else None
    if chosen is None:
        whole: Tensor = _aten.embedding.default(packed.unpacked(), ids, *args, **kwargs)
        return whole
    encoding, parts = chosen
    return encoding.unpack(*parts).view(*ids.shape, packed.shape[1])


_OWN: dict[Any, Callable[..., Tensor]] = {
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy,
    _aten.embedding.default: _embedding,
}


def _int8_product(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """x @ Wᵀ (+ b) by torch's kernel for int8 weights; None where that does not apply or is not the faster way."""
    bias, (x, weight) = (args[0], args[1:3]) if function is _aten.addmm.default else (None, args[:2])
    if kwargs or len(args) > 3 or not isinstance(weight, PackedTensor) or isinstance(x, PackedTensor):
        return None
    if weight.dtype != x.dtype or not int8.is_faster(x):
        return None
    # As a linear layer's product sees it, the rows of codes must be the weight's columns.
    turned = [step[0] for step in weight.steps]
    if turned != ([] if weight.encoding.transposed else [_aten.t.default]) or len(weight.encoding.shape) != 2:
        return None
    found = weight.encoding.as_int8(weight.parts)
    if found is None:
        return None
    product = int8.product(x, *found)
    return product if bias is None else product + bias


def _check_written(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """`RuntimeError` where a function would write to codes."""
    if not function._schema.is_mutable:
        return
    for place, argument in enumerate(function._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, list | tuple) else (value,)
        if argument.alias_info is not None and argument.alias_info.is_write and any(map(is_packed, values)):
            name = function._schema.name.partition("::")[2]
            raise RuntimeError(f"{name}: packed codes are constants: unpack them first (model.dequantize())")

"""Packed weights of a loaded model: kept so in memory, or unpacked once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from mpocli.io.encodings.base import Encoding
from mpocli.nn.packed import PackedTensor

_PACKED: ContextVar[bool] = ContextVar("packed", default=False)
_PARTS, _STORED = "_mpocli_parts", "_mpocli_stored_dtype"


@contextmanager
def keep_packed(lean: bool = True) -> Iterator[None]:
    """A context in which `from_pretrained` leaves rounded tensors packed: `lean` in memory instead of fast.

    A weight of 4 bits then takes an eighth of its float32 bytes, and its values exist only while a layer computes with
    them; results are the same. Without it, or with `lean` false, they are unpacked once, and a layer is as fast as any
    dense one. Either way they are frozen: what is not packed can be trained, and saving gives the same codes back.

    >>> with mpocli.keep_packed():  # doctest: +SKIP
    ...     model = AutoModelForCausalLM.from_pretrained("gpt2-4bit")
    """
    token = _PACKED.set(lean)
    try:
        yield
    finally:
        _PACKED.reset(token)


def keeps_packed() -> bool:
    return _PACKED.get()


def remember(module: nn.Module, leaf: str, encoding: Encoding, parts: tuple[Tensor, ...]) -> None:
    """Keep the parts that a module's tensor was made of, for storing it again bit by bit."""
    kept = dict(getattr(module, _PARTS, {}))
    setattr(module, _PARTS, kept | {leaf: (encoding, tuple(part.detach() for part in parts))})


def remembered(model: Any, name: str) -> tuple[Encoding, tuple[Tensor, ...]] | None:
    """The parts that a tensor of a loaded model was made of, where rounding would not find them again, and how."""
    owner, _, leaf = name.rpartition(".")
    found: tuple[Encoding, tuple[Tensor, ...]] | None = getattr(model.get_submodule(owner), _PARTS, {}).get(leaf)
    return found


def forget_parts(model: nn.Module) -> None:
    """Free what only storing a model again would need: its values alone stay."""
    for module in model.modules():
        module.__dict__.pop(_PARTS, None)


@torch.no_grad()
def make_dense(model: nn.Module, tensors: Collection[Tensor] | None = None) -> None:
    """Ordinary frozen parameters in the places of packed ones (`tensors`, or all), shared where these were."""
    wanted = None if tensors is None else {id(tensor) for tensor in tensors}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, found in list(module._parameters.items()):
            if isinstance(found, PackedTensor) and (wanted is None or id(found) in wanted):
                if id(found) not in made:
                    made[id(found)] = nn.Parameter(found.unpacked(), requires_grad=False)
                module._parameters[leaf] = made[id(found)]


@contextmanager
def stored_as(packed: PackedTensor, dtype: torch.dtype) -> Iterator[None]:
    """A context in which a packed tensor is saved as one that stands for values of this dtype."""
    packed.__dict__[_STORED] = dtype
    try:
        yield
    finally:
        del packed.__dict__[_STORED]


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a parameter is to be saved in: its own, or what `stored_as` says."""
    found: torch.dtype = tensor.__dict__.get(_STORED, tensor.dtype)
    return found

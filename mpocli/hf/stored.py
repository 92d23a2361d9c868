"""The dtype that each tensor of a model in training is stored in: the one that it had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpocli.hf.memory import stored_as
from mpocli.hf.metadata import Metadata
from mpocli.hf.skeleton import file_keys
from mpocli.io.checkpoint import CheckpointReader
from mpocli.nn.packed import PackedTensor, is_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtypes = Mapping[str, torch.dtype]


def stored_dtypes(model: PreTrainedModel, checkpoint: Metadata[CheckpointReader]) -> dict[str, torch.dtype]:
    """The dtypes of the floating-point tensors in the state dict of a model that was loaded from a checkpoint, by name.

    Files may hold several (bfloat16 with float32 norms). A new core has that of the matrix that it stands for, a new
    head the dtype of most elements.
    """
    reader = checkpoint.reader
    keys = file_keys(model, reader)
    state = model.state_dict(keep_vars=True)
    found: dict[str, torch.dtype] = {}
    by_tensor: dict[int, torch.dtype] = {}
    for name, tensor in state.items():
        key = keys.stored.get(name) or next(iter(keys.converted.get(name, ())), None)
        if key is not None and reader.specs[key].dtype.is_floating_point:
            found[name] = by_tensor[id(tensor)] = reader.specs[key].dtype
    for name, tensor in state.items():
        if name not in found and tensor.is_floating_point():
            weight = f"{name.rpartition('.')[0]}.weight"
            # What is tied is stored under another name.
            found[name] = by_tensor.get(id(tensor)) or found.get(weight) or reader.main_dtype
    return found


@torch.no_grad()
def round_to(model: PreTrainedModel, dtypes: Dtypes) -> None:
    """Let every tensor have the values that it would be stored with. Packed ones are stored as they are."""
    for tensor, dtype in _tensors(model, dtypes):
        if not is_packed(tensor):
            tensor.copy_(tensor.to(dtype))


@contextmanager
def rounded(model: PreTrainedModel, dtypes: Dtypes) -> Iterator[None]:
    """The model as it would be stored, and afterwards as it was."""
    moved = [tensor for tensor, dtype in _tensors(model, dtypes) if dtype != tensor.dtype and not is_packed(tensor)]
    kept = [(tensor, tensor.detach().clone()) for tensor in moved]
    round_to(model, dtypes)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


@contextmanager
def in_stored_dtypes(model: PreTrainedModel, dtypes: Dtypes) -> Iterator[None]:
    """The model with its tensors in the dtypes of the files, for `save_pretrained`.

    Only what is in the state dict: buffers that are not stored (rotary frequencies) must not be rounded.
    """
    found = list(_tensors(model, dtypes))
    before: list[tuple[Any, Tensor]] = [(tensor, tensor.data) for tensor, _ in found if not is_packed(tensor)]
    with ExitStack() as stack:
        for tensor, dtype in found:
            if isinstance(tensor, PackedTensor):
                stack.enter_context(stored_as(tensor, dtype))
        try:
            for tensor, dtype in found:
                if not is_packed(tensor):
                    tensor.data = tensor.data.to(dtype)
            yield
        finally:
            for tensor, data in before:
                tensor.data = data


def _tensors(model: PreTrainedModel, dtypes: Dtypes) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Each once, with the dtype that it is stored in."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in dtypes and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor, dtypes[name]

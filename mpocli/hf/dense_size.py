"""The size of the dense model, and the dtype that a parameter is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mpocli.hf.skeleton import FileKeys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mpocli.io.checkpoint import CheckpointReader


def _stored_dtype(parameter: str, keys: FileKeys, reader: CheckpointReader) -> torch.dtype:
    """The dtype of the tensor behind a parameter, or of the first that it is converted from; float32 for a new one."""
    sources = (keys.stored[parameter],) if parameter in keys.stored else keys.converted.get(parameter, ())
    return dtype_of(sources, reader)


def dtype_of(sources: Sequence[str], reader: CheckpointReader) -> torch.dtype:
    """The dtype of the first of the tensors that a parameter is read from; float32 where there is none."""
    return reader.specs[sources[0]].dtype if sources else torch.float32


def dense_size(
    model: PreTrainedModel, keys: FileKeys, groups: list[list[str]], apart: set[str], reader: CheckpointReader
) -> tuple[int, int]:
    """(parameters, bytes in the stored dtypes) of the dense model, every tensor once."""
    followers = {name for group in groups for name in group[1:]}
    owner_of = dict(getattr(model, "all_tied_weights_keys", None) or {})
    params = size = 0
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        one_way = parameter.dim() == 1 and name in owner_of
        if name not in apart and (name in followers or one_way or id(parameter) in seen):
            continue
        seen.add(id(parameter))
        params += parameter.numel()
        size += parameter.numel() * _stored_dtype(name, keys, reader).itemsize
    return params, size

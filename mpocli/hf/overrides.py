"""What a transformers model does itself with weights by their shapes, done right where these are cores or packed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mpocli.hf.memory import forget_parts, make_dense
from mpocli.hf.replace import contract
from mpocli.nn import TOMBSTONE, MPOModule
from mpocli.nn.held_zeros import look_again

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OWN = ("_adjust_bias", "_initialize_missing_keys", "resize_token_embeddings")


def override(model: PreTrainedModel, packed: Mapping[str, tuple[int, ...]]) -> None:
    """Replace the methods of a model that is being loaded, `packed` being the shapes of its packed weights by name.

    On the instance, since the classes are transformers' own. Its submodels resize with it: they have the same table.
    """
    anything: Any = model
    anything._adjust_bias = _adjust_bias
    anything._initialize_missing_keys = partial(_initialize, model, dict(packed))
    for part in _submodels(model):
        part.resize_token_embeddings = partial(_resize, part, model)


def initialised(model: PreTrainedModel) -> None:
    """Nothing is left to be initialised."""
    model.__dict__.pop("_initialize_missing_keys", None)


def restore(model: PreTrainedModel) -> None:
    """Give a model without cores the methods of its class again."""
    for part in _submodels(model):
        for name in _OWN:
            part.__dict__.pop(name, None)


def _submodels(model: PreTrainedModel) -> list[Any]:
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _adjust_bias(output_embeddings: nn.Module, input_embeddings: Any) -> None:
    """transformers fits a head's bias to `weight.shape[0]` when it ties; on an MPO head that is the tombstone's 1."""
    from transformers import PreTrainedModel

    if not isinstance(output_embeddings, MPOModule):
        PreTrainedModel._adjust_bias(cast(Any, None), output_embeddings, input_embeddings)


def _initialize(model: PreTrainedModel, packed: Mapping[str, tuple[int, ...]], *args: Any, **options: Any) -> None:
    """A class's own initialisation may read the shape of every weight, of those too that were loaded (Funnel)."""
    with _in_full_shape(model, packed):
        type(model)._initialize_missing_keys(model, *args, **options)


@contextmanager
def _in_full_shape(model: PreTrainedModel, packed: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Put in the tombstones' places what has the shape of the weight, counts as loaded, and holds nothing."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{TOMBSTONE}": module.stored_shape for name, module in _mpos(model)}
    shapes |= {name: shape for name, shape in packed.items() if name.endswith(f".{TOMBSTONE}")}
    tombstones = []
    for name, shape in shapes.items():
        buffers = model.get_submodule(name.removesuffix(f".{TOMBSTONE}"))._buffers
        tombstone = buffers[TOMBSTONE]
        assert tombstone is not None
        tombstones.append((buffers, tombstone))
        stand_in: Any = torch.empty(shape, dtype=tombstone.dtype, device="meta")
        stand_in._is_hf_initialized = True
        buffers[TOMBSTONE] = stand_in
    try:
        yield
    finally:
        for buffers, tombstone in tombstones:
            buffers[TOMBSTONE] = tombstone


def _resize(
    part: PreTrainedModel,
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **options: Any,
) -> Any:
    """`resize_token_embeddings` of a model or its submodel: a table of cores has no place for more rows.

    It and what is tied to it become dense, and are saved so.
    """
    resize = type(part).resize_token_embeddings
    tables = [part.get_input_embeddings(), part.get_output_embeddings()]
    size = getattr(tables[0], "num_embeddings", None)
    if pad_to_multiple_of is None and new_num_tokens in (None, size):
        return tables[0]
    cores = {id(table.cores[0]) for table in tables if isinstance(table, MPOModule)}
    names = [name for name, module in _mpos(model) if id(module.cores[0]) in cores]
    if names:
        warnings.warn(
            f"{', '.join(names)}: dense from now on, since cores have a fixed number of rows; "
            "`mpocli decompose` of what is saved makes cores of the new table",
            stacklevel=2,
        )
        contract(model, names)
    with_codes = [table for table in tables if isinstance(table, nn.Module)]
    make_dense(model, [table.weight for table in with_codes if isinstance(table.weight, nn.Parameter)])
    for table in with_codes:
        forget_parts(table)
    resized = resize(part, new_num_tokens, pad_to_multiple_of, *args, **options)
    for table in (part.get_input_embeddings(), part.get_output_embeddings()):
        if isinstance(table, nn.Module) and isinstance(table.weight, nn.Parameter):
            look_again(table.weight)
    return resized


def _mpos(model: PreTrainedModel) -> list[tuple[str, MPOModule]]:
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, MPOModule)]

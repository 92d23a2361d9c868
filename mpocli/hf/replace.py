"""Swap the modules of a transformers model: dense for MPO, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from mpocli.errors import InputError
from mpocli.io.manifest import MPOSpec
from mpocli.nn import TOMBSTONE, MPOEmbedding, MPOLinear, MPOModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def local_name(model: PreTrainedModel, name: str) -> str | None:
    """A module's name in this model: with or without the base model's prefix, None where it has no such module.

    A checkpoint of a classifier loads into the bare encoder and the other way round.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in modules:
            return candidate
    return None


def install(
    model: PreTrainedModel, specs: Mapping[str, MPOSpec], dtype: torch.dtype | None = None
) -> dict[str, MPOSpec]:
    """Put an empty MPO module in the place of every dense one that `specs` names, and share the tied cores.

    Modules that this model class lacks (a head, say) are passed over. Returns the specs of those that were put
    in, under their names in this class. Raises `InputError` where the dense
    module does not have the shape or kind that its spec says.
    """
    names = {name: local_name(model, name) for name in specs}
    for name, spec in specs.items():
        place = names[name]
        if place is not None:
            model.set_submodule(place, _build(name, spec, model.get_submodule(place), dtype))
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    replaced = {place for place in names.values() if place is not None}

    # What is tied through its dense weight is now tied through its cores, or no longer tied.
    def is_replaced(a: str, b: str) -> bool:
        modules = {a.rpartition(".")[0], b.rpartition(".")[0]}
        return a.endswith(f".{TOMBSTONE}") and bool(modules & replaced)

    kept = {a: b for a, b in tied.items() if not is_replaced(a, b)}
    for name, spec in specs.items():
        place, owner = names[name], names.get(spec.tied_to or "")
        if place is None or spec.tied_to is None:
            continue
        if owner is None:
            # Only the follower is in this class: it owns the cores here.
            raise InputError(
                f"module {name} shares the cores of {spec.tied_to}, which a {type(model).__name__} does not have",
                hint="load the class that config.json's `architectures` names",
            )
        follower = cast(MPOModule, model.get_submodule(place))
        source = cast(MPOModule, model.get_submodule(owner))
        follower.tied_to = owner
        for core in spec.core_shapes():
            setattr(follower, core, source.get_parameter(core))
            kept[f"{place}.{core}"] = f"{owner}.{core}"
    model.all_tied_weights_keys = kept
    model._adjust_bias = _adjust_bias
    return {
        place: replace(spec, tied_to=names[spec.tied_to] if spec.tied_to else None)
        for name, spec in specs.items()
        if (place := names[name]) is not None
    }


def _adjust_bias(output_embeddings: nn.Module, input_embeddings: Any) -> None:
    """transformers fits a head's bias to `weight.shape[0]` when it ties; on an MPO head that is the tombstone's 1."""
    from transformers import PreTrainedModel

    if not isinstance(output_embeddings, MPOModule):
        PreTrainedModel._adjust_bias(cast(Any, None), output_embeddings, input_embeddings)


def _build(name: str, spec: MPOSpec, dense: nn.Module, dtype: torch.dtype | None) -> MPOModule:
    if isinstance(dense, MPOModule):
        raise InputError(f"module {name} is an MPO already")
    found = dense_shape(dense)
    if found is None or found[1] != spec.shape or (spec.kind == "embedding") != isinstance(dense, nn.Embedding):
        raise InputError(
            f"module {name} is a {type(dense).__name__} of shape {found and found[1]}, "
            f"the manifest has a {spec.kind} of shape {spec.shape}",
            hint="config.json was edited, or the model class changed",
        )
    weight = cast(Tensor, dense.weight)
    dtype = dtype or weight.dtype
    if isinstance(dense, nn.Embedding):
        built: MPOModule = MPOEmbedding(
            spec.shape,
            spec.sites,
            spec.bond_dims,
            padding_idx=dense.padding_idx,
            scale=spec.scale,
            dtype=dtype,
            device=weight.device,
        )
    else:
        kind = cast(Literal["linear", "conv1d"], spec.kind)
        has_bias = getattr(dense, "bias", None) is not None
        built = MPOLinear(
            spec.shape, spec.sites, spec.bond_dims, bias=has_bias, kind=kind, dtype=dtype, device=weight.device
        )
        if has_bias:
            # The same Parameter: it may be tied to another one.
            built.bias = cast(nn.Parameter, dense.bias)
    built.dense_class = type(dense)
    return built


def dense_shape(module: nn.Module) -> tuple[str, tuple[int, int]] | None:
    """(kind, (O, I)) of a dense module, None for one that is no matrix."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return "conv1d", (module.weight.shape[1], module.weight.shape[0])
    if isinstance(module, nn.Linear):
        return "linear", (module.out_features, module.in_features)
    if isinstance(module, nn.Embedding):
        return "embedding", (module.num_embeddings, module.embedding_dim)
    return None


@torch.no_grad()
def remove(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Contract every MPO module of a loaded model back to the dense one it replaced, ties included."""
    from transformers.pytorch_utils import Conv1D

    modules = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, MPOModule)]
    for name, module in modules:
        weight = nn.Parameter(cast(Any, module).dense_weight().to(dtype or module.cores[0].dtype))
        if isinstance(module, MPOEmbedding):
            if module.scale != 1.0:
                # Its scale may live in a buffer, so that this one is built with real memory.
                dense: nn.Module = cast(Any, module.dense_class)(
                    *module.shape, module.padding_idx, embed_scale=module.scale
                )
            else:
                with torch.device("meta"):
                    dense = nn.Embedding(*module.shape, module.padding_idx)
        else:
            assert isinstance(module, MPOLinear)
            with torch.device("meta"):
                if module.kind == "conv1d":
                    dense = Conv1D(module.out_features, module.in_features)
                else:
                    dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            if module.bias is not None:
                dense.bias = module.bias
        dense.weight = weight
        dense.train(module.training)
        model.set_submodule(name, dense)
    del model._adjust_bias  # back to the class's own
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()

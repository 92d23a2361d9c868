"""Swap the modules of a transformers model: dense for MPO, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from mpocli.errors import InputError
from mpocli.io.mpo_spec import MPOSpec
from mpocli.nn import TOMBSTONE, DenseExperts, MPOEmbedding, MPOExperts, MPOLinear, MPOModule

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
    model: PreTrainedModel,
    specs: Mapping[str, MPOSpec],
    dtype: torch.dtype | None = None,
    *,
    has_own: Callable[[str], bool] = lambda name: False,
) -> dict[str, MPOSpec]:
    """Put an empty MPO module in the place of every dense one that `specs` names, and share the tied cores.

    Modules that this model class lacks (a head, say) are passed over. A module whose weight this class ties to
    one of them shares its cores, unless the files have a dense weight of its own for it (`has_own`). Returns the
    specs of all that were put in, under their names in this class. Raises `InputError` where the dense module
    does not have the shape or kind that its spec says.
    """
    names = {name: local_name(model, name) for name in specs}
    local: dict[str, MPOSpec] = {}
    for name, spec in specs.items():
        place, owner = names[name], names.get(spec.tied_to or "")
        if place is None:
            continue
        if spec.tied_to is not None and owner is None:
            raise InputError(
                f"module {name} shares the cores of {spec.tied_to}, which a {type(model).__name__} does not have",
                hint="load the class that config.json's `architectures` names",
            )
        router = names.get(spec.router or "")
        if spec.router is not None and router is None:
            raise InputError(f"module {name} is routed by {spec.router}, which a {type(model).__name__} does not have")
        local[place] = replace(spec, tied_to=owner, router=router)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    _check_ties(model, local, tied)
    local |= _tied_partners(model, local, tied, has_own)
    for place, spec in local.items():
        model.set_submodule(place, _build(place, spec, model.get_submodule(place), dtype))
    # What was tied through its dense weight is now tied through its cores, or no longer tied.
    kept = {a: b for a, b in tied.items() if not ({_module(a), _module(b)} & local.keys() and _is_weight(a))}
    for place, spec in local.items():
        if spec.tied_to is None:
            continue
        follower = cast(MPOModule, model.get_submodule(place))
        source = cast(MPOModule, model.get_submodule(spec.tied_to))
        follower.tied_to = spec.tied_to
        for core in spec.core_shapes():
            setattr(follower, core, source.get_parameter(core))
            kept[f"{place}.{core}"] = f"{spec.tied_to}.{core}"
    model.all_tied_weights_keys = kept
    return local


def _check_ties(model: PreTrainedModel, specs: Mapping[str, MPOSpec], tied: Mapping[str, str]) -> None:
    """`InputError` where a spec shares the cores of a module that this class does not tie its weight to, or cores of
    another shape."""
    for place, spec in specs.items():
        if spec.tied_to is None:
            continue
        weights = [f"{name}.{TOMBSTONE}" for name in (place, spec.tied_to)]
        tensors = [getattr(model.get_submodule(name), TOMBSTONE, None) for name in (place, spec.tied_to)]
        owners = {tied.get(weight, weight) for weight in weights}
        if len(owners) > 1 and tensors[0] is not tensors[1]:
            raise InputError(
                f"module {place} shares the cores of {spec.tied_to}, says the manifest, and a {type(model).__name__} "
                "keeps their weights apart",
                hint="config.json was edited, or the model class changed",
            )
        owner = specs.get(spec.tied_to)
        if owner is None or owner.tied_to or owner.core_shapes() != spec.core_shapes():
            raise InputError(
                f"module {place} shares the cores of {spec.tied_to}, whose structure is another one",
                hint="config.json was edited, or the model class changed",
            )


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _is_weight(parameter: str) -> bool:
    return parameter.endswith(f".{TOMBSTONE}")


def _tied_partners(
    model: PreTrainedModel, specs: Mapping[str, MPOSpec], tied: Mapping[str, str], has_own: Callable[[str], bool]
) -> dict[str, MPOSpec]:
    """Specs of the dense modules that this class ties to one in `specs`, without a spec of their own.

    An encoder that was decomposed on its own has none for the head that another class ties to its table.
    """
    partners: dict[str, MPOSpec] = {}
    for a, b in tied.items():
        if not (_is_weight(a) and _is_weight(b)):
            continue
        for place, other in ((_module(a), _module(b)), (_module(b), _module(a))):
            found = dense_shape(model.get_submodule(place))
            spec = specs.get(other) or partners.get(other)
            if place in specs or place in partners or spec is None or found is None or has_own(place):
                continue
            kind, shape = found
            if shape == spec.shape:
                scale = embedding_scale(model.get_submodule(place))
                partners[place] = replace(spec, kind=kind, tied_to=spec.tied_to or other, scale=scale)
    return partners


def _build(name: str, spec: MPOSpec, dense: nn.Module, dtype: torch.dtype | None) -> MPOModule | DenseExperts:
    if isinstance(dense, MPOModule | DenseExperts):
        raise InputError(f"module {name} is an MPO or experts already")
    check_spec(name, spec, dense)
    weight = cast(Tensor, dense.weight)
    dtype = dtype or weight.dtype
    if spec.experts:
        return _build_experts(spec, dense, weight, dtype)
    if isinstance(dense, nn.Embedding):
        built: MPOModule = MPOEmbedding(
            spec.shape,
            spec.sites,
            spec.bond_dims,
            padding_idx=dense.padding_idx,
            scale=spec.scale,
            # Kept in a buffer (Gemma), it is rounded to the table's dtype; as a plain number (BART) it is not.
            rounds_scale=isinstance(getattr(dense, "embed_scale", None), Tensor),
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


def _build_experts(spec: MPOSpec, dense: nn.Module, weight: Tensor, dtype: torch.dtype) -> MPOExperts | DenseExperts:
    """Empty experts; `routing.connect` gives them their router."""
    bias = cast(nn.Parameter | None, getattr(dense, "bias", None))
    options: dict[str, Any] = {"experts": spec.experts, "place": spec.place, "kind": spec.kind}
    options |= {"bias": bias is not None, "dtype": dtype, "device": weight.device}
    built: MPOExperts | DenseExperts
    if spec.share == "dense":
        built = DenseExperts(spec.shape, **options)
    else:
        built = MPOExperts(spec.shape, spec.sites, spec.bond_dims, share=cast(Any, spec.share), **options)
    if bias is not None:
        # The same Parameter: it may be tied to another one.
        built.bias = bias
    return built


def check_spec(name: str, spec: MPOSpec, dense: nn.Module) -> None:
    """`InputError` where a spec is of another layer than the dense one whose place it takes: its kind, shape, scale."""
    found, scale = dense_shape(dense), embedding_scale(dense)
    if found != (spec.kind, spec.shape):
        raise InputError(
            f"module {name} is a {type(dense).__name__} of shape {found and found[1]}, "
            f"the manifest has a {spec.kind} of shape {spec.shape}",
            hint="config.json was edited, or the model class changed",
        )
    if not math.isclose(spec.scale, scale, rel_tol=1e-9):
        raise InputError(
            f"module {name} is a {type(dense).__name__} that multiplies its rows by {scale:.10g}, the manifest says "
            f"{spec.scale:.10g}",
            hint="config.json was edited, or the model class changed",
        )


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


def embedding_scale(module: nn.Module | None) -> float:
    """The factor by which a scaled embedding (BART's, Gemma's) multiplies its rows, 1 for any other module."""
    if not isinstance(module, nn.Embedding):
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return float(scale) if isinstance(scale, (int, float)) else 1.0


@torch.no_grad()
def contract(model: PreTrainedModel, names: Collection[str] | None = None, dtype: torch.dtype | None = None) -> None:
    """Make the named MPO modules of a loaded model (None: all) the dense ones they replaced, and tie what was tied.

    Modules that share their cores must be named together.
    """
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MPOModule) and (names is None or name in names)
    }
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    live = {a: b for a, b in model.all_tied_weights_keys.items() if _module(a) not in modules}
    for a, b in declared.items():
        pair = modules.get(_module(a)), modules.get(_module(b))
        if _is_weight(a) and pair[0] and pair[1] and pair[0].cores[0] is pair[1].cores[0]:
            live[a] = b
    described = getattr(getattr(model.config, "quantization_config", None), "modules", {})
    for name, module in modules.items():
        dense = _dense(module)
        weight = cast(Any, module).dense_weight().to(dtype or module.cores[0].dtype)
        dense.weight = nn.Parameter(weight, requires_grad=any(core.requires_grad for core in module.cores))
        dense.train(module.training)
        model.set_submodule(name, dense)
        described.pop(name, None)
    model.all_tied_weights_keys = live
    model.tie_weights(recompute_mapping=False)


def remove(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Make an ordinary model of a loaded one. Raises `InputError` for one with experts."""
    if any(isinstance(module, MPOExperts | DenseExperts) for module in model.modules()):
        raise InputError("experts have no dense form in a stock class", hint="mpocli merge makes dense experts of them")
    contract(model, dtype=dtype)


def _dense(module: MPOModule) -> nn.Module:
    """The module that `module` replaced, its weight still to be set."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, MPOEmbedding):
        if module.dense_class not in (None, nn.Embedding):
            # Its scale may live in a buffer, so that this one is built with real memory.
            scaled = cast(Any, module.dense_class)
            return cast(nn.Module, scaled(*module.shape, module.padding_idx, embed_scale=module.scale))
        with torch.device("meta"):
            return nn.Embedding(*module.shape, module.padding_idx)
    assert isinstance(module, MPOLinear)
    with torch.device("meta"):
        dense: nn.Module
        if module.kind == "conv1d":
            dense = Conv1D(module.out_features, module.in_features)
        else:
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    if module.bias is not None:
        dense.bias = module.bias
    return dense

"""Encoded tensors of a transformers model: in parts in the files, in memory whole and dense or, if asked, packed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpocli.errors import InputError
from mpocli.hf.memory import keeps_packed, remember, remembered, stored_dtype
from mpocli.hf.renaming import saved_keys
from mpocli.hf.replace import local_name
from mpocli.io.checkpoint import DTYPE_NAMES, DTYPES
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.known import KINDS, Encodings, encoded, encoding_of, encodings_from
from mpocli.io.tensor_spec import TensorSpec
from mpocli.nn.held_zeros import look_again
from mpocli.nn.packed import PackedTensor, is_packed, packed_names, parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INCOMPLETE = "the weight files are incomplete or belong to another checkpoint"


def reserve(model: PreTrainedModel, encodings: Encodings, stored: Mapping[str, list[int]]) -> dict[str, Encoding]:
    """Put its parts in the place of every tensor that is stored so, sized as in the files (`stored`).

    Modules that this class lacks (a head, say) are passed over. Returns the encodings of the others, by their names in
    this class. Raises `InputError` where the model's tensor has another shape, and for parts without an encoding.
    """
    by_entry: dict[str, str] = {}
    for suffix in (kind.parts[0].suffix for kind in KINDS.values()):
        for name in (key.removesuffix(suffix) for key in stored if key.endswith(suffix)):
            by_entry[encoding_of(encodings, name) or name] = name
    for name, kind in encoded(stored).items():
        if encoding_of(encodings, name) is None and local_name(model, name.rpartition(".")[0]) is not None:
            raise InputError(
                f"{name} is stored as {kind.phrase}, and config.json has no encoding for it",
                hint="restore config.json from the directory that mpocli wrote",
            )
    local: dict[str, Encoding] = {}
    for name, encoding in encodings.items():
        owner, _, leaf = name.rpartition(".")
        place = local_name(model, owner)
        if place is None:
            continue
        module = model.get_submodule(place)
        tensor = getattr(module, leaf, None)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != encoding.shape:
            found = None if tensor is None else tuple(tensor.shape)
            raise InputError(
                f"{name} is {found} in a {type(model).__name__}, its encoding says {encoding.shape}",
                hint="config.json was edited, or the model class changed",
            )
        if name not in by_entry:
            raise InputError(f"{name} is encoded and the files lack its {encoding.parts[0].noun}", hint=_INCOMPLETE)
        del module._parameters[leaf]
        if leaf == "weight":  # its tombstone
            module.register_buffer(leaf, torch.zeros(1, dtype=tensor.dtype, device=tensor.device))
        keys = encoding.part_names(by_entry[name])
        for part, place_of, key in zip(encoding.parts, encoding.part_names(leaf), keys, strict=True):
            if key not in stored:
                raise InputError(f"{key} is not in the files", hint=_INCOMPLETE)
            dtype = DTYPES[part.dtype] if part.dtype else tensor.dtype
            empty = torch.empty(stored[key], dtype=dtype, device=tensor.device)
            if part.dtype:
                module.register_buffer(place_of, empty)
            else:
                module.register_parameter(place_of, nn.Parameter(empty))
        local[f"{place}.{leaf}"] = encoding.in_dtype(DTYPE_NAMES[tensor.dtype])
    return local


def postpone_ties(model: PreTrainedModel, encodings: Encodings, has_own: Callable[[str], bool]) -> dict[str, str]:
    """Take the ties of encoded tensors off a model, which transformers would tie before they are unpacked.

    An encoder's sparse table may load into a class that ties its head to it. Returns {follower: encoded tensor};
    what the files hold apart (`has_own`) stays apart, as transformers does it.
    """
    kept: dict[str, str] = {}
    followers: dict[str, str] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        here = [name for name in (source, target) if name in encodings]
        if not here:
            kept[target] = source
        elif len(here) == 1:
            other = target if here[0] == source else source
            if not has_own(other.rpartition(".")[0]):
                followers[other] = here[0]
    model.all_tied_weights_keys = kept
    return followers


@torch.no_grad()
def unpack(model: PreTrainedModel, encodings: Encodings, followers: Mapping[str, str]) -> None:
    """Make the tensors out of what was loaded, and tie the `followers` of each to it.

    Rounded ones are frozen, and inside `keep_packed` stay packed. Raises `InputError` where something is missing or
    contradictory.
    """
    for name, encoding in encodings.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        parts = [getattr(module, part) for part in encoding.part_names(leaf)]
        for part, tensor in zip(encoding.part_names(name), parts, strict=True):
            # transformers fills what the files lack with uninitialised memory, and marks what it loaded.
            if tensor.device.type == "meta" or not getattr(tensor, "_is_hf_initialized", False):
                raise InputError(
                    f"{part} was not loaded: the files lack it, or it was sent to disk",
                    hint=f"{_INCOMPLETE}; {encoding.adjective} tensors cannot be offloaded",
                )
        try:
            made = _parameter(name, encoding, tuple(tensor.detach() for tensor in parts))
        except InputError as error:
            raise InputError(f"{name}: {error.message}", hint=_INCOMPLETE) from error
        for part in encoding.part_names(leaf):
            delattr(module, part)
        if leaf in module._buffers:
            delattr(module, leaf)
        if not encoding.is_exact and not is_packed(made):
            remember(module, leaf, encoding, tuple(parts))
        made._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(module, leaf, made)
    for follower, name in followers.items():
        owner, _, leaf = follower.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(name))
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **followers}
    if encodings:
        model.register_load_state_dict_pre_hook(_unpack_state)
    # Constants need no copying from process to process, which would write to them.
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *packed_names(model)]
    if ignored:
        model._ddp_params_and_buffers_to_ignore = ignored


def _parameter(name: str, encoding: Encoding, parts: tuple[Tensor, ...]) -> nn.Parameter:
    if encoding.stays_packed and keeps_packed():
        specs = _specs(encoding, parts)
        misfit = encoding.misfit(name, specs, DTYPES)
        if misfit:
            raise InputError(misfit)
        codec: Any = replace(encoding, key=None)  # what it is called in the files is of this loading alone
        return parameter(parts, codec, encoding.dense_dtype(specs, DTYPES))
    return nn.Parameter(encoding.unpack(*parts), requires_grad=encoding.is_exact)


def _specs(encoding: Encoding, parts: Sequence[Tensor]) -> list[TensorSpec[torch.dtype]]:
    pairs = zip(encoding.parts, parts, strict=True)
    return [TensorSpec(part.suffix, found.dtype, tuple(found.shape)) for part, found in pairs]


def _unpack_state(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`, by which HF's Trainer goes back to one of its checkpoints."""
    parameters = dict(model.named_parameters(prefix.removesuffix("."), remove_duplicate=False))
    encodings = encodings_of(model)
    for name, kind in encoded(state).items():
        own = name.removeprefix(prefix)
        encoding = encodings.get(own)
        if encoding is None and kind.is_exact and name in parameters:
            encoding = kind(tuple(parameters[name].shape))
        if name in parameters and encoding is not None and isinstance(encoding, kind):
            tensors, mine = tuple(state.pop(part) for part in kind.part_names(name)), parameters[name]
            if isinstance(mine, PackedTensor):
                state[name] = PackedTensor(tensors, mine.encoding, mine.dtype)
                continue
            state[name] = encoding.unpack(*tensors)
            if not encoding.is_exact:
                owner, leaf = own.rpartition(".")[::2]
                remember(model.get_submodule(owner), leaf, encoding, tensors)
    for name in state.keys() & parameters.keys():
        look_again(parameters[name])


def unchanged_parts(model: Any, state: Mapping[str, Any], encodings: Encodings) -> dict[str, tuple[Tensor, ...]]:
    """The parts of those tensors that still are what they were made of and are to be stored so, in whatever dtype."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name in (name for name in encodings if name in state and not encodings[name].is_exact):
        made, tensor = remembered(model, name), state[name]
        if isinstance(tensor, PackedTensor):
            own: Any = tensor.encoding
            if replace(encodings[name].in_dtype(DTYPE_NAMES[tensor.dtype]), key=None) == own:
                found[name] = tensor.parts
            continue
        if made is None or tensor.dtype not in DTYPE_NAMES:
            continue
        before, wanted = (
            replace(one.in_dtype(DTYPE_NAMES[tensor.dtype]), key=None) for one in (made[0], encodings[name])
        )
        if before == wanted and before.shape == tuple(tensor.shape) and _stands_for(before, made[1], tensor):
            found[name] = made[1]
    return found


def _stands_for(encoding: Encoding, parts: tuple[Tensor, ...], tensor: Tensor) -> bool:
    """Whether a tensor is what its parts stand for in its dtype, or was on the way in a narrower one."""
    here = tensor.to(parts[0].device)
    ways = (DTYPE_NAMES[tensor.dtype], "BF16", "F16")
    return any(torch.equal(encoding.in_dtype(way).unpack(*parts).to(here), here) for way in ways)


def stored_encodings(
    model: Any, state: Mapping[str, Any], encodings: Encodings, unchanged: Collection[str] = ()
) -> dict[str, Encoding]:
    """The encodings of what there is to save, with the shapes and dtypes that it has.

    A model's layers may have been removed, its vocabulary resized, an adapter merged into a matrix that then is an
    ordinary one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name, encoding in encodings.items():
        if name in state and (name in unchanged or encoding.suits(_values(state[name]))):
            here = encoding if name in unchanged else encoding.of(_values(state[name]))
            dtype = stored_dtype(parameters[name]) if name in parameters else state[name].dtype
            found[name] = here.in_dtype(DTYPE_NAMES[dtype])
    return found


def packed_state(
    model: PreTrainedModel,
    state: dict[str, Any],
    encodings: Encodings,
    unchanged: Mapping[str, tuple[Tensor, ...]] = MappingProxyType({}),
) -> dict[str, Any]:
    """A state dict with their parts in the place of encoded tensors, and what is tied to them left out.

    What has not changed since it was loaded keeps its parts.
    """
    owners = {_place(state[name]) for name in encodings}
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied = {*ties.keys(), *ties.values()}
    packed: dict[str, Any] = {}
    for name, tensor in state.items():
        if name in encodings:
            encoding = encodings[name]
            if name in unchanged:
                dtype = encoding.dense_dtype(_specs(encoding, unchanged[name]), DTYPES)
                zero = torch.zeros(1, dtype=dtype, device=tensor.device)
                packed |= encoding.named(name, unchanged[name], zero)
            else:
                packed |= encoding.encode(name, _values(tensor))
        elif name not in tied or _place(tensor) not in owners:
            packed[name] = _values(tensor)
    return packed


def _values(tensor: Tensor) -> Tensor:
    return tensor.unpacked() if isinstance(tensor, PackedTensor) else tensor


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Equal for tensors that share their memory."""
    return tensor.device, (tensor.parts[0] if isinstance(tensor, PackedTensor) else tensor).data_ptr()


def with_saved_keys(model: PreTrainedModel, packed: Mapping[str, Any], encodings: Encodings) -> dict[str, Encoding]:
    """The encodings with the names that `save_pretrained` gives the tensors of a packed state dict."""
    first = {name: encoding.part_names(name)[0] for name, encoding in encodings.items()}
    keys = saved_keys(model, packed, first.values())
    return {
        name: encoding.stored_as(name, keys[first[name]].removesuffix(encoding.parts[0].suffix))
        for name, encoding in encodings.items()
    }


def encodings_of(model: PreTrainedModel) -> dict[str, Encoding]:
    """The encodings of a loaded model's tensors, by name."""
    config = getattr(model.config, "quantization_config", None)
    return encodings_from(getattr(config, "encodings", None) or {})

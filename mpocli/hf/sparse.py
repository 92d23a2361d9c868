"""Sparse tensors of a transformers model: packed in the files, dense with zeros in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpocli.errors import InputError
from mpocli.hf.renaming import saved_keys
from mpocli.hf.replace import local_name
from mpocli.io.encoding import Encoding, Encodings, encoded_names, encoding_of, encodings_from, part_names
from mpocli.io.packing import encode
from mpocli.nn.held_zeros import hold_zeros, look_again, release_zeros_of
from mpocli.sparse.bits import unpack_sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INCOMPLETE = "the weight files are incomplete or belong to another checkpoint"


def reserve(model: PreTrainedModel, encodings: Encodings, stored: Mapping[str, list[int]]) -> dict[str, Encoding]:
    """Put a bitmask and values in the place of every tensor that is stored so, sized as in the files (`stored`).

    Modules that this class lacks (a head, say) are passed over. Returns the encodings of the others, by their names in
    this class. Raises `InputError` where the model's tensor has another shape, and for a bitmask without an encoding.
    """
    by_entry: dict[str, str] = {}
    for key in stored:
        if key.endswith("_bitmask"):
            name = key.removesuffix("_bitmask")
            by_entry[encoding_of(encodings, name) or name] = name
    for name in sorted(encoded_names(stored)):
        if encoding_of(encodings, name) is None and local_name(model, name.rpartition(".")[0]) is not None:
            raise InputError(
                f"{name} is stored as a bitmask, and config.json has no encoding for it",
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
            raise InputError(f"{name} is encoded and the files lack its bitmask", hint=_INCOMPLETE)
        bits, values = part_names(by_entry[name])
        del module._parameters[leaf]
        if leaf == "weight":  # its tombstone
            module.register_buffer(leaf, torch.zeros(1, dtype=tensor.dtype, device=tensor.device))
        for part, key in ((f"{leaf}_bitmask", bits), (f"{leaf}_values", values)):
            if key not in stored:
                raise InputError(f"{key} is not in the files", hint=_INCOMPLETE)
            integer = part.endswith("_bitmask")
            dtype = torch.uint8 if integer else tensor.dtype
            empty = torch.empty(stored[key], dtype=dtype, device=tensor.device)
            if integer:
                module.register_buffer(part, empty)
            else:
                module.register_parameter(part, nn.Parameter(empty))
        local[f"{place}.{leaf}"] = encoding
    return local


def postpone_ties(model: PreTrainedModel, encodings: Encodings, has_own: Callable[[str], bool]) -> dict[str, str]:
    """Take the ties of sparse tensors off a model, which transformers would tie before they are unpacked.

    An encoder's sparse table may load into a class that ties its head to it. Returns {follower: sparse tensor};
    what the files hold apart (`has_own`) stays apart, as transformers does it.
    """
    kept: dict[str, str] = {}
    followers: dict[str, str] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        sparse = [name for name in (source, target) if name in encodings]
        if not sparse:
            kept[target] = source
        elif len(sparse) == 1:
            other = target if sparse[0] == source else source
            if not has_own(other.rpartition(".")[0]):
                followers[other] = sparse[0]
    model.all_tied_weights_keys = kept
    return followers


@torch.no_grad()
def unpack(model: PreTrainedModel, encodings: Encodings, followers: Mapping[str, str]) -> None:
    """Make the dense tensors out of what was loaded, and tie the `followers` of each to it.

    Raises `InputError` where it is missing or contradictory.
    """
    for name, encoding in encodings.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        bits, values = (getattr(module, part) for part in part_names(leaf))
        for part, tensor in zip(part_names(name), (bits, values), strict=True):
            # transformers fills what the files lack with uninitialised memory, and marks what it loaded.
            if tensor.device.type == "meta" or not getattr(tensor, "_is_hf_initialized", False):
                raise InputError(
                    f"{part} was not loaded: the files lack it, or it was sent to disk",
                    hint=f"{_INCOMPLETE}; sparse tensors cannot be offloaded",
                )
        try:
            dense = unpack_sparse(bits, values.detach(), encoding.shape)
        except InputError as error:
            raise InputError(f"{name}: {error.message}", hint=_INCOMPLETE) from error
        for part in part_names(leaf):
            delattr(module, part)
        if leaf in module._buffers:
            delattr(module, leaf)
        parameter = nn.Parameter(dense)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(module, leaf, parameter)
    for follower, name in followers.items():
        owner, _, leaf = follower.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(name))
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **followers}
    if encodings:
        model.register_load_state_dict_pre_hook(_unpack_state)
        keep_zeros(model)


def _unpack_state(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`, by which HF's Trainer goes back to one of its checkpoints."""
    parameters = dict(model.named_parameters(prefix.removesuffix("."), remove_duplicate=False))
    for name in encoded_names(state) & parameters.keys():
        bits, values = (state.pop(part) for part in part_names(name))
        state[name] = unpack_sparse(bits, values, parameters[name].shape)
    for name in state.keys() & parameters.keys():
        look_again(parameters[name])


def stored_encodings(state: Mapping[str, Any], encodings: Encodings) -> dict[str, Encoding]:
    """Of what there is to save: a model's layers may have been removed, its vocabulary resized, an adapter merged into
    a matrix, which then has no zero and is an ordinary one."""
    return {
        name: replace(e, shape=tuple(state[name].shape))
        for name, e in encodings.items()
        if name in state and not bool(state[name].all())
    }


def packed_state(model: PreTrainedModel, state: dict[str, Any], encodings: Iterable[str]) -> dict[str, Any]:
    """A state dict with bitmask and values in the place of the tensors that `encodings` names, and what is tied to
    them left out."""
    names = set(encodings)
    owners = {(state[name].device, state[name].data_ptr()) for name in names}
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied = {*ties.keys(), *ties.values()}
    packed: dict[str, Any] = {}
    for name, tensor in state.items():
        if name in names:
            packed |= encode(name, tensor)
        elif name not in tied or (tensor.device, tensor.data_ptr()) not in owners:
            packed[name] = tensor
    return packed


def with_saved_keys(model: PreTrainedModel, packed: Mapping[str, Any], encodings: Encodings) -> dict[str, Encoding]:
    """The encodings with the names that `save_pretrained` gives the tensors of a packed state dict."""
    bits = {name: part_names(name)[0] for name in encodings}
    keys = saved_keys(model, packed, bits.values())
    suffix = len(part_names("")[0])
    return {name: encoding.stored_as(name, keys[bits[name]][:-suffix]) for name, encoding in encodings.items()}


def set_encodings(model: PreTrainedModel, encodings: Encodings) -> None:
    """Say how a loaded model's tensors are to be stored: plain `save_pretrained` then packs them."""
    from mpocli.hf.plugin import MPOConfig, MPOQuantizer

    config: Any = getattr(model.config, "quantization_config", None)
    if not isinstance(config, MPOConfig):
        config = MPOConfig()
    config.encodings = {name: encoding.to_dict() for name, encoding in sorted(encodings.items())}
    anything: Any = model
    if config.modules or config.encodings:
        model.config.quantization_config = config
        anything.hf_quantizer = MPOQuantizer(config)
        anything.is_quantized = True
        anything.quantization_method = config.quant_method
    elif getattr(anything, "hf_quantizer", None) is not None:
        del model.config.quantization_config
        anything.hf_quantizer, anything.is_quantized = None, False


def sparse_encodings(model: PreTrainedModel) -> dict[str, Encoding]:
    """Of a loaded model's tensors, by name."""
    config = getattr(model.config, "quantization_config", None)
    return encodings_from(getattr(config, "encodings", None) or {})


def sparse_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The tensors of a loaded model that its files hold as bitmask and values, by name."""
    return {name: model.get_parameter(name) for name in sparse_encodings(model)}


def keep_zeros(model: PreTrainedModel) -> None:
    """Let training leave the zeros of sparse tensors exactly zero, whoever trains, and whichever copy of the model."""
    _hold(model)
    if not any(isinstance(hook, _Hold) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_Hold())


def release_zeros(model: PreTrainedModel) -> None:
    """Let training fill the zeros of a sparse model, which is then saved as an ordinary one.

    >>> model = AutoModel.from_pretrained("bert-50")  # doctest: +SKIP
    >>> mpocli.release_zeros(model)  # doctest: +SKIP
    """
    for parameter in sparse_parameters(model).values():
        release_zeros_of(parameter)
    set_encodings(model, {})


def _hold(model: nn.Module) -> None:
    config: Any = model.config
    for name in getattr(getattr(config, "quantization_config", None), "encodings", None) or {}:
        owner, _, leaf = name.rpartition(".")
        with suppress(AttributeError):  # a layer that was removed
            parameter = model.get_submodule(owner)._parameters.get(leaf)
            if parameter is not None:  # a weight under a mask is elsewhere
                hold_zeros(parameter)


class _Hold:
    """Before a forward pass that may be trained on: what was copied or replaced meanwhile is held, too."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            _hold(model)

"""Zeros of a loaded sparse model, which stay zero whoever trains it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpocli.hf.encoded import encodings_of
from mpocli.io.encodings.known import KINDS
from mpocli.nn.held_zeros import hold_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sparse_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The tensors of a loaded model whose encoding is one of zeros, by name."""
    encodings = encodings_of(model)
    return {name: model.get_parameter(name) for name, encoding in encodings.items() if encoding.holds_zeros}


def keep_zeros(model: PreTrainedModel) -> None:
    """Let training leave the zeros of sparse tensors exactly zero, whoever trains, and whichever copy of the model."""
    _hold(model)
    if not any(isinstance(hook, _Hold) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_Hold())


def _hold(model: nn.Module) -> None:
    config: Any = model.config
    encodings = getattr(getattr(config, "quantization_config", None), "encodings", None) or {}
    for name in (name for name, entry in encodings.items() if KINDS[entry["encoding"]].holds_zeros):
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

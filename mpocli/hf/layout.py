"""How a model's layers have the tokens that it is given: found by running it without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpocli.hf.padding import parameter_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Primes of which none is the sum or the product of others: what comes of one of them is known by its number.
_ROWS, _LENGTH, _DECODER_LENGTH = 3, 17, 11

Shape = tuple[int, ...]


def layouts(skeleton: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """`batch`, `length` or a complaint for each of the named linear layers that tokens reach.

    `batch`: a layer's input has one vector for each token, (batch, length, …) or all in one dimension, or as many more
    as the model pads its own input with; `length`: (length, batch, …). The complaint says what else it is. A layer of
    images or sounds is not reached, and not in the result. `skeleton` is used up.
    """
    lengths = (_LENGTH, _DECODER_LENGTH)
    shapes = _input_shapes(skeleton, names, lengths)
    sides = _encoder_modules(skeleton)
    longer = [shape[1] for shape in shapes.values() if len(shape) == 2 and shape[0] == _ROWS]
    most = max(longer, default=_LENGTH)
    # What a model pads to it leaves as it is; what it adds to any text it adds to this one, too.
    again = _input_shapes(skeleton, names, (most, most)) if most > _LENGTH else {}
    found = {}
    for name, shape in shapes.items():
        length = lengths[sides is not None and skeleton.get_submodule(name) not in sides]
        if shape in ((_ROWS, length), (_ROWS * length,)):
            found[name] = "batch"
        elif shape == (length, _ROWS):
            found[name] = "length"
        elif len(shape) == 2 and shape[0] == _ROWS and shape[1] > length and again.get(name) == (_ROWS, most):
            found[name] = "batch"
        else:
            vectors = "x".join(map(str, shape)) or "1"
            found[name] = f"of {_ROWS} texts of {length} tokens it has {vectors} vectors, not one for each token"
    return found


class _Reached(Exception):
    """Every layer has been called: the rest of the forward pass is not needed."""


def _input_shapes(model: PreTrainedModel, names: Sequence[str], lengths: tuple[int, int]) -> dict[str, Shape]:
    """The leading dimensions of each layer's first input, for texts of these lengths (the decoder's the second)."""
    shapes: dict[str, Shape] = {}
    model.eval()
    with ExitStack() as hooks, torch.no_grad():
        for name in names:

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                shapes.setdefault(name, tuple(x.shape[:-1]))
                if len(shapes) == len(names):
                    raise _Reached

            hooks.callback(model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True).remove)
        # A model that looks into its input cannot run without data: with zeros, then, that take no memory.
        for filled in (False, True):
            if filled:
                _fill(model)
            with suppress(Exception):  # whatever comes behind the last layer that was reached
                model(**_texts(model, lengths, masked=filled))
            if len(shapes) == len(names):
                break
    return shapes


def _texts(model: PreTrainedModel, lengths: tuple[int, int], *, masked: bool) -> dict[str, Any]:
    """Texts of zeros, with `masked` beside the mask of their tokens: a model that looks for padding takes its own
    number for that, or has none."""
    accepted = parameter_names(model)
    device = next(model.parameters()).device
    texts = {
        name: torch.zeros(_ROWS, length, dtype=torch.int64, device=device)
        for name, length in zip(("input_ids", "decoder_input_ids"), lengths, strict=True)
        if name in accepted and (name == "input_ids" or model.config.is_encoder_decoder)
    }
    if masked and "attention_mask" in accepted and "input_ids" in texts:
        texts["attention_mask"] = torch.ones_like(texts["input_ids"])
    return texts


def _fill(model: PreTrainedModel) -> None:
    """Zeros in the place of all weights: one number each, seen in every place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _encoder_modules(model: PreTrainedModel) -> set[nn.Module] | None:
    if not model.config.is_encoder_decoder:
        return None
    encoder: Any = model.get_encoder()
    return set(encoder.modules())

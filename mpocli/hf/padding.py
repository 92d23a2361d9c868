"""Which of the tokens that a model is given are padding, for each of its stacks, whoever calls it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100  # the label that transformers' losses leave out

Given = Mapping[str, Any]


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of a module's `forward`, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def given_to(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Given) -> dict[str, Any]:
    """The arguments of a call by name, without those that are None."""
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in found.items() if value is not None}


def padding_id(model: PreTrainedModel) -> int | None:
    """The token id that a model pads with: its own, else the end of a text, which fills what has ended."""
    config = model.config.get_text_config()
    for holder in (config, model.config, getattr(model, "generation_config", None)):
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(holder, name, None)
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, int):
                return found
    return None


def stack_mask(stack: Given, model: Given, pad: int | None, *, decoder: bool) -> Tensor | None:
    """(B, L) zero or False at the padding among the tokens that a stack is given; None where all of them count.

    `stack` and `model` are what the stack and the whole model around it are called with. A stack's own mask counts
    always; a decoder's that has none follows from what it is to predict or read (`decoder_mask`). In a step of a
    cached generation, padding is what fills a text that has ended.
    """
    tokens = next((stack[name] for name in ("input_ids", "inputs_embeds") if isinstance(stack.get(name), Tensor)), None)
    if tokens is None or tokens.dim() < 2:
        return None
    rows, length = tokens.shape[:2]
    masks = []
    own = _two_dimensional(stack.get("attention_mask"))
    if own is not None and own.shape[0] == rows and own.shape[1] >= length:
        masks.append(own[:, -length:] != 0)  # with a cache the mask covers what was read before, too
    ids = tokens if tokens.dim() == 2 and not tokens.is_floating_point() else None
    cached = _goes_on(stack)
    if decoder:
        found = decoder_mask(model, pad, length)
        if found is None and own is None and ids is not None:
            found = real_ids(ids, pad, goes_on=cached)
        if found is not None and found.shape == (rows, length):
            masks.append(found.to(tokens.device))
    elif cached and length == 1 and ids is not None and pad is not None:
        masks.append(ids != pad)
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1].to(masks[0].device)


def decoder_mask(given: Given, pad: int | None, length: int | None = None) -> Tensor | None:
    """(B, L) True where a decoder stands at a token, from what its model is given; None where that does not say.

    Its `decoder_attention_mask`; else the labels, which it reads shifted by one, so that it stands at a token exactly
    where there is one to predict; else its `decoder_input_ids` without the padding they end with. `length` is that of
    the decoder's input, if known: labels of another shape are no tokens.
    """
    mask = _two_dimensional(given.get("decoder_attention_mask"))
    if mask is not None and (length is None or mask.shape[1] >= length):
        return mask[:, -(length or mask.shape[1]) :] != 0
    counted, labels = None, _two_dimensional(given.get("labels"))
    if labels is not None and not labels.is_floating_point() and length in (None, labels.shape[1]):
        counted = labels != IGNORE
    ids = _two_dimensional(given.get("decoder_input_ids"))
    if ids is None:
        return counted
    real = real_ids(ids, pad, goes_on=_goes_on(given))
    if counted is None or counted.shape != real.shape:
        return real
    # What stands before the last label is read, whether or not it is predicted (a prompt).
    return real & _before_last(counted)


def real_ids(ids: Tensor, pad: int | None, *, goes_on: bool = False) -> Tensor:
    """False for the padding that a row of ids (B, L) ends with. The first id of a text that does not `goes_on` is
    what a decoder starts with, which in T5 is the padding id, too.

    >>> real_ids(torch.tensor([[0, 5, 0, 0], [0, 0, 0, 0]]), 0).int().tolist()
    [[1, 1, 0, 0], [1, 0, 0, 0]]
    """
    if pad is None:
        return torch.ones_like(ids, dtype=torch.bool)
    real = _before_last(ids != pad)
    if not goes_on:
        real[:, 0] = True
    return real


def _before_last(chosen: Tensor) -> Tensor:
    """True up to the last True of every row (B, L)."""
    return chosen.flip(1).cumsum(1).flip(1) > 0


def _two_dimensional(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _goes_on(given: Given) -> bool:
    """Whether the text has begun in an earlier pass. The argument's name changed on the way to transformers 6."""
    cache = given.get("past_key_values", given.get("cache"))
    length = getattr(cache, "get_seq_length", None)
    return bool(length() if length else cache)

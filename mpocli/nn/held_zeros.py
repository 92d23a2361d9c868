"""Zeros of a parameter that stay zero, whoever trains it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

# By the parameter itself: a copy has to be held anew.
_HELD: Any = WeakIdKeyDictionary()
_watching: list[Any] = []


class _Held:
    """The places where a parameter was not zero when its first gradient came: until then nobody has to know them, so
    that a model which is not trained costs nothing."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.mask: Tensor | None = None
        # The parameter holds the hook, and must not be held by it.
        self.values = weakref.ref(parameter)
        self.hook = parameter.register_hook(self)

    def __call__(self, gradient: Tensor) -> Tensor:
        mask = self._mask_on(gradient.device)
        return torch.where(mask, gradient, gradient.new_zeros(()))  # no product: it may be infinite

    def _mask_on(self, device: torch.device) -> Tensor:
        if self.mask is None:
            values = self.values()
            assert values is not None
            self.mask = values.detach() != 0
            _watch_optimizers()
        self.mask = self.mask.to(device)
        return self.mask

    @torch.no_grad()
    def restore(self, parameter: nn.Parameter) -> None:
        """After a step of an optimiser that mixes the entries of a gradient (Muon) or moves without one."""
        if self.mask is not None and self.mask.shape == parameter.shape:
            parameter.masked_fill_(~self._mask_on(parameter.device), 0.0)


def hold_zeros(parameter: nn.Parameter) -> None:
    """Let every entry that is zero now, or is when training begins, stay exactly zero in it.

    Gradients are zero there, so that neither momentum nor weight decay of SGD, AdamW and their kin moves them; after
    every step of any `torch.optim` optimiser they are zero in any case. Held twice is held once. A copy of the
    parameter has to be held anew, a conversion in place (`.to()`) not.
    """
    if parameter not in _HELD and parameter.requires_grad:
        _HELD[parameter] = _Held(parameter)


def are_zeros_held(parameter: nn.Parameter) -> bool:
    return parameter in _HELD


def release_zeros_of(parameter: nn.Parameter) -> None:
    """Let training fill them."""
    held = _HELD.pop(parameter, None)
    if held is not None:
        held.hook.remove()


def look_again(parameter: nn.Parameter) -> None:
    """Other values were loaded: the zeros to keep are theirs."""
    if parameter in _HELD:
        _HELD[parameter].mask = None


def _watch_optimizers() -> None:
    """Once in a process, when the first held parameter is trained: see to it after every optimiser's step."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _HELD:
                _HELD[parameter].restore(parameter)

"""A model in evaluation mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients, or with those of activations alone; every setting comes back."""
    modes = {module: module.training for module in model.modules()}
    learnt = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        if gradients:
            model.requires_grad_(False)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, setting in learnt.items():
            parameter.requires_grad_(setting)

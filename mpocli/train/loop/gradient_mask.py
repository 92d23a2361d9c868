"""The gradient mask of MPOE: now and then a shared core's update is discarded, so that no expert dominates it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mpocli.nn import MPOExperts


class GradientMask(TrainerCallback):  # type: ignore[misc]
    """C ← C − α ∂L/∂C (1 − b) with b ~ Bernoulli(`probability`) for every step and shared core (MPOE, COLING 2022,
    §3.2), or for every element of it with `elements`.

    What is masked keeps its value, its moments and its place in the decay. Draws follow from seed, step and core alone:
    equal on all processes, and in a resumed run.
    """

    def __init__(self, model: nn.Module, probability: float, seed: int, *, elements: bool = False) -> None:
        self.probability, self.seed, self.elements = probability, seed, elements
        modules = [m for m in model.modules() if isinstance(m, MPOExperts) and m.share == "central"]
        self.cores = [module.cores[module.central] for module in modules]
        self.kept: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []
        self.masked, self.drawn = 0, 0

    def draw(self, step: int) -> list[Tensor]:
        """True where the update of a step is discarded: a scalar for each core, or a tensor of its shape."""
        found = []
        for number, core in enumerate(self.cores):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + number)
            found.append(torch.rand(core.shape if self.elements else (), generator=generator) < self.probability)
        return found

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if not self.probability:
            return
        self.kept = []
        for core, mask in zip(self.cores, self.draw(state.global_step), strict=True):
            if core.grad is None:
                continue
            self.drawn += 1
            if not self.elements:
                if bool(mask):
                    core.grad = None  # an optimiser passes over such parameters altogether
                    self.masked += 1
                continue
            moments = _moments(optimizer, core)
            before = {key: value.clone() for key, value in moments.items()}
            self.kept.append((core, mask.to(core.device), core.detach().clone(), before))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        for core, mask, value, before in self.kept:
            core.copy_(torch.where(mask, value, core))
            for key, moment in _moments(optimizer, core).items():
                old = before.get(key, torch.zeros_like(moment))  # the first step made them
                moment.copy_(torch.where(mask, old, moment))
        self.kept = []


def _moments(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimiser keeps for every element of a parameter."""
    inner = getattr(optimizer, "optimizer", optimizer)
    state = inner.state.get(parameter, {}) if inner is not None else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape}

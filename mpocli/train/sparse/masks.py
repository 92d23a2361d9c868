"""Sparse training of a loaded model: masks put on, driven by the schedule, and folded in at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from mpocli.config.scoring import Scoring
from mpocli.nn.masked import Layout, MaskedWeight, MaskGroup, fold_mask, holder, mask_weight
from mpocli.nn.packed import is_packed
from mpocli.sparse import CubicSchedule, Pattern


@dataclass(frozen=True)
class MaskTarget:
    """A tensor that gets a mask: module, its leaf, how it is read as a matrix, and whether it is sparse already."""

    module: str
    leaf: str
    layout: Layout
    is_sparse: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.leaf}"


def put_masks(
    model: nn.Module, places: Sequence[MaskTarget], scoring: Scoring, pattern: Pattern, *, together: bool, seed: int
) -> dict[str, MaskedWeight]:
    """Mask every place, under one threshold for all where `together`; returns the masks by the tensors' names.

    Random starts are drawn by the seed and the place's number.
    """
    masked = {}
    for number, place in enumerate(places):
        module = model.get_submodule(place.module)
        own_seed = seed * 1_000_003 + number
        masked[place.name] = mask_weight(
            module, place.leaf, place.layout, scoring, pattern, seed=own_seed, keep_zeros=place.is_sparse
        )
    if together:
        owners = [holder(model.get_submodule(place.module), place.leaf) for place in places]
        MaskGroup(list(zip(masked.values(), owners, strict=True)))
    return masked


def train_only(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze everything but these parameters: what no optimiser holds must not collect gradients either. Packed ones
    are frozen anyway."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted and not is_packed(parameter))


@torch.no_grad()
def fold_masks(model: nn.Module, places: Sequence[MaskTarget]) -> None:
    """Make all masked weights the weights themselves.

    All are computed before the first is folded: under one threshold a mask depends on the weights of the others.
    """
    modules = [model.get_submodule(place.module) for place in places]
    masked = [getattr(module, place.leaf).detach() for module, place in zip(modules, places, strict=True)]
    for module, place, weight in zip(modules, places, masked, strict=True):
        fold_mask(module, place.leaf).copy_(weight)


class SparsitySteps(TrainerCallback):  # type: ignore[misc]
    """Sets the sparsity of all masks after every step, and before the first."""

    def __init__(self, masked: Mapping[str, MaskedWeight], schedule: CubicSchedule) -> None:
        self.masked, self.schedule = masked, schedule

    def _set(self, step: int) -> None:
        for masked in self.masked.values():
            masked.step(self.schedule.at(step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._set(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._set(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            logs["sparsity"] = self.schedule.at(max(0, state.global_step - 1))  # that of the last step's loss

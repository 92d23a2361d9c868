"""Experts in the model that a command trains: options that replace those of its checkpoint, and what routers did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mpocli.errors import UsageError
from mpocli.hf.routing import RoutingConfig, routers
from mpocli.nn.router import Statistics
from mpocli.train.gradient_mask import GradientMask


@dataclass(frozen=True)
class RoutingChanges:
    """What `finetune` is told to do otherwise than the checkpoint says; None leaves it."""

    mask_prob: float | None = None
    balance_loss: float | None = None
    z_loss: float | None = None
    capacity_factor: float | None = None

    def given(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}


def has_experts(model: Any) -> bool:
    return bool(routers(model))


def apply_routing(model: Any, changes: RoutingChanges) -> RoutingConfig | None:
    """Give a loaded model's routers other options, which are then stored with it. None where it has no experts.

    Raises `UsageError` for changes to a model without experts.
    """
    given = changes.given()
    if not has_experts(model):
        if given:
            option = f"--{next(iter(given)).replace('_', '-')}"
            raise UsageError(f"{option}: the model has no experts", hint="run mpocli expand-moe first")
        return None
    stored = model.config.quantization_config
    routing = RoutingConfig.from_dict({**stored.routing, **given})
    stored.routing = routing.to_dict()
    for router in routers(model).values():
        router.options = replace(routing.router)
        router.statistics = Statistics()
    return routing


def gradient_mask(model: Any, routing: RoutingConfig | None, seed: int) -> list[Any]:
    """The callbacks that training needs for experts: statistics of training alone, and the mask of shared cores."""
    if routing is None:
        return []
    statistics = TrainingStatistics(model)
    if not routing.mask_prob:
        return [statistics]
    return [statistics, GradientMask(model, routing.mask_prob, seed, elements=routing.mask_elements)]


class TrainingStatistics(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Routers count what a step routes and nothing between steps, where models are evaluated. Checkpoints hold the
    counts, so that a resumed run reports those of the whole."""

    def __init__(self, model: Any) -> None:
        self.routers = routers(model)
        self.counted = {name: Statistics() for name in self.routers}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        for name, values in saved.items():
            self.counted[name] = _restored(values)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, router in self.routers.items():
            router.statistics = self.counted[name]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for router in self.routers.values():
            router.statistics = Statistics()  # forgotten

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step_begin(args, state, control)

    def state(self) -> dict[str, Any]:
        counts = {
            name: {key: value.tolist() for key, value in vars(statistics).items() if value is not None}
            for name, statistics in self.counted.items()
        }
        return {"args": {}, "attributes": counts}


def _restored(values: Mapping[str, Any]) -> Statistics:
    """Out of a checkpoint: the sum of the entropies is the one number that is no count."""
    made: dict[str, Tensor] = {
        key: torch.tensor(value, dtype=torch.float32 if key == "entropy" else torch.int64)
        for key, value in values.items()
    }
    return Statistics(**made)


def router_report(model: Any) -> Mapping[str, dict[str, Any]]:
    """By layer: tokens routed since the statistics began, load of each expert, entropy (nats), share dropped."""
    return {name: router.statistics.report() for name, router in routers(model).items()}

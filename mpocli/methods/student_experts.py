"""Experts in the model that a command trains: options that replace those of its checkpoint, and what routers did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpocli.errors import UsageError
from mpocli.hf.routing import RoutingConfig, routers
from mpocli.nn.router import Statistics
from mpocli.train.gradient_mask import GradientMask
from mpocli.train.router_statistics import TrainingStatistics


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


def router_report(model: Any) -> Mapping[str, dict[str, Any]]:
    """By layer: tokens routed since the statistics began, load of each expert, entropy (nats), share dropped."""
    return {name: router.statistics.report() for name, router in routers(model).items()}

"""Experts in the model that a command trains: options that replace those of its checkpoint, and what routers did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpocli.config.finetune import RoutingChanges
from mpocli.config.routing import RoutingConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.routing import routers
from mpocli.nn.router import Statistics
from mpocli.train.loop.gradient_mask import GradientMask
from mpocli.train.loop.router_statistics import TrainingStatistics


def traits(checkpoint: Checkpoint) -> set[str]:
    """What a checkpoint has that options may be about: `cores`, `experts`, `shared cores`."""
    specs = [module.spec for module in checkpoint.manifest.modules] if checkpoint.manifest else []
    found = {
        "cores": any(spec.share != "dense" for spec in specs),
        "experts": any(spec.experts for spec in specs),
        "shared cores": any(spec.experts and spec.share == "central" for spec in specs),
    }
    return {name for name, has in found.items() if has}


def has_experts(model: Any) -> bool:
    return bool(routers(model))


def apply_routing(model: Any, changes: RoutingChanges) -> RoutingConfig | None:
    """Give a loaded model's routers other options, which are then stored with it. None where it has no experts."""
    given = changes.given()
    if not has_experts(model):
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

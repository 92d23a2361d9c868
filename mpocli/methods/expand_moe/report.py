"""What expand-moe did with each matrix of its networks, for its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpocli.hf.weight import Weight
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.totals import Totals
from mpocli.methods.skipped import Skipped


@dataclass(frozen=True)
class ExpertsReport:
    """What became of one matrix: elements of the core in common and of each expert's own, against n dense experts.

    `relative_error` = ‖W−Ŵ‖_F/‖W‖_F of what is stored (0 for dense experts), None where that was not measured: with
    noise, and of cores that were trained before. `size_ratio` = stored / n dense ones.
    """

    name: str
    role: str | None
    action: str
    place: str
    shape: tuple[int, int]
    shared_params: int
    own_params: int
    router_params: int
    params: int
    dense_params: int
    dense_experts_params: int
    size_ratio: float
    relative_error: float | None
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bond_dims: tuple[int, ...]


@dataclass(frozen=True)
class ExpandReport:
    """`totals` of the whole model now and `before`; `dense_experts_params` what it would have with n dense experts."""

    out: str
    seconds: float
    experts: int
    share: str
    routing: dict[str, Any]
    networks: int
    modules: tuple[ExpertsReport, ...]
    kept: tuple[Skipped, ...]
    totals: Totals
    before: Totals
    router_params: int
    dense_experts_params: int
    widened: int = 0  # tensors in few bits that became, or belong to, experts' own


def experts_report(weight: Weight, entry: ModuleEntry) -> ExpertsReport:
    """`entry` is what the manifest says of the weight's experts."""
    spec = entry.spec
    cores = spec.central_params + spec.auxiliary_params
    weights = cores if spec.share != "dense" else spec.experts * weight.dense_params
    shared = spec.central_params if spec.share == "central" else 0
    return ExpertsReport(
        name=weight.name,
        role=weight.role,
        action="experts",
        place=spec.place,
        shape=weight.shape,
        shared_params=shared,
        own_params=(weights - shared) // spec.experts,
        router_params=spec.params - weights,
        params=spec.params,
        dense_params=weight.dense_params,
        dense_experts_params=spec.experts * weight.dense_params,
        size_ratio=weights / (spec.experts * weight.dense_params),
        relative_error=entry.relative_error,
        out_dims=spec.out_dims,
        in_dims=spec.in_dims,
        bond_dims=spec.bond_dims,
    )

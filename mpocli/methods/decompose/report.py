"""What decompose did with each weight matrix, for its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mpocli.hf.values import is_rounded
from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import CheckpointReader, dtype_wanted
from mpocli.io.manifest import Manifest
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.mpo_spec import MPOSpec
from mpocli.methods.decompose.plan import WeightPlan
from mpocli.mpo import chain_macs, choose_path, rebuild_macs


@dataclass(frozen=True)
class ModuleReport:
    """What became of one weight matrix. `params` and `dense_params` count elements, `relative_error` is
    ‖W−Ŵ‖_F/‖W‖_F of what is stored (None in a dry run, 0 for a kept matrix), W the dense matrix, or the MPO that was
    truncated again."""

    name: str
    role: str | None
    action: Literal["mpo", "quantised", "kept"]
    reason: str
    shape: tuple[int, int]
    params: int
    dense_params: int
    relative_error: float | None
    out_dims: tuple[int, ...] | None = None
    in_dims: tuple[int, ...] | None = None
    bond_dims: tuple[int, ...] | None = None
    tied: tuple[str, ...] = ()
    bytes: int = 0
    dense_bytes: int = 0
    form: str | None = None  # the candidate's name, where a planner chose it
    weighted_error: float | None = None  # in the norm of the inputs, where there was calibration data
    path: str | None = None  # how the forward pass computes it, and what that costs a token
    macs: int | None = None
    cut_from: tuple[int, ...] | None = None  # the bonds of an MPO that was truncated again


def module_reports(
    plans: Sequence[WeightPlan],
    written: Manifest,
    kept: Mapping[str, str],
    dtype: str | None,
    reader: CheckpointReader,
) -> tuple[ModuleReport, ...]:
    """Of every plan; `kept` says why a weight stayed although it was to be decomposed."""
    entries = written.by_name
    return tuple(_report(plan, entries, kept, dtype, reader) for plan in plans)


def _report(
    plan: WeightPlan,
    entries: Mapping[str, ModuleEntry],
    kept: Mapping[str, str],
    dtype: str | None,
    reader: CheckpointReader,
) -> ModuleReport:
    weight = plan.weight
    is_made = plan.changes and weight.name not in kept
    made = entries.get(weight.name) if is_made else None
    entry = made or weight.entry
    params = entry.spec.params if entry else weight.dense_params
    reason = "" if is_made else kept.get(weight.name, plan.reason)
    form = plan.form if is_made else None
    stored = dtype_wanted(weight.dtype, dtype)
    cost = forward_cost(entry.spec) if entry else None
    error = entry.relative_error if entry else None if is_rounded(reader, weight) else 0.0
    if is_made:
        size = plan.format.nbytes(weight, stored) if plan.format else params * stored.itemsize
    else:
        size = _stored_bytes(weight, params, dtype, reader)
    return ModuleReport(
        name=weight.name,
        role=weight.role,
        action="mpo" if entry else "quantised" if is_made or is_rounded(reader, weight) else "kept",
        reason=reason,
        shape=weight.shape,
        params=params,
        dense_params=weight.dense_params,
        relative_error=form.relative_error if form and (error is None or not entry) else error,
        out_dims=entry.spec.out_dims if entry else None,
        in_dims=entry.spec.in_dims if entry else None,
        bond_dims=entry.spec.bond_dims if entry else None,
        tied=tuple(member.name for member in weight.members[1:]),
        bytes=size,
        dense_bytes=weight.dense_params * weight.dtype.itemsize,
        form=form.name if form else None,
        weighted_error=form.weighted_error if form else None,
        path=cost[0] if cost else None,
        macs=cost[1] if cost else None,
        cut_from=weight.entry.spec.bond_dims if made and weight.entry else None,
    )


def _stored_bytes(weight: Weight, params: int, dtype: str | None, reader: CheckpointReader) -> int:
    """Bytes of a weight that stays as it is, in parts or not."""
    leaves = list(weight.entry.spec.core_shapes()) if weight.entry else []
    keys = [weight.key_of(leaf) for leaf in leaves or ["weight"]] if weight.key else []
    if not any(key in reader.encoded for key in keys):
        return params * dtype_wanted(weight.dtype, dtype).itemsize
    size = 0
    for key in keys:
        own = dtype_wanted(reader.specs[key].dtype, dtype)
        parts = reader.encoding(key).converted(key, reader.parts(key), own)
        size += sum(part.nbytes for part in parts if key not in reader.encoded or part.name != key)
    return size


def forward_cost(spec: MPOSpec, tokens: int = 256) -> tuple[str, int]:
    """The path that a forward pass of so many tokens takes, and its multiply-accumulates for each of them."""
    dims = spec.out_dims, spec.in_dims, spec.bond_dims
    path = choose_path(tokens, *dims)
    if path == "rebuild":
        return path, rebuild_macs(*dims) // tokens + math.prod(spec.out_dims) * math.prod(spec.in_dims)
    return path, chain_macs(*dims, path)

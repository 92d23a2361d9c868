"""Go through a checkpoint's files once, in their order, and write cores where decompose plans them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mpocli.hf.artifact import Checkpoint
from mpocli.hf.targets import Weight
from mpocli.hf.values import read_mpo
from mpocli.io.encodings.base import Encoding
from mpocli.io.manifest import Manifest, ModuleEntry, MPOSpec, Totals
from mpocli.io.signpost import SIGNPOST, add_signpost
from mpocli.io.writer import Sink
from mpocli.methods.decompose_plan import MPO_ALREADY, DecomposeConfig, WeightPlan, why_larger
from mpocli.methods.device import device_of
from mpocli.methods.solution import Solution
from mpocli.mpo import (
    MPO,
    SiteShape,
    Truncation,
    chain_macs,
    choose_path,
    compress,
    decompose,
    rebuild_macs,
    stored_error,
    symmetric_gauge,
)
from mpocli.mpo.linalg import cast, dtype_name

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ModuleReport:
    """What became of one weight matrix. `params` and `dense_params` count elements, `relative_error` is
    ‖W−Ŵ‖_F/‖W‖_F of what is stored (None in a dry run, 0 for a kept matrix), W the dense matrix, or the MPO that was
    truncated again."""

    name: str
    role: str | None
    action: Literal["mpo", "kept"]
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


class Decomposer:
    """Goes through the files once, in their order, and keeps account of what it did."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecomposeConfig,
        plans: list[WeightPlan],
        progress: Progress | None,
        needs_data: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.plans = plans
        self.progress = progress
        self.needs_data = needs_data
        self.device = device_of(config.device)
        self.done: dict[str, ModuleEntry] = {}
        self.kept_reason: dict[str, str] = {}
        self.encodings: dict[str, Encoding] = {}

    def write(self, sink: Sink) -> None:
        reader = self.checkpoint.reader
        jobs = {plan.weight.key: plan for plan in self.plans if plan.sites is not None}
        followers = {name for plan in jobs.values() for name in plan.weight.follower_keys}
        followers |= {core for plan in jobs.values() for core in _core_keys(plan.weight)}
        finished = 0
        for key in reader:
            if key == SIGNPOST or key in followers:
                continue
            if key not in jobs:
                self._pass(sink, key)
                continue
            plan = jobs[key]
            cores = self._decomposed(plan)
            finished += 1
            if self.progress:
                self.progress(finished, len(jobs), plan.weight.name)
            if cores is None:
                self._pass(sink, key)
                for name in (*_core_keys(plan.weight), *plan.weight.follower_keys):
                    if name in reader:
                        sink.add(name, self._converted(name))
                continue
            for k, core in enumerate(cores):
                sink.add(plan.weight.key_of(f"core_{k}"), core)
            # One zero under every dense name that is gone, so that nothing can load this by mistake.
            for name in (key, *plan.weight.follower_keys):
                sink.add(name, torch.zeros(1, dtype=cores[0].dtype))
        if self.done or self.checkpoint.is_mpo or self.encodings:
            add_signpost(sink, self.manifest().quantization_config())

    def _pass(self, sink: Sink, key: str) -> None:
        """A tensor that stays what it is, a sparse one packed."""
        reader, tensor = self.checkpoint.reader, self._converted(key)
        if key in reader.encoded:
            self.encodings[reader.encoded[key]] = self.checkpoint.encodings[reader.encoded[key]]
        encoding = reader.encoding(key)
        if self.needs_data:
            for part, stored in encoding.encode(key, tensor).items():
                sink.add(part, stored)
        else:
            for spec in encoding.converted(key, reader.parts(key), tensor.dtype):
                sink.add(spec.name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        wanted = self.config.dtype
        return getattr(torch, wanted) if wanted and stored.is_floating_point else stored

    def _converted(self, key: str) -> Tensor:
        """A tensor that is not decomposed. Buffers go through byte for byte: a mask may well hold infinities."""
        spec = self.checkpoint.reader.specs[key]
        is_parameter = key not in self.checkpoint.survey.other_keys
        dtype = self._dtype(spec.dtype) if is_parameter else spec.dtype
        if not self.needs_data:
            return torch.empty(spec.shape, dtype=dtype, device="meta")
        tensor = self.checkpoint.reader.read(key)
        return cast(tensor, dtype, key) if is_parameter else tensor

    def _decomposed(self, plan: WeightPlan) -> list[Tensor] | None:
        """The cores to store of one weight, None where it turns out larger than it was."""
        weight, sites = plan.weight, plan.sites
        assert sites is not None and weight.key is not None
        dtype = self._dtype(weight.dtype)
        bonds = plan.bonds or sites.capped_bond_dims(self.config.cap(weight.role))
        if not self.needs_data:
            spec = _spec(weight, sites, bonds)
            self.done[weight.name] = ModuleEntry(weight.name, weight.role, spec, dtype_name(dtype))
            return [torch.empty(shape, dtype=dtype, device="meta") for shape in spec.core_shapes().values()]
        if plan.solution is not None:
            return self._solved(plan.solution, weight, dtype)
        if weight.entry is not None:
            return self._cut_again(weight, weight.entry, plan.truncation, dtype)
        matrix = weight.oriented(self.checkpoint.reader.read(weight.key).to(self.device))
        mpo, error = decompose(matrix, sites, plan.truncation, name=weight.key)
        if self.config.keeps_larger and (reason := why_larger(mpo.num_params, weight)):
            self.kept_reason[weight.name] = reason
            return None
        if self.config.gauge == "symmetric":
            mpo = symmetric_gauge(mpo)
        center = mpo.center
        names = (weight.key_of(f"core_{k}") for k in range(sites.sites))
        # Under the same name, so that the wide cores may go.
        mpo = MPO(tuple(cast(core, dtype, name) for core, name in zip(mpo.cores, names, strict=True)), mpo.shape)
        difference, norm = stored_error(matrix, mpo)
        self.done[weight.name] = ModuleEntry(
            name=weight.name,
            role=weight.role,
            spec=_spec(weight, sites, mpo.bond_dims),
            dtype=dtype_name(dtype),
            relative_error=difference / norm if norm else 0.0,
            discarded_weight=error.discarded_weight,
            center=center,
        )
        return [core.cpu() for core in mpo.cores]

    def _cut_again(
        self, weight: Weight, entry: ModuleEntry, truncation: Truncation, dtype: torch.dtype
    ) -> list[Tensor] | None:
        """The cores of an MPO with narrower bonds; None where its bonds stay as they are.

        Training may have moved them out of any canonical form, which `compress` restores. The error refers to the
        MPO that came in, whose own error against a dense matrix may be unknown.
        """
        before = read_mpo(self.checkpoint.reader, weight)
        mpo, error = compress(before.to(device=self.device), truncation)
        if mpo.bond_dims == before.bond_dims:
            self.kept_reason[weight.name] = f"{MPO_ALREADY}, and no bond can be cut within --rel-tol"
            return None
        if self.config.gauge == "symmetric":
            mpo = symmetric_gauge(mpo)
        center = mpo.center
        names = _core_keys(weight)
        mpo = MPO(tuple(cast(core, dtype, name) for core, name in zip(mpo.cores, names, strict=True)), mpo.shape)
        difference, norm = stored_error(before.to(dtype=torch.float64, device=self.device).to_matrix(), mpo)
        self.done[weight.name] = replace(
            entry,
            role=entry.role or weight.role,
            spec=replace(entry.spec, bond_dims=mpo.bond_dims),
            dtype=dtype_name(dtype),
            relative_error=difference / norm if norm else 0.0,
            discarded_weight=error.discarded_weight,
            center=center,
            measured_against=self.checkpoint.reader.sha256,
        )
        return [core.cpu() for core in mpo.cores]

    def _solved(self, solution: Solution, weight: Weight, dtype: torch.dtype) -> list[Tensor]:
        """The planner's cores, which are in the dtype of the output already."""
        mpo = solution.mpo(weight.shape)
        self.done[weight.name] = ModuleEntry(
            name=weight.name,
            role=weight.role,
            spec=_spec(weight, mpo.site_shape, mpo.bond_dims),
            dtype=dtype_name(dtype),
            relative_error=solution.relative_error,
        )
        return list(mpo.cores)

    def entries(self) -> Iterator[ModuleEntry]:
        """Manifest entries of the output, in the model's order: those that came in, and those made here."""
        before = self.checkpoint.manifest.by_name if self.checkpoint.manifest else {}
        for plan in self.plans:
            members = plan.weight.members
            made = self.done.get(members[0].name)
            if made is not None:
                yield made
                for member in members[1:]:
                    spec = replace(made.spec, kind=member.kind, tied_to=members[0].name, scale=member.scale)
                    yield replace(made, name=member.name, spec=spec)
            else:
                for entry in (before[member.name] for member in members if member.name in before):
                    entry = replace(entry, role=entry.role or plan.weight.role)
                    if self.config.dtype and self.config.dtype != entry.dtype:
                        # Rounded anew: the measured error no longer holds.
                        entry = replace(entry, dtype=self.config.dtype, relative_error=None)
                    yield entry

    def manifest(self) -> Manifest:
        """The structure of what was written: no history, no totals."""
        return Manifest(modules=tuple(self.entries()), encodings=self.encodings, routing=self.checkpoint.routing)

    def totals(self, size: int) -> Totals:
        found = self.checkpoint.survey
        saved = sum(entry.spec.dense_params - entry.spec.params for entry in self.entries())
        return self.checkpoint.totals(found.dense_params - saved, size, self.config.dtype)

    def reports(self) -> tuple[ModuleReport, ...]:
        return tuple(self._report(plan) for plan in self.plans)

    def _report(self, plan: WeightPlan) -> ModuleReport:
        weight = plan.weight
        made = self.done.get(weight.name)
        entry = made or weight.entry
        params = entry.spec.params if entry else weight.dense_params
        reason = "" if made else self.kept_reason.get(weight.name, plan.reason)
        solution = plan.solution if made else None
        cost = forward_cost(entry.spec) if entry else None
        error = entry.relative_error if entry else 0.0
        return ModuleReport(
            name=weight.name,
            role=weight.role,
            action="mpo" if entry else "kept",
            reason=reason,
            shape=weight.shape,
            params=params,
            dense_params=weight.dense_params,
            relative_error=solution.relative_error if solution and error is None else error,
            out_dims=entry.spec.out_dims if entry else None,
            in_dims=entry.spec.in_dims if entry else None,
            bond_dims=entry.spec.bond_dims if entry else None,
            tied=tuple(member.name for member in weight.members[1:]),
            bytes=params * self._dtype(weight.dtype).itemsize,
            dense_bytes=weight.dense_params * weight.dtype.itemsize,
            form=solution.name if solution else None,
            weighted_error=solution.weighted_error if solution else None,
            path=cost[0] if cost else None,
            macs=cost[1] if cost else None,
            cut_from=weight.entry.spec.bond_dims if made and weight.entry else None,
        )


def _core_keys(weight: Weight) -> list[str]:
    """The cores of a weight that is an MPO already, as the files name them."""
    cores = weight.entry.spec.core_shapes() if weight.entry else ()
    return [weight.key_of(core) for core in cores]


def forward_cost(spec: MPOSpec, tokens: int = 256) -> tuple[str, int]:
    """The path that a forward pass of so many tokens takes, and its multiply-accumulates for each of them."""
    dims = spec.out_dims, spec.in_dims, spec.bond_dims
    path = choose_path(tokens, *dims)
    if path == "rebuild":
        return path, rebuild_macs(*dims) // tokens + math.prod(spec.out_dims) * math.prod(spec.in_dims)
    return path, chain_macs(*dims, path)


def _spec(weight: Weight, sites: SiteShape, bonds: tuple[int, ...]) -> MPOSpec:
    return MPOSpec(
        kind=weight.kind,
        shape=weight.shape,
        out_dims=sites.out_dims,
        in_dims=sites.in_dims,
        bond_dims=bonds,
        scale=weight.members[0].scale,
    )

"""What becomes of a weight that decompose is to take apart: cores, or itself where they would be no gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mpocli.config.decompose import DecomposeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.values import read_mpo
from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import dtype_wanted
from mpocli.io.module_entry import ModuleEntry
from mpocli.methods.decompose.plan import MPO_ALREADY, WeightPlan
from mpocli.methods.device import device_of
from mpocli.methods.planner.fit_store import ChosenForm
from mpocli.methods.planner.rounded import RoundedForm
from mpocli.methods.rewrite import Stored
from mpocli.methods.site_choice import spec_of, why_larger
from mpocli.mpo import MPO, SiteShape, Truncation, compress, decompose, stored_error, symmetric_gauge
from mpocli.mpo.linalg import cast, dtype_name


class Decomposer:
    """Follows the plans where the rewriting asks what is `stored` of a weight, and keeps account of what stays
    nevertheless and why (`kept`, by name).

    Without `reads` cores have shapes and no values.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: DecomposeConfig, plans: Sequence[WeightPlan], *, reads: bool = True
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.plans = {plan.weight.name: plan for plan in plans if plan.changes}
        self.reads = reads
        self.device = device_of(config.device)
        self.kept: dict[str, str] = {}

    def stored(self, weight: Weight) -> Stored | None:
        """The cores to store of one weight, None where it turns out larger than it was."""
        plan, dtype = self.plans[weight.name], dtype_wanted(weight.dtype, self.config.dtype)
        if plan.format is not None and not self.reads:
            return plan.format.outline(weight, dtype)
        if isinstance(plan.form, RoundedForm):
            return plan.form.stored(weight, dtype)
        assert plan.sites is not None
        if not self.reads:
            bonds = plan.bonds or plan.sites.capped_bond_dims(self.config.cap(weight.role))
            spec = spec_of(weight, plan.sites, bonds)
            cores = {core: torch.empty(shape, dtype=dtype, device="meta") for core, shape in spec.core_shapes().items()}
            return Stored(cores, ModuleEntry(weight.name, weight.role, spec, dtype_name(dtype)))
        if plan.form is not None:
            return _solved(plan.form, weight, dtype)
        if weight.entry is not None:
            return self._cut_again(weight, weight.entry, plan.truncation, dtype)
        return self._decomposed(weight, plan.sites, plan.truncation, dtype)

    def _decomposed(
        self, weight: Weight, sites: SiteShape, truncation: Truncation, dtype: torch.dtype
    ) -> Stored | None:
        assert weight.key is not None
        matrix = weight.oriented(self.checkpoint.reader.read(weight.key).to(self.device))
        mpo, error = decompose(matrix, sites, truncation, name=weight.key)
        if self.config.keeps_larger and (reason := why_larger(mpo.num_params, weight)):
            self.kept[weight.name] = reason
            return None
        mpo, center = self._in_dtype(mpo, weight, dtype)
        difference, norm = stored_error(matrix, mpo)
        entry = ModuleEntry(
            name=weight.name,
            role=weight.role,
            spec=spec_of(weight, sites, mpo.bond_dims),
            dtype=dtype_name(dtype),
            relative_error=difference / norm if norm else 0.0,
            discarded_weight=error.discarded_weight,
            center=center,
        )
        return _stored(mpo, entry)

    def _cut_again(
        self, weight: Weight, entry: ModuleEntry, truncation: Truncation, dtype: torch.dtype
    ) -> Stored | None:
        """The cores of an MPO with narrower bonds; None where its bonds stay as they are.

        Training may have moved them out of any canonical form, which `compress` restores. The error refers to the
        MPO that came in, whose own error against a dense matrix may be unknown.
        """
        before = read_mpo(self.checkpoint.reader, weight)
        mpo, error = compress(before.to(device=self.device), truncation)
        if mpo.bond_dims == before.bond_dims:
            self.kept[weight.name] = f"{MPO_ALREADY}, and no bond can be cut within --rel-tol"
            return None
        mpo, center = self._in_dtype(mpo, weight, dtype)
        difference, norm = stored_error(before.to(dtype=torch.float64, device=self.device).to_matrix(), mpo)
        entry = replace(
            entry,
            role=entry.role or weight.role,
            spec=replace(entry.spec, bond_dims=mpo.bond_dims),
            dtype=dtype_name(dtype),
            relative_error=difference / norm if norm else 0.0,
            discarded_weight=error.discarded_weight,
            center=center,
            measured_against=self.checkpoint.reader.sha256,
        )
        return _stored(mpo, entry)

    def _in_dtype(self, mpo: MPO, weight: Weight, dtype: torch.dtype) -> tuple[MPO, int | None]:
        """The cores as they are stored, and their canonical centre."""
        if self.config.gauge == "symmetric":
            mpo = symmetric_gauge(mpo)
        named = ((core, weight.key_of(f"core_{k}")) for k, core in enumerate(mpo.cores))
        return MPO(tuple(cast(core, dtype, name) for core, name in named), mpo.shape), mpo.center


def _solved(form: ChosenForm, weight: Weight, dtype: torch.dtype) -> Stored:
    """The planner's cores, which are in the dtype of the output already."""
    mpo = form.mpo(weight.shape)
    spec = spec_of(weight, mpo.site_shape, mpo.bond_dims)
    error = form.relative_error
    return _stored(mpo, ModuleEntry(weight.name, weight.role, spec, dtype_name(dtype), relative_error=error))


def _stored(mpo: MPO, entry: ModuleEntry) -> Stored:
    return Stored({f"core_{k}": core.cpu() for k, core in enumerate(mpo.cores)}, entry)

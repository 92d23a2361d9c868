"""Options of decompose, and what they mean for each weight matrix of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from mpocli.config.common import DEFAULT_ROLES
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.of_model import check_model
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.values import is_rounded
from mpocli.hf.weight import Weight
from mpocli.io.mpo_spec import MPOSpec
from mpocli.methods.planner.fit_store import ChosenForm
from mpocli.methods.planner.formats import Format
from mpocli.methods.planner.rounded import RoundedForm
from mpocli.methods.selection import check_glob, chosen_weights
from mpocli.methods.site_choice import sites_of, why_larger
from mpocli.mpo import SiteShape, Truncation

MPO_ALREADY = "is an MPO already"


@dataclass(frozen=True)
class WeightPlan:
    """What is to be done with one weight: decompose it to `sites`, or keep it for `reason`.

    `bonds` are decided for an MPO that is cut again; with a budget too, when `form` holds the cores. Until then
    `sites` only says that it may be decomposed.
    """

    weight: Weight
    sites: SiteShape | None
    truncation: Truncation
    reason: str = ""
    bonds: tuple[int, ...] | None = None
    form: ChosenForm | RoundedForm | None = None
    format: Format | None = None  # where bits are chosen too

    @property
    def changes(self) -> bool:
        """Whether the weight is stored otherwise than before."""
        return self.sites is not None or self.format is not None


def plan(checkpoint: Checkpoint, config: DecomposeConfig) -> list[WeightPlan]:
    """One plan for every weight matrix, selected or not, in the model's order. Reads no weights.

    Raises `InputError` where nothing is selected, a glob matches nothing or a shape does not fit.
    """
    weights = checkpoint.survey.weights
    chosen = chosen_weights(checkpoint, config, DEFAULT_ROLES)
    if not chosen:
        have = sorted({role for weight in weights for role in weight.roles})
        raise InputError("no weight matrix is selected", hint=f"this model has the roles {', '.join(have) or 'none'}")
    dense = [weight for weight in chosen if weight.entry is None]
    traits = {*(weight.role or "" for weight in chosen), *(["dense matrices"] if dense else [])}
    check_model(config, checkpoint.source.name, traits)
    if config.budget is not None and not dense:
        raise InputError(
            f"{checkpoint.source.name}: all {len(chosen)} matrices that are chosen are MPOs, which no plan takes apart",
            hint="truncate them with --trunc or --rel-tol, or run mpocli merge and plan anew",
        )
    if config.counts_bytes and all(is_rounded(checkpoint.reader, weight) for weight in dense):
        raise InputError(
            f"{checkpoint.source.name}: all {len(dense)} matrices that are chosen are in few bits already",
            hint="run mpocli merge and plan anew",
        )
    for glob, _ in config.shapes:
        if not any(fnmatchcase(member.name, glob) for weight in chosen for member in weight.members):
            check_glob(checkpoint, glob, "--shape")
            raise InputError(f"--shape {glob!r} matches only matrices that are not selected", hint="see --layers")
    plans = []
    for weight in weights:
        truncation = Truncation(config.cap(weight.role), config.rel_tol)
        if weight not in chosen:
            plans.append(WeightPlan(weight, None, truncation, "not selected"))
        elif weight.entry is not None:
            plans.append(_again(checkpoint, config, weight, weight.entry.spec))
        elif weight.obstacle:
            plans.append(WeightPlan(weight, None, truncation, weight.obstacle))
        elif config.counts_bytes and is_rounded(checkpoint.reader, weight):
            plans.append(WeightPlan(weight, None, truncation, "is in few bits already, which no plan rounds again"))
        else:
            sites = sites_of(weight, config.shapes, config.sites)
            if config.budget is not None:
                plans.append(WeightPlan(weight, sites, truncation))
                continue
            size = sites.num_params(sites.capped_bond_dims(config.cap(weight.role)))
            reason = why_larger(size, weight) if config.keeps_larger and not config.rel_tol else ""
            plans.append(WeightPlan(weight, None if reason else sites, truncation, reason))
    return plans


def _again(checkpoint: Checkpoint, config: DecomposeConfig, weight: Weight, spec: MPOSpec) -> WeightPlan:
    """What is to be done with an MPO: its bonds are cut where that is asked for, and nothing else is."""
    cap, widest = config.cap(weight.role), max(spec.bond_dims)
    reason = ""
    if config.budget is not None:
        reason = ", which no plan takes apart"
    elif spec.experts:
        reason = " of experts, whose bonds are not cut"
    elif any(checkpoint.reader.encoding(weight.key_of(core)).holds_zeros for core in spec.core_shapes()):
        reason = ", whose zeros a cut would fill"
    elif not config.rel_tol and cap is not None and cap >= widest:
        reason = f", with bonds of at most {widest}"
    if reason or not (config.rel_tol or cap is not None):
        return WeightPlan(weight, None, Truncation(), MPO_ALREADY + reason)
    caps = tuple(bond if cap is None else min(bond, cap) for bond in spec.bond_dims[1:-1])
    bonds = spec.sites.capped_bond_dims(caps)
    return WeightPlan(weight, spec.sites, Truncation(bonds[1:-1], config.rel_tol), bonds=bonds)

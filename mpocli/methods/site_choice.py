"""The site shape that a weight gets where no planner chooses one, and whether an MPO of it is worth having."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from mpocli.hf.weight import Weight
from mpocli.io.mpo_spec import MPOSpec
from mpocli.mpo import SiteShape, site_shape


def sites_of(weight: Weight, shapes: Sequence[tuple[str, SiteShape]], number: int) -> SiteShape:
    """The sites that a `--shape` names for a weight, else the usual ones; raises what `check_fits` does."""
    for glob, sites in reversed(shapes):  # the last word counts
        if any(fnmatchcase(member.name, glob) for member in weight.members):
            sites.check_fits(weight.shape, weight.name)
            return sites
    return site_shape(*weight.shape, number)


def why_larger(size: int, weight: Weight) -> str:
    """The reason to keep a weight whose MPO has `size` parameters; empty where that is no more than it has."""
    dense = weight.dense_params
    return f"an MPO would be larger ({size:,} > {dense:,} parameters)" if size > dense else ""


def spec_of(weight: Weight, sites: SiteShape, bonds: tuple[int, ...]) -> MPOSpec:
    """What the module of a weight's cores is built from."""
    return MPOSpec(
        kind=weight.kind,
        shape=weight.shape,
        out_dims=sites.out_dims,
        in_dims=sites.in_dims,
        bond_dims=bonds,
        scale=weight.members[0].scale,
    )

"""How far to cut a bond, and what the cut costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mpocli.errors import UsageError
from mpocli.mpo.shape import SiteShape


@dataclass(frozen=True)
class Truncation:
    """Limits on the bonds of one matrix; without any, a decomposition is lossless.

    `max_bond` caps every bond (one number) or each inner bond (n−1 numbers): the papers' `trunc`.
    `rel_tol` bounds the relative Frobenius error of the whole matrix, ‖W−Ŵ‖_F ≤ rel_tol · ‖W‖_F.
    """

    max_bond: int | tuple[int, ...] | None = None
    rel_tol: float | None = None

    def __post_init__(self) -> None:
        caps = (self.max_bond,) if isinstance(self.max_bond, int) else self.max_bond or ()
        if any(cap < 1 for cap in caps):
            raise UsageError(f"a bond dimension of {min(caps)}", hint="the smallest bond dimension is 1")
        if self.rel_tol is not None and not 0 <= self.rel_tol < 1:
            raise UsageError(f"a relative tolerance of {self.rel_tol}", hint="choose one in [0, 1), such as 0.05")

    @property
    def is_lossless(self) -> bool:
        return self.max_bond is None and not self.rel_tol

    def allowance(self, norm_squared: float, bonds: int) -> float | None:
        """The weight that each of `bonds` cuts may discard: an equal share of (rel_tol · ‖W‖_F)²."""
        return self.rel_tol**2 * norm_squared / bonds if self.rel_tol else None

    def caps(self, sites: SiteShape) -> tuple[int, ...]:
        """n+1 numbers: the cap on every bond, ends 1. `InputError` for a list that is not of n−1 numbers."""
        sites.capped_bond_dims(self.max_bond)
        full = sites.full_bond_dims
        if self.max_bond is None:
            return full
        inner = (self.max_bond,) * (sites.sites - 1) if isinstance(self.max_bond, int) else self.max_bond
        return (1, *map(min, full[1:-1], inner), 1)


@dataclass(frozen=True)
class TruncationError:
    """What a truncating sweep has thrown away.

    `discarded_weight[k]` = ε_k² = Σ of the dropped σ² at inner bond k, and `norm_squared` = ‖W‖_F².
    Every cut of the sweep is an orthogonal projection of what the cuts before it left, so the squared error
    is the plain sum, ‖W−Ŵ‖_F² = Σ_k ε_k² (the equality case of MPOP, ACL 2021, Eq. 4).

    >>> TruncationError((3.0, 1.0), 16.0).relative
    0.5
    """

    discarded_weight: tuple[float, ...]
    norm_squared: float

    @property
    def absolute(self) -> float:
        """‖W−Ŵ‖_F."""
        return math.sqrt(sum(self.discarded_weight))

    @property
    def relative(self) -> float:
        """‖W−Ŵ‖_F / ‖W‖_F, and 0 for the zero matrix."""
        return self.absolute / math.sqrt(self.norm_squared) if self.norm_squared else 0.0


def choose_bond(weights: Tensor, cap: int, allowance: float | None = None) -> tuple[int, float]:
    """The smallest bond whose dropped weights sum to at most `allowance`, at most `cap` and at least 1.

    `weights` are σ², largest first; without an allowance only the cap cuts. Returns the bond dimension and the
    discarded weight Σ of the rest.

    >>> import torch
    >>> choose_bond(torch.tensor([9.0, 4.0, 1.0]), cap=3, allowance=1.0)
    (2, 1.0)
    """
    kept = min(cap, weights.numel())
    if allowance is not None:
        tails = weights.flip(0).cumsum(0)  # tails[j] = Σ of the j+1 smallest
        kept = min(kept, weights.numel() - int((tails <= allowance).sum()))
    kept = max(kept, 1)
    return kept, float(weights[kept:].sum())

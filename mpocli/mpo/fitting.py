"""One matrix under one norm: what it loses at which size, and its best form of a given size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mpocli.errors import UsageError
from mpocli.mpo.allocation import Curve
from mpocli.mpo.candidates import Candidate, bonds_within, svd
from mpocli.mpo.canonical import canonicalize
from mpocli.mpo.from_matrix import decompose
from mpocli.mpo.linalg import working_dtype
from mpocli.mpo.mpo import MPO
from mpocli.mpo.sketch import sketched
from mpocli.mpo.sweep import fit
from mpocli.mpo.truncation import Truncation
from mpocli.mpo.weighted import WeightedSVD, spectrum, weighted_square

# A chain of small cores that loses this many times what the SVD of its size loses after one sweep will not overtake it:
# the first sweep takes off most of what all of them do.
_HOPELESS = 1.6
_CLEARLY = 1.4
# Of the error, that one more sweep has to take off.
_TOL = 5e-3
# Sizes around the expected one at which a shape is tried, and above which part of the matrix none is.
_AROUND = 1.7
_LARGEST = 0.6
_GRID = 24


@dataclass(frozen=True, eq=False)
class Fitted:
    """A form of a matrix: the candidate it has, its cores, and what it loses in the norm, tr(H D G Dᵀ)."""

    candidate: Candidate
    mpo: MPO
    loss: float


@dataclass(frozen=True, eq=False)
class FittingProblem:
    """W (O, I) with the Gram matrix G (I, I) of its inputs and the weights H (O, O) of its outputs; None: identity."""

    matrix: Tensor
    gram: Tensor | None = None
    output: Tensor | None = None
    _trials: dict[tuple[Candidate, tuple[int, ...]], Fitted] = field(default_factory=dict)

    @cached_property
    def wide(self) -> Tensor:
        return self.matrix.to(working_dtype(self.matrix.device))

    @cached_property
    def svd(self) -> WeightedSVD:
        return WeightedSVD.of(self.matrix, self.gram, self.output)

    @property
    def dense(self) -> int:
        return self.matrix.numel()

    def loss_of(self, mpo: MPO) -> float:
        """tr(H D G Dᵀ), measured."""
        return weighted_square(self.wide - mpo.to_matrix().to(self.wide), self.gram, self.output)

    def svd_curve(self) -> Curve:
        """Every rank, and the matrix itself."""
        step = sum(self.matrix.shape)
        weights = self.svd.weights if "svd" in vars(self) else spectrum(self.matrix, self.gram, self.output)
        left = (weights.sum() - torch.cumsum(weights, 0)).clamp_min(0).tolist()
        options = [(rank * step, loss) for rank, loss in enumerate(left, 1) if rank * step < self.dense]
        return Curve.of([*options, (self.dense, 0.0)])

    def svd_within(self, params: int) -> Fitted | None:
        """The truncated SVD of at most so many parameters, None where rank 1 has more."""
        rank = params // sum(self.matrix.shape)
        if rank < 1:
            return None
        # Roots of G and H in one core and their inverses in the other would be of very different sizes.
        mpo = canonicalize(self.svd.mpo(rank))
        return Fitted(svd(*self.matrix.shape), mpo, self.svd.lost(mpo.bond_dims[1]))

    def fitted(self, candidate: Candidate, bonds: Sequence[int], sweeps: int, *, target: float = math.inf) -> Fitted:
        """A candidate with given bonds (n+1 numbers): truncated, then swept over in the norm.

        Where it will hardly lose less than `target`, fewer sweeps are made, or none.
        """
        start, _ = decompose(self.matrix, candidate.sites, Truncation(tuple(bonds[1:-1])))
        if sweeps == 0:
            return Fitted(candidate, start, self.loss_of(start))
        made = self._swept(candidate, start, sweeps, target)
        return made if target == math.inf else replace(made, loss=self.loss_of(made.mpo))

    def _swept(self, candidate: Candidate, start: MPO, sweeps: int, target: float) -> Fitted:
        done = fit(self.matrix, start, self.gram, self.output, sweeps=sweeps, tol=_TOL, target=target)
        return Fitted(candidate, done.mpo, done.errors[-1])

    def fitted_within(
        self, candidate: Candidate, params: int, sweeps: int, *, target: float = math.inf
    ) -> Fitted | None:
        """A candidate of at most so many parameters, None where none is that small."""
        bonds = self._bonds(candidate, params)
        return None if bonds is None else self.fitted(candidate, bonds, sweeps, target=target)

    def _bonds(self, candidate: Candidate, params: int) -> tuple[int, ...] | None:
        try:
            return bonds_within(candidate.sites, params)
        except UsageError:
            return None

    def _tried(self, candidate: Candidate, params: int, target: float = math.inf) -> Fitted | None:
        """As `fitted_within`, one sweep from a start that is quickly made."""
        bonds = self._bonds(candidate, params)
        if bonds is None:
            return None
        key = candidate, bonds  # later targets only fall, and what is chosen has reached its own
        if key not in self._trials:
            if candidate.sites.sites == 2:
                start = sketched(self.matrix, candidate.sites, bonds[1])
            else:
                start, _ = decompose(self.matrix, candidate.sites, Truncation(tuple(bonds[1:-1])))
            self._trials[key] = self._swept(candidate, start, 1, target)
        return self._trials[key]

    def most_promising(
        self, candidates: Sequence[Candidate], params: int, *, svd_loss: float | None = None
    ) -> Candidate | None:
        """The chain of cores that loses least at this size after one sweep, None where the SVD loses far less.

        `svd_loss` is what the SVD of this size loses, where that is known. Longer chains are tried only as long as they
        gain on shorter ones, and where those are not hopeless.
        """
        if not candidates or params > _LARGEST * self.dense:
            return None
        if svd_loss is None:
            plain = self.svd_within(params)
            svd_loss = plain.loss if plain else math.inf
        limit = _HOPELESS * svd_loss
        best: tuple[float, Candidate] | None = None
        chain: float | None = None  # what the longest chain so far loses
        for candidate in candidates:
            if chain is not None and candidate.sites.sites > 3 and best is not None and chain > best[0]:
                break
            found = self._tried(candidate, params, min(limit, best[0] if best else math.inf))
            if found is None:
                continue
            if candidate.sites.sites > 2:
                chain = found.loss
            if best is None or found.loss < best[0]:
                best = found.loss, candidate
            if best[0] > (limit if candidate.sites.sites > 2 else _CLEARLY * limit):
                break  # neither another pair of cores nor a longer chain, which takes far longer, will be
        return best[1] if best and best[0] <= limit else None

    def curve_around(self, candidate: Candidate, params: int) -> list[tuple[int, float]]:
        """(parameters, loss) of a candidate on a grid around a size, by log-log interpolation of three fits."""
        sizes = [int(params * factor) for factor in (1 / _AROUND, 1.0, _AROUND)]
        found = {}
        for size in sizes:
            made = self._tried(candidate, min(size, int(_LARGEST * self.dense)))
            if made is not None and made.loss > 0.0:
                found[made.mpo.num_params] = made.loss
        return interpolated(sorted(found.items()))


def interpolated(points: Sequence[tuple[int, float]], grid: int = _GRID) -> list[tuple[int, float]]:
    """A curve through (parameters, loss > 0), straight between the points on log-log axes.

    >>> [(size, round(loss, 6)) for size, loss in interpolated([(10, 4.0), (40, 1.0)], grid=2)]
    [(10, 4.0), (20, 2.0), (40, 1.0)]
    """
    curve = list(points[:1])
    for (a, high), (b, low) in pairwise(points):
        slope = math.log(low / high) / math.log(b / a)
        for k in range(1, grid + 1):
            size = round(a * (b / a) ** (k / grid))
            if size > curve[-1][0]:
                curve.append((size, high * (size / a) ** slope if k < grid else low))
    return curve

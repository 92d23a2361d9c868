"""What is known of one weight while a plan is made: what it loses at which size, its size, and its form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpocli.hf.weight import Weight
from mpocli.methods.planner.fit_store import ChosenForm, FitStore
from mpocli.mpo import SiteShape
from mpocli.mpo.allocation import Curve
from mpocli.mpo.candidates import Candidate, bonds_within, svd
from mpocli.mpo.fitting import Fitted, interpolated

# Sizes, as parts of a matrix, at which the papers' shapes are tried.
_PAPER_SIZES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.55, 0.8)
# A fit is made where its curve says that it loses at most this many times what the SVD does: full sweeps gain on it.
_WORTH_A_FIT = 1.2


@dataclass
class PlannedWeight:
    """One weight: `params` is what it is to have, `reason` why it stays dense, `form` the form that was made."""

    weight: Weight
    fits: FitStore
    chain: Candidate | None = None  # cores that may beat the SVD here, and what they lose around the expected size
    around: list[tuple[int, float]] = field(default_factory=list)
    curve: Curve | None = None
    params: int = 0
    reason: str = ""
    form: ChosenForm | None = None

    @property
    def stays_dense(self) -> bool:
        return self.params >= self.weight.dense_params

    @property
    def itemsize(self) -> int:
        """Bytes of a stored parameter."""
        return self.fits.stored_dtype(self.weight).itemsize

    def draw(self) -> None:
        """The curve of the SVD, or of the papers' shape."""
        norm, problem = self.fits.problem(self.weight)
        if norm.unmeasured:
            self.reason = norm.unmeasured
            return
        scale = self.fits.scale(self.weight, norm, problem)
        if self.fits.budget.shapes != "paper":
            curve = problem.svd_curve()
            self.curve = Curve(curve.sizes, tuple(scale * loss for loss in curve.losses))
            return
        (self.chain,) = self.fits.chains(self.weight)
        fits = [
            problem.fitted_within(self.chain, int(size * problem.dense), min(self.fits.budget.sweeps, 1))
            for size in _PAPER_SIZES
        ]
        points = [(fit.mpo.num_params, scale * fit.loss) for fit in fits if fit is not None and fit.loss > 0.0]
        drawn = interpolated(Curve.of(points).options)
        self.curve = Curve.of([*drawn, (problem.dense, 0.0)])

    def try_shapes(self) -> None:
        """Adds what the most promising chain of cores loses around the size that the SVD would be given."""
        chains = self.fits.chains(self.weight)
        if self.curve is None or self.stays_dense or not chains:
            return
        norm, problem = self.fits.problem(self.weight)
        scale = self.fits.scale(self.weight, norm, problem)
        plain = self.curve.loss_within(self.params) / scale if scale else None
        self.chain = problem.most_promising(chains, self.params, svd_loss=plain)
        if self.chain is None:
            return
        self.around = [(size, scale * loss) for size, loss in problem.curve_around(self.chain, self.params)]
        self.curve = Curve.of([*self.curve.options, *self.around])

    def solve(self, why_whole: str = "") -> None:
        """Make the best form of at most `params` parameters; `why_whole` is the reason to stay dense for its size."""
        if self.stays_dense:
            self.reason = why_whole
            return
        norm, problem = self.fits.problem(self.weight)
        if norm.unmeasured:
            self.reason = norm.unmeasured
            return
        budget = self.fits.budget
        found: list[Fitted | None] = []
        if budget.shapes != "paper":
            found.append(problem.svd_within(self.params))
        if budget.allocation == "uniform" and budget.shapes != "svd":
            chains = self.fits.chains(self.weight)
            self.chain = chains[0] if budget.shapes == "paper" else problem.most_promising(chains, self.params)
        plain = found[0].loss if found and found[0] is not None else math.inf
        if self.chain is not None and self._is_worth_a_fit(plain, self.fits.scale(self.weight, norm, problem)):
            found.append(problem.fitted_within(self.chain, self.params, budget.sweeps, target=plain))
        made = min((one for one in found if one is not None), key=lambda one: one.loss, default=None)
        if made is None or made.mpo.num_params >= problem.dense:
            self.reason = f"no form of {self.params:,} parameters"
            return
        self.form = self.fits.keep(self.weight, made, norm, problem)

    def _is_worth_a_fit(self, plain: float, scale: float) -> bool:
        """Whether the chain, by its curve, can lose less than the SVD does."""
        if not self.around or plain == math.inf:
            return True
        expected = min((loss for size, loss in self.around if size <= self.params), default=self.around[0][1])
        return expected <= _WORTH_A_FIT * plain * scale

    def site_shapes(self) -> Sequence[SiteShape]:
        """The site shapes that the weight may get, as far as is known."""
        chain = [self.chain.sites] if self.chain else []
        return chain if self.fits.budget.shapes == "paper" else [svd(*self.weight.shape).sites, *chain]

    def expected_shape(self) -> tuple[SiteShape, tuple[int, ...]]:
        """The larger one of the forms of at most `params` parameters: which of them it will be is not known yet."""
        able = [sites for sites in self.site_shapes() if least(sites) <= self.params]
        shapes = [(sites, bonds_within(sites, self.params)) for sites in able]
        return max(shapes, key=lambda shape: shape[0].num_params(shape[1]))

    def smallest_shape(self) -> tuple[SiteShape, tuple[int, ...]]:
        sites = (self.chain or svd(*self.weight.shape)).sites
        return sites, sites.capped_bond_dims(1)

    def least(self) -> int:
        """Parameters of the smallest form that the budget allows."""
        shapes = [chain.sites for chain in self.fits.chains(self.weight)]
        shapes += [svd(*self.weight.shape).sites] if self.fits.budget.shapes != "paper" else []
        return min(least(sites) for sites in shapes)


def least(sites: SiteShape) -> int:
    """Parameters with bonds of 1."""
    return sites.num_params(sites.capped_bond_dims(1))

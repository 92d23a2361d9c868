"""The smallest form of a weight whose error stays within a limit."""

from __future__ import annotations

from mpocli.hf.weight import Weight
from mpocli.methods.planner.fit_store import ChosenForm, FitStore
from mpocli.mpo.candidates import Candidate
from mpocli.mpo.fitting import Fitted, FittingProblem
from mpocli.mpo.weighted import weighted_square

# Sizes that are tried for a shape, and the part of a matrix below which the next one is not worth a fit.
_TRIALS, _CLOSE = 6, 0.02
_ROUNDINGS, _LESS = 5, 0.95
# What is tried first where no truncated SVD says how large it has to be.
_FIRST = 0.6


def smallest_within(fits: FitStore, weight: Weight, limit: float) -> ChosenForm | str:
    """The smallest form with a relative error of at most `limit` in the norm of the inputs, or why there is none."""
    norm, problem = fits.problem(weight, by_inputs=True)
    allowed = limit**2 * weighted_square(problem.wide, problem.gram)
    for _ in range(_ROUNDINGS):
        best = _smallest(fits, weight, problem, allowed)
        if best is None or best.mpo.num_params >= problem.dense:
            break
        made = fits.keep(weight, best, norm, problem)
        error = made.relative_error if made.weighted_error is None else made.weighted_error
        if error <= limit:
            return made
        # Rounding to the stored dtype has added to it.
        allowed *= _LESS * (limit / error) ** 2
    return "no smaller form has so small an error"


def _smallest(fits: FitStore, weight: Weight, problem: FittingProblem, allowed: float) -> Fitted | None:
    best: Fitted | None = None
    if fits.budget.shapes != "paper":
        params = next(size for size, loss in problem.svd_curve().options if loss <= allowed)
        best = problem.svd_within(params) if params < problem.dense else None
    chains = fits.chains(weight)
    if fits.budget.shapes == "auto":
        found = problem.most_promising(chains, best.mpo.num_params if best else int(_FIRST * problem.dense))
        chains = [found] if found else []
    for chain in chains:
        best = _narrowed(problem, chain, allowed, fits.budget.sweeps, best)
    return best


def _narrowed(
    problem: FittingProblem, chain: Candidate, allowed: float, sweeps: int, best: Fitted | None
) -> Fitted | None:
    """Bisects the size of a chain below that of the best form so far."""
    low, high = 0, (best.mpo.num_params if best else problem.dense) - 1
    for _ in range(_TRIALS):
        size = (low + high) // 2 if low else int(0.8 * high)
        found = problem.fitted_within(chain, size, sweeps, target=allowed) if size > 0 else None
        if found is not None and found.loss <= allowed:
            best, high = found, found.mpo.num_params - 1
        else:
            low = max(size, 1)
        if low and high - low <= _CLOSE * problem.dense:
            break
    return best

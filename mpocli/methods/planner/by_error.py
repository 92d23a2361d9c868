"""The smallest form of a weight whose error stays within a limit."""

from __future__ import annotations

from mpocli.hf.targets import Weight
from mpocli.methods.planner.fit_store import Solution, Workshop
from mpocli.mpo.candidates import Candidate
from mpocli.mpo.fitting import Fitted, Subject
from mpocli.mpo.weighted import weighted_square

# Sizes that are tried for a shape, and the part of a matrix below which the next one is not worth a fit.
_TRIALS, _CLOSE = 6, 0.02
_ROUNDINGS, _LESS = 5, 0.95
# What is tried first where no truncated SVD says how large it has to be.
_FIRST = 0.6


def smallest_within(shop: Workshop, weight: Weight, limit: float) -> Solution | str:
    """The smallest form with a relative error of at most `limit` in the norm of the inputs, or why there is none."""
    norm, subject = shop.subject(weight, by_inputs=True)
    allowed = limit**2 * weighted_square(subject.wide, subject.gram)
    for _ in range(_ROUNDINGS):
        best = _smallest(shop, weight, subject, allowed)
        if best is None or best.mpo.num_params >= subject.dense:
            break
        made = shop.keep(weight, best, norm, subject)
        error = made.relative_error if made.weighted_error is None else made.weighted_error
        if error <= limit:
            return made
        # Rounding to the stored dtype has added to it.
        allowed *= _LESS * (limit / error) ** 2
    return "no smaller form has so small an error"


def _smallest(shop: Workshop, weight: Weight, subject: Subject, allowed: float) -> Fitted | None:
    best: Fitted | None = None
    if shop.budget.shapes != "paper":
        params = next(size for size, loss in subject.svd_curve().options if loss <= allowed)
        best = subject.svd_within(params) if params < subject.dense else None
    chains = shop.chains(weight)
    if shop.budget.shapes == "auto":
        found = subject.most_promising(chains, best.mpo.num_params if best else int(_FIRST * subject.dense))
        chains = [found] if found else []
    for chain in chains:
        best = _narrowed(subject, chain, allowed, shop.budget.sweeps, best)
    return best


def _narrowed(subject: Subject, chain: Candidate, allowed: float, sweeps: int, best: Fitted | None) -> Fitted | None:
    """Bisects the size of a chain below that of the best form so far."""
    low, high = 0, (best.mpo.num_params if best else subject.dense) - 1
    for _ in range(_TRIALS):
        size = (low + high) // 2 if low else int(0.8 * high)
        found = subject.fitted_within(chain, size, sweeps, target=allowed) if size > 0 else None
        if found is not None and found.loss <= allowed:
            best, high = found, found.mpo.num_params - 1
        else:
            low = max(size, 1)
        if low and high - low <= _CLOSE * subject.dense:
            break
    return best

"""Which bond to shrink next: all that could be, by how much, and what each would cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mpocli.config.squeeze import Order, Step
from mpocli.mpo import bond_spectra, entropy_nats, inner_bonds_of_centre
from mpocli.nn import MPOModule


@dataclass(frozen=True)
class Bond:
    """One inner bond of one module, next to its central core."""

    module: str
    bond: int


@dataclass(frozen=True)
class Candidate:
    """Bonds to cut together, each to its width in `to`, the parameters that this saves, and `bound`: what it may add
    to ‖W−Ŵ‖_F, over all of them."""

    to: dict[Bond, int]
    saved: int
    bound: float


class Widths:
    """The bond dimensions of all modules, as they are or as they are planned to be."""

    def __init__(self, modules: Mapping[str, MPOModule]) -> None:
        self.modules = modules
        self.bonds = {name: list(module.bond_dims) for name, module in modules.items()}

    def __getitem__(self, bond: Bond) -> int:
        return self.bonds[bond.module][bond.bond]

    def cut(self, to: Mapping[Bond, int]) -> None:
        for bond, width in to.items():
            self.bonds[bond.module][bond.bond] = width

    def saved(self, to: Mapping[Bond, int]) -> int:
        """Parameters that cutting to these widths saves."""
        saved = 0
        for name in {bond.module for bond in to}:
            sites, bonds = self.modules[name].sites, self.bonds[name]
            after = list(bonds)
            for bond, width in to.items():
                if bond.module == name:
                    after[bond.bond] = width
            saved += sites.num_params(bonds) - sites.num_params(after)
        return saved


def groups(modules: Mapping[str, MPOModule], roles: Mapping[str, str | None], tie: str) -> list[list[Bond]]:
    """The bonds next to every centre; with tie `kind` those of one role on one side of the centre together."""
    found: dict[object, list[Bond]] = {}
    for name, module in modules.items():
        for bond in inner_bonds_of_centre(module.central, module.sites.sites):
            key: object = (name, bond) if tie == "matrix" else (roles.get(name), bond > module.central)
            found.setdefault(key, []).append(Bond(name, bond))
    return list(found.values())


class Spectra:
    """Singular values of every bond, of canonical copies. Read once a round: training has moved the cores."""

    def __init__(self, modules: Mapping[str, MPOModule]) -> None:
        self.values = {name: bond_spectra(module.to_mpo()) for name, module in modules.items()}

    def of(self, bond: Bond) -> Tensor:
        return self.values[bond.module][bond.bond - 1]

    def added(self, bond: Bond, before: int, after: int) -> float:
        """ε² that cutting from one width to a smaller one adds: Σ σ_j² over after < j ≤ before."""
        return float(self.of(bond)[after:before].square().sum())


def accumulated(to: Mapping[Bond, int], widths: Widths, start: Spectra) -> float:
    """sqrt(Σ_k ε_k²) over all bonds of the matrices that a cut touches, with the cut made: the bound on ‖W−Ŵ‖_F since
    `start`, whose spectra are not those of cores that were trained meanwhile (MPOP, ACL 2021, Alg. 2)."""
    total = 0.0
    for name in {bond.module for bond in to}:
        for bond, spectrum in enumerate(start.values[name], 1):
            width = to.get(Bond(name, bond), widths.bonds[name][bond])
            total += float(spectrum[width:].square().sum())
    return math.sqrt(total)


def candidates(
    tied: Sequence[Sequence[Bond]], widths: Widths, spectra: Spectra, step: Step, *, save: int | None = None
) -> list[Candidate]:
    """One step down from each group's widest bond; the others of the group are cut where they are wider than that.

    A step that would save more than `save` parameters is shortened to the least that saves as many.
    """
    found = []
    for group in tied:
        widest = max(widths[bond] for bond in group)
        cap = step.below(widest)
        if cap == widest:
            continue
        if save is not None and widths.saved(_capped(group, widths, cap)) > save:
            cap = next(c for c in range(widest - 1, cap - 1, -1) if widths.saved(_capped(group, widths, c)) >= save)
        to = _capped(group, widths, cap)
        bound = math.sqrt(sum(spectra.added(bond, widths[bond], width) for bond, width in to.items()))
        found.append(Candidate(to, widths.saved(to), bound))
    return found


def _capped(group: Sequence[Bond], widths: Widths, cap: int) -> dict[Bond, int]:
    return {bond: cap for bond in group if widths[bond] > cap}


def best(
    found: Sequence[Candidate],
    order: Order,
    spectra: Spectra,
    widths: Widths,
    *,
    per_param: bool,
    start: Spectra | None = None,
    loss_after: Callable[[Mapping[Bond, int]], float] | None = None,
) -> Candidate:
    """The candidate with the least score, the first of equals.

    `error`: the bound on what the cut adds. `cumulative`: the bound on all that a matrix has lost since `start`, the
    spectra before the first cut (MPOP, ACL 2021, Alg. 2: the matrix that stays nearest to what it was). `entropy`:
    e^S / χ, the share of its width that a bond uses, the mean over tied ones. `sensitivity`: the loss on a sample with
    the cut made. `per_param` divides what is lost by the parameters saved.
    """
    if order == "error":
        scores = [candidate.bound for candidate in found]
    elif order == "cumulative":
        scores = [accumulated(candidate.to, widths, start or spectra) for candidate in found]
    elif order == "entropy":
        scores = [_occupancy(candidate, spectra, widths) for candidate in found]
    else:
        assert loss_after is not None
        untouched = loss_after({})
        scores = [loss_after(candidate.to) - untouched for candidate in found]
    if per_param:  # of a loss that falls, more for more
        pairs = zip(scores, found, strict=True)
        scores = [score / one.saved if score > 0 else score * one.saved for score, one in pairs]
    return found[min(range(len(found)), key=scores.__getitem__)]


def _occupancy(candidate: Candidate, spectra: Spectra, widths: Widths) -> float:
    shares = [math.exp(entropy_nats(spectra.of(bond)[: widths[bond]])) / widths[bond] for bond in candidate.to]
    return sum(shares) / len(shares)


def at_once(
    tied: Sequence[Sequence[Bond]],
    widths: Widths,
    spectra: Spectra,
    step: Step,
    order: Order,
    *,
    per_param: bool,
    save: int,
) -> dict[Bond, int]:
    """The widths that the same choices reach without training in between, from the spectra as they are.

    `{}` where nothing needs saving. What cannot be saved is left: all bonds are 1 then.
    """
    plan: dict[Bond, int] = {}
    left = save
    while left > 0:
        found = candidates(tied, widths, spectra, step, save=left)
        if not found:
            break
        chosen = best(found, order, spectra, widths, per_param=per_param)
        plan |= chosen.to
        widths.cut(chosen.to)
        left -= chosen.saved
    return plan

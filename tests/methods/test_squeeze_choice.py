"""Which bond a squeeze cuts next: the rules, on spectra that were written down by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mpocli.config.squeeze import Step
from mpocli.methods.squeeze.choice import Bond, Spectra, Widths, accumulated, best, candidates
from mpocli.mpo import SiteShape
from mpocli.nn import MPOLinear

SITES = SiteShape((2, 2, 2), (2, 2, 2))


def spectra(**values: list[list[float]]) -> Spectra:
    made = object.__new__(Spectra)
    made.values = {name: [torch.tensor(bond) for bond in bonds] for name, bonds in values.items()}
    return made


def widths(**bonds: tuple[int, ...]) -> Widths:
    return Widths({name: MPOLinear((8, 8), SITES, dims) for name, dims in bonds.items()})


# `worn` has lost a 3 and a 2 at its first bond, and would lose a 1 next; `whole` is as it came, and would lose a 2.
START = spectra(worn=[[9.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]], whole=[[9.0, 8.0, 7.0, 2.0], [9.0, 8.0, 7.0, 6.0]])
NOW = spectra(worn=[[9.0, 1.0], [8.0, 7.0, 6.0, 5.0]], whole=[[9.0, 8.0, 7.0, 2.0], [9.0, 8.0, 7.0, 6.0]])
TIED = [[Bond("worn", 1)], [Bond("whole", 1)]]


@pytest.mark.parametrize(("order", "module"), [("error", "worn"), ("cumulative", "whole")])
def test_error_asks_what_a_cut_adds_and_cumulative_what_a_matrix_has_lost_in_all(order: str, module: str) -> None:
    now = widths(worn=(1, 2, 4, 1), whole=(1, 4, 4, 1))
    found = candidates(TIED, now, NOW, Step(dims=1))
    assert [candidate.bound for candidate in found] == [1.0, 2.0]
    assert best(found, order, NOW, now, per_param=False, start=START).to == {Bond(module, 1): now[Bond(module, 1)] - 1}  # type: ignore[arg-type]


def test_cumulative_goes_by_the_spectra_of_the_start_whatever_training_made_of_them() -> None:
    now = widths(worn=(1, 2, 4, 1), whole=(1, 4, 4, 1))
    trained = spectra(worn=[[9.0, 0.0], [8.0, 7.0, 6.0, 5.0]], whole=[[9.0, 8.0, 7.0, 100.0], [9.0, 8.0, 7.0, 6.0]])
    found = candidates(TIED, now, trained, Step(dims=1))
    assert best(found, "cumulative", trained, now, per_param=False, start=START).to == {Bond("whole", 1): 3}


def test_what_is_lost_counts_every_bond_of_every_matrix_that_is_cut() -> None:
    """sqrt(Σ_k ε_k²), ε_k² the squares behind each bond's width, term by term."""
    now = widths(worn=(1, 2, 4, 1), whole=(1, 4, 4, 1))
    to = {Bond("worn", 2): 2, Bond("whole", 1): 3}
    after = {("worn", 1): 2, ("worn", 2): 2, ("whole", 1): 3, ("whole", 2): 4}
    total = 0.0
    for (name, bond), width in after.items():
        for place, value in enumerate(START.values[name][bond - 1].tolist()):
            if place >= width:
                total += value**2
    assert accumulated(to, now, START) == pytest.approx(math.sqrt(total), rel=1e-6)
    assert total == 3**2 + 2**2 + 6**2 + 5**2 + 2**2

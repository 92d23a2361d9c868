"""The shared budget against every possible choice, and shapes and bonds that fill a size."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpocli.errors import UsageError
from mpocli.mpo import MPO, SiteShape, site_shape
from mpocli.mpo.allocation import Curve, allocate
from mpocli.mpo.candidates import Candidate, all_of, bonds_within, papers, unbalanced
from mpocli.mpo.fitting import FittingProblem, interpolated
from mpocli.mpo.gram import regularised

POINTS = st.lists(st.tuples(st.integers(1, 12), st.floats(0, 100)), min_size=1, max_size=5)


def total(curves: list[Curve], chosen: list[int]) -> tuple[int, float]:
    return (
        sum(curve.sizes[option] for curve, option in zip(curves, chosen, strict=True)),
        sum(curve.losses[option] for curve, option in zip(curves, chosen, strict=True)),
    )


def best(curves: list[Curve], budget: int) -> float:
    """Of all choices within the budget."""
    choices = product(*(range(len(curve.sizes)) for curve in curves))
    return min(loss for size, loss in (total(curves, list(choice)) for choice in choices) if size <= budget)


@settings(max_examples=200, deadline=None)
@given(st.lists(POINTS, min_size=1, max_size=3), st.integers(0, 30))
def test_never_over_the_budget_and_optimal_where_it_is_spent_on_the_hull(lists, extra) -> None:
    curves = [Curve.of(points) for points in lists]
    budget = sum(curve.sizes[0] for curve in curves) + extra
    chosen = allocate(curves, budget, "parameters")
    size, loss = total(curves, chosen)
    assert size <= budget
    # Lagrange: what was found is optimal for its own size if every option is a corner of its hull.
    corners = all(option in curve.hull() for curve, option in zip(curves, chosen, strict=True))
    slopes = [[curve.gain(a, b) for a, b in zip(curve.hull(), curve.hull()[1:], strict=False)] for curve in curves]
    taken = (
        [gains[: curve.hull().index(option)] for curve, gains, option in zip(curves, slopes, chosen, strict=True)]
        if corners
        else []
    )
    left = [gains[len(used) :] for gains, used in zip(slopes, taken, strict=True)] if corners else []
    lowest, highest = (
        min((g for gains in taken for g in gains), default=0),
        max((g for gains in left for g in gains), default=0),
    )
    if corners and lowest >= highest:
        assert loss == pytest.approx(best(curves, size), abs=1e-9)
    # Nothing that would still fit is left lying.
    for curve, option in zip(curves, chosen, strict=True):
        assert option + 1 == len(curve.sizes) or curve.sizes[option + 1] - curve.sizes[option] > budget - size


def test_convex_curves_of_unit_steps_are_shared_optimally() -> None:
    generator = torch.Generator().manual_seed(0)
    curves = []
    for _ in range(3):
        gains = torch.rand(6, generator=generator).sort(descending=True).values.cumsum(0)
        curves.append(Curve.of([(k, float(gains[-1] - gains[k])) for k in range(6)]))
    for budget in range(3, 16):
        assert total(curves, allocate(curves, budget, "bytes"))[1] == pytest.approx(best(curves, budget))


def test_a_budget_below_the_smallest_forms_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"budget of 5 bytes: .* takes 7"):
        allocate([Curve((3, 9), (2.0, 0.0)), Curve((4,), (1.0,))], 5, "bytes")


def test_dominated_options_are_dropped() -> None:
    assert Curve.of([(4, 2.0), (2, 3.0), (3, 3.0), (2, 5.0), (6, 2.0)]).options == [(2, 3.0), (4, 2.0)]


@pytest.mark.parametrize("size", [(768, 768), (768, 3072), (384, 1536), (30522, 384), (13, 17), (1, 8)])
def test_candidates_fit_and_come_once(size: tuple[int, int]) -> None:
    found = all_of(*size)
    assert len({candidate.sites for candidate in found}) == len(found)
    for candidate in found:
        candidate.sites.check_fits(size)
    assert found[0].name == "svd"
    assert papers(768, 3072).sites == site_shape(768, 3072, 5)


def test_unbalanced_stands_between_the_svd_and_the_balanced_shape() -> None:
    between, balanced = unbalanced(768, 3072), site_shape(768, 3072, 2)
    assert between is not None
    assert balanced.out_dims[0] < between.sites.out_dims[0] < 768
    assert unbalanced(13, 16) is None


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([SiteShape((8, 1), (1, 8)), site_shape(24, 30, 2), site_shape(24, 30, 3), site_shape(64, 64, 5)]),
    st.integers(60, 4000),
)
def test_bonds_fill_a_size_and_never_pass_it(sites: SiteShape, params: int) -> None:
    bonds = bonds_within(sites, params)
    assert sites.num_params(bonds) <= params
    for k in range(1, sites.sites):
        wider = sites.capped_bond_dims([*bonds[1:k], bonds[k] + 1, *bonds[k + 1 : -1]])
        assert wider == bonds or sites.num_params(wider) > params


def test_a_size_below_bonds_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least"):
        bonds_within(SiteShape((8, 1), (1, 8)), 15)


def test_the_curve_of_the_svd_is_what_its_forms_lose() -> None:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(9, 7, dtype=torch.float64, generator=generator)
    inputs = torch.randn(40, 7, dtype=torch.float64, generator=generator)
    subject = FittingProblem(w, inputs.T @ inputs)
    for params, loss in subject.svd_curve().options[:-1]:
        found = subject.svd_within(params)
        assert found is not None and found.mpo.num_params == params
        assert loss == pytest.approx(subject.loss_of(found.mpo), rel=1e-9)
    assert subject.svd_curve().options[-1] == (63, 0.0)


def test_kronecker_structure_is_found_and_noise_is_left_to_the_svd() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    noise = torch.randn(64, 64, dtype=torch.float64, generator=generator)
    chains = [candidate for candidate in all_of(64, 64) if candidate.name != "svd"]
    product_ = FittingProblem(torch.kron(a, b) + 0.01 * noise)
    found = product_.most_promising(chains, 600)
    assert found is not None and found.name == "balanced"
    low_rank = FittingProblem(torch.outer(noise[0], noise[1]) + 0.01 * noise)
    assert low_rank.most_promising(chains, 600) is None


def structured(outlier: float, least: float) -> FittingProblem:
    """Two sites and noise, under inputs of which one direction is far larger than all others."""
    generator = torch.Generator().manual_seed(1)
    first, second, noise, direction = (
        torch.randn(*size, dtype=torch.float64, generator=generator)
        for size in ((1, 8, 8, 3), (3, 8, 8, 1), (64, 64), (64,))
    )
    exact = MPO((first, second), (64, 64)).to_matrix()
    inputs = torch.eye(64, dtype=torch.float64) + outlier**2 * torch.outer(direction, direction)
    gram = regularised(inputs * 30_000, 30_000, least=least)
    return FittingProblem(exact / exact.std() + 0.3 * noise, gram, regularised(noise @ noise.T, 64, least=0.3))


@pytest.mark.parametrize("outlier", [0.0, 30.0, 100.0])
def test_an_outlier_among_the_inputs_hides_no_structure(outlier: float) -> None:
    """Truncation starts hundreds of times above the best error there, and the first core makes up for it."""
    subject = replace(structured(outlier, 1e-6), output=None)
    chains = [candidate for candidate in all_of(64, 64) if candidate.name != "svd"]
    found = subject.most_promising(chains, 1500)
    plain = subject.svd_within(1500)
    assert found is not None and plain is not None
    made = subject.fitted_within(found, 1500, 10, target=plain.loss)
    assert made is not None and made.loss < plain.loss


@pytest.mark.parametrize("both", [False, True])
def test_the_loss_of_a_fit_with_a_target_is_that_of_its_cores(both: bool) -> None:
    subject = structured(30.0, 0.3 if both else 1e-6)
    subject = subject if both else replace(subject, output=None)
    plain = subject.svd_within(1500)
    assert plain is not None
    made = subject.fitted_within(Candidate("balanced", SiteShape((8, 8), (8, 8))), 1500, 4, target=plain.loss)
    assert made is not None and made.loss == pytest.approx(subject.loss_of(made.mpo), rel=1e-10)


def test_interpolation_passes_through_its_points_and_falls() -> None:
    curve = interpolated([(10, 8.0), (20, 4.0), (80, 3.0)])
    assert {(10, 8.0), (20, 4.0), (80, 3.0)} <= set(curve)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(curve))

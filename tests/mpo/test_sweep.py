"""Weighted alternating least squares: it never loses, it ends where theory says, and it beats truncation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpocli.mpo import MPO, SiteShape, Truncation, decompose, site_shape
from mpocli.mpo.gram import regularised
from mpocli.mpo.sweep import fit
from mpocli.mpo.weighted import WeightedSVD, svd_shape, weighted_square


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def skewed_gram(size: int, seed: int, rank: int | None = None) -> Tensor:
    inputs = normal(rank or 3 * size, size, seed=seed) * torch.logspace(1, -2, size, dtype=torch.float64)
    return inputs.T @ inputs


SHAPES = [SiteShape((3, 4), (4, 2)), SiteShape((2, 3, 2), (2, 2, 3)), SiteShape((12, 1), (1, 8)), site_shape(11, 13, 2)]


@settings(max_examples=60, deadline=None)
@given(
    sites=st.sampled_from(SHAPES),
    bond=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    weighted=st.sampled_from(["none", "inputs", "both", "singular"]),
)
def test_a_sweep_never_loses_more(sites: SiteShape, bond: int, seed: int, weighted: str) -> None:
    rows, columns = (11, 13) if sites == SHAPES[3] else sites.padded_shape
    w = normal(rows, columns, seed=seed)
    gram = None if weighted == "none" else skewed_gram(columns, seed + 1, 3 if weighted == "singular" else None)
    output = skewed_gram(rows, seed + 2) if weighted == "both" else None
    start, _ = decompose(w, sites, Truncation(bond))
    done = fit(w, start, gram, output, sweeps=3, tol=0.0)
    scale = weighted_square(w, gram, output)
    assert all(b <= a for a, b in zip(done.errors, done.errors[1:], strict=False))
    assert done.errors[0] == pytest.approx(weighted_square(w - start.to_matrix(), gram, output), abs=1e-9 * scale)
    assert done.errors[-1] == pytest.approx(weighted_square(w - done.mpo.to_matrix(), gram, output), abs=1e-9 * scale)
    assert done.mpo.bond_dims == start.bond_dims and done.mpo.shape == (rows, columns)


@pytest.mark.parametrize("both", [False, True])
def test_in_the_svd_shape_it_ends_at_the_closed_form(both: bool) -> None:
    w, gram = normal(8, 12, seed=0), skewed_gram(12, 1)
    output = skewed_gram(8, 2) if both else None
    start, _ = decompose(w, svd_shape(8, 12), Truncation(3))
    done = fit(w, start, gram, output, sweeps=400, tol=1e-13)
    assert done.errors[-1] == pytest.approx(WeightedSVD.of(w, gram, output).lost(3), rel=1e-4)


def test_one_core_is_the_least_squares_solution() -> None:
    """With the second core fixed, W ≈ E C is linear in the first: numpy solves the same problem entry by entry."""
    sites, bond = SiteShape((3, 2), (2, 4)), 2
    w, gram = normal(6, 8, seed=3), skewed_gram(8, 4)
    start, _ = decompose(w, sites, Truncation(bond))
    done = fit(w, start, gram, sweeps=1, tol=0.0)
    second = done.mpo.cores[1].numpy()  # (χ, o2, i2, 1), which the last solve of the sweep left alone
    root = np.linalg.cholesky(gram.numpy())
    columns = []
    for o1, i1, b in np.ndindex(3, 2, bond):
        unit = np.zeros((3, 2, bond))
        unit[o1, i1, b] = 1.0
        # rows (o1, o2), columns (i1, i2)
        dense = np.einsum("oib,bpj->opij", unit, second[..., 0]).reshape(6, 8)
        columns.append((dense @ root).ravel())
    solution, *_ = np.linalg.lstsq(np.stack(columns, 1), (w.numpy() @ root).ravel(), rcond=None)
    best = np.sum((np.stack(columns, 1) @ solution - (w.numpy() @ root).ravel()) ** 2)
    assert done.errors[-1] == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("sites", SHAPES[:2])
def test_it_beats_truncation_of_the_same_size(sites: SiteShape) -> None:
    rows, columns = sites.padded_shape
    for seed in range(5):
        w, gram = normal(rows, columns, seed=seed), skewed_gram(columns, 50 + seed)
        start, _ = decompose(w, sites, Truncation(2))
        done = fit(w, start, gram, sweeps=4)
        assert done.mpo.num_params == start.num_params
        assert done.errors[-1] < 0.95 * done.errors[0]


def test_a_matrix_that_is_such_an_mpo_is_found_exactly() -> None:
    sites = SiteShape((3, 4), (4, 2))
    exact = MPO((normal(1, 3, 4, 2, seed=5), normal(2, 4, 2, 1, seed=6)), (12, 8))
    start, _ = decompose(exact.to_matrix() + 0.1 * normal(12, 8, seed=7), sites, Truncation(2))
    done = fit(exact.to_matrix(), start, skewed_gram(8, 8), sweeps=20, tol=0.0)
    assert done.errors[-1] < 1e-12 * done.errors[0]


def test_large_cores_take_conjugate_gradients_and_still_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpocli.mpo import sweep

    sites = SiteShape((4, 4), (4, 4))
    w, gram = normal(16, 16, seed=9), skewed_gram(16, 10)
    start, _ = decompose(w, sites, Truncation(5))
    direct = fit(w, start, gram, sweeps=3, tol=0.0)
    monkeypatch.setattr(sweep, "DIRECT_UNKNOWNS", 0)
    iterated = fit(w, start, gram, sweeps=3, tol=0.0)
    assert all(b < a for a, b in zip(iterated.errors, iterated.errors[1:], strict=False))
    assert direct.errors[-1] <= iterated.errors[-1] < direct.errors[0]


@pytest.mark.parametrize("both", [False, True])
def test_a_target_ends_only_what_cannot_reach_it(both: bool) -> None:
    sites = SiteShape((4, 4), (4, 4))
    # As in real layers: some structure, and weights that are nowhere near singular.
    exact = MPO((normal(1, 4, 4, 3, seed=5), normal(3, 4, 4, 1, seed=6)), (16, 16))
    w = exact.to_matrix() + normal(16, 16, seed=9)
    gram = regularised(skewed_gram(16, 10), 48, least=0.3)
    output = regularised(skewed_gram(16, 11), 48, least=0.3) if both else None
    start, _ = decompose(w, sites, Truncation(5))
    free = fit(w, start, gram, output, sweeps=8, tol=0.0)
    # Reached: the sweeps are those without a target, summed in single precision.
    reached = fit(w, start, gram, output, sweeps=8, tol=0.0, target=free.errors[-1] * 1.01)
    assert reached.errors == pytest.approx(free.errors, rel=1e-4)
    # Out of reach by a little: some sweeps, and no more than it takes to see that.
    close = fit(w, start, gram, output, sweeps=8, tol=0.0, target=free.errors[-1] * 0.9)
    assert 1 < len(close.errors) <= len(free.errors)
    gains = [a - b for a, b in zip(close.errors, close.errors[1:], strict=False)]
    left = 8 - len(gains)
    assert left == 0 or close.errors[-1] - left * gains[-1] > free.errors[-1] * 0.9
    # Far out of reach: nothing.
    assert fit(w, start, gram, output, sweeps=8, target=1e-9 * free.errors[-1]).errors == reached.errors[:1]

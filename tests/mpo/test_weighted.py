"""The truncated SVD in the norm of inputs and outputs, against its closed form by numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from mpocli.errors import InputError
from mpocli.mpo.gram import FLOOR, factor, regularised, roots
from mpocli.mpo.weighted import WeightedSVD, spectrum, weighted_square


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(size: int, tokens: int, seed: int = 1) -> Tensor:
    inputs = matrix(tokens, size, seed) * torch.logspace(1, -2, size, dtype=torch.float64)
    return inputs.T @ inputs


def closed_form(w: Tensor, g: Tensor, h: Tensor, rank: int) -> np.ndarray:
    """H^{-1/2} (H^{1/2} W G^{1/2})_r G^{-1/2}, by an SVD of the whitened matrix."""
    left, right = np.real(sqrtm(h.numpy())), np.real(sqrtm(g.numpy()))
    u, s, vh = np.linalg.svd(left @ w.numpy() @ right, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return np.linalg.inv(left) @ kept @ np.linalg.inv(right)


@pytest.mark.parametrize(("rows", "columns"), [(6, 11), (11, 6), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_is_the_closed_form(rows: int, columns: int, rank: int) -> None:
    w, g, h = matrix(rows, columns), gram(columns, 40), gram(rows, 40, 2)
    svd = WeightedSVD.of(w, g, h)
    made = svd.mpo(rank).to_matrix()
    np.testing.assert_allclose(made.numpy(), closed_form(w, g, h, rank), rtol=1e-6, atol=1e-7)
    assert svd.lost(rank) == pytest.approx(weighted_square(w - made, g, h), rel=1e-6, abs=1e-9 * svd.total)


@pytest.mark.parametrize(("rows", "columns"), [(6, 11), (11, 6)])
def test_the_spectrum_alone_is_the_same(rows: int, columns: int) -> None:
    w, g, h = matrix(rows, columns), gram(columns, 40), gram(rows, 40, 2)
    svd = WeightedSVD.of(w, g, h)
    torch.testing.assert_close(spectrum(w, g, h), svd.weights, rtol=1e-9, atol=1e-12 * svd.total)


def test_without_weights_it_is_the_plain_svd() -> None:
    w = matrix(7, 5)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    svd = WeightedSVD.of(w)
    torch.testing.assert_close(svd.mpo(2).to_matrix(), (u[:, :2] * s[:2]) @ vh[:2])
    torch.testing.assert_close(svd.weights, s.square())


def test_its_shape_is_the_two_site_mpo() -> None:
    mpo = WeightedSVD.of(matrix(7, 5), gram(5, 20)).mpo(3)
    assert (mpo.site_shape.out_dims, mpo.site_shape.in_dims, mpo.bond_dims) == ((7, 1), (1, 5), (1, 3, 1))
    assert mpo.num_params == 3 * (7 + 5)


@pytest.mark.parametrize("rows", [4, 12])
def test_it_beats_the_plain_svd_in_its_norm(rows: int) -> None:
    w, g = matrix(rows, 9), gram(9, 30)
    for rank in range(1, 4):
        plain = weighted_square(w - WeightedSVD.of(w).mpo(rank).to_matrix(), g)
        assert WeightedSVD.of(w, g).lost(rank) < plain


@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("case", ["dead input", "constant input", "fewer tokens than inputs", "all dead", "one token"])
def test_a_degenerate_gram_matrix_is_no_failure(case: str, rows: int) -> None:
    inputs = matrix(50, 9, 3)
    if case == "dead input":
        inputs[:, 2] = 0.0
    elif case == "constant input":
        inputs[:, 2] = 1000.0
    elif case == "fewer tokens than inputs":
        inputs = inputs[:4]
    elif case == "one token":
        inputs = inputs[:1]
    else:
        inputs.zero_()
    w = matrix(rows, 9)
    g = regularised(inputs.T @ inputs, len(inputs))
    svd = WeightedSVD.of(w, g)
    for rank in (1, 3):
        made = svd.mpo(rank).to_matrix()
        assert bool(torch.isfinite(made).all())
        # No direction may explode: an approximation is a projection, from one side or in the norm from the other.
        assert float(torch.linalg.matrix_norm(made)) < 100 * float(torch.linalg.matrix_norm(w))
    torch.testing.assert_close(svd.mpo(min(rows, 9)).to_matrix(), w, rtol=1e-5, atol=1e-5)


def test_the_zero_matrix_stays_zero() -> None:
    svd = WeightedSVD.of(torch.zeros(4, 6), gram(6, 10))
    assert svd.total == 0.0
    assert not bool(svd.mpo(2).to_matrix().any())


def test_shrinkage_is_the_published_estimate() -> None:
    inputs = (matrix(12, 5, 4) * torch.tensor([9.0, 3.0, 1.0, 0.5, 0.1])).numpy()
    sample, n, p = inputs.T @ inputs / 12, 12, 5
    trace_of_square, trace = np.trace(sample @ sample), np.trace(sample)
    rho = ((1 - 2 / p) * trace_of_square + trace**2) / ((n + 1 - 2 / p) * (trace_of_square - trace**2 / p))
    wanted = (1 - min(rho, 1.0)) * sample + min(rho, 1.0) * trace / p * np.eye(p)
    made = regularised(torch.from_numpy(inputs.T @ inputs), 12)
    np.testing.assert_allclose(made.numpy(), wanted, rtol=1e-12)
    assert 0.05 < rho < 1  # neither end of it


def test_shrinkage_goes_away_with_tokens_but_for_the_floor() -> None:
    size = 20
    inputs = matrix(200_000, size, 5) * torch.logspace(2, 0, size, dtype=torch.float64)
    second = inputs.T @ inputs / len(inputs)
    made = regularised(inputs.T @ inputs, len(inputs))
    assert float((made - second).norm() / second.norm()) < 1e-4
    assert float(torch.linalg.eigvalsh(regularised(torch.diag(torch.tensor([1e9, 0.0])), 10**9))[0]) >= FLOOR / 2


def test_roots_are_roots_even_of_what_round_off_made_negative() -> None:
    g = gram(6, 30)
    root, inverse = roots(g)
    torch.testing.assert_close(root @ root, g)
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64))
    spoiled = torch.diag(torch.tensor([1.0, -1e-12, 0.0], dtype=torch.float64))
    root, inverse = roots(spoiled)
    assert bool(torch.isfinite(inverse).all()) and float(root[1, 1]) > 0


@pytest.mark.parametrize("least", [1e-7, 1e-4, 0.3])
def test_a_factor_is_cholesky_only_where_no_eigenvalue_needs_raising(least: float) -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 1.0 * least], dtype=torch.float64)
    basis = torch.linalg.qr(matrix(4, 4, 7)).Q
    g = (basis * values) @ basis.T
    r, inverse = factor(g, floor=1e-5)
    raised = values.clamp_min(1e-5 * float(values.mean()))
    torch.testing.assert_close(r.T @ r, (basis * raised) @ basis.T)
    torch.testing.assert_close(r @ inverse, torch.eye(4, dtype=torch.float64))
    assert torch.equal(r, r.triu()) == (least > 1e-5)


def test_sums_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        regularised(torch.tensor([[float("nan")]]), 3)

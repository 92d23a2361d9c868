import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import LAW, capped_sites, gaussian, matrices, pad, random_cores, unfolding_spectra

from mpocli.mpo import MPO, SiteShape, Truncation, bond_spectra, decompose, entropy_nats, error_bounds, to_dense


def mpo_of(matrix, *dims):
    return MPO.from_matrix(torch.from_numpy(matrix), SiteShape(*dims))


@LAW
@given(matrices(), st.sampled_from([1.0, 1e-150, 1e150]))
@example((gaussian(20, 1) @ gaussian(1, 20), (4, 5), (5, 4)), 1.0)
@example((np.zeros((6, 6)), (2, 3), (3, 2)), 1.0)
@example((np.eye(16), (2, 2, 2, 2), (2, 2, 2, 2)), 1.0)
def test_bond_spectra_are_the_singular_values_of_the_unfoldings(drawn, scale):
    matrix, *dims = drawn
    found = bond_spectra(mpo_of(matrix * scale, *dims))
    expected = unfolding_spectra(pad(matrix, *dims), *dims)
    assert len(found) == len(expected) == len(dims[0]) - 1
    for values, oracle in zip(found, expected, strict=True):
        assert len(values) == len(oracle)
        assert (values.diff() <= 0).all()
        assert np.abs(values.numpy() / scale - oracle).max() <= 1e-10 * oracle[0]


@LAW
@given(capped_sites(largest=6))
def test_spectra_of_cores_without_canonical_form_are_those_of_their_matrix(sites):
    *dims, bonds = sites
    mpo = MPO(tuple(random_cores(*dims, (1, *bonds, 1))), SiteShape(*dims).padded_shape)
    for values, oracle in zip(bond_spectra(mpo), unfolding_spectra(to_dense(mpo.cores).numpy(), *dims), strict=True):
        size = len(values)
        assert np.abs(values.numpy() - oracle[:size]).max() <= 1e-10 * oracle[0]
        assert np.linalg.norm(oracle[size:]) <= 1e-10 * oracle[0]


def test_spectra_far_below_the_largest_are_known_to_half_the_digits():
    left, _ = np.linalg.qr(gaussian(16, 16, seed=1))
    right, _ = np.linalg.qr(gaussian(16, 16, seed=2))
    matrix = left * 10.0 ** -np.arange(16) @ right.T
    (values,) = bond_spectra(mpo_of(matrix, (16, 1), (1, 16)))
    assert np.abs(values.numpy() - 10.0 ** -np.arange(16)).max() < 2.0**-24


@LAW
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.sampled_from([1.0, 1e-140, 1e140]))
@example([0.0, 0.0], 1.0)
@example([1.0] * 20, 1.0)
def test_entropy_lies_between_zero_and_the_log_of_the_bond(values, scale):
    entropy = entropy_nats(torch.tensor(values, dtype=torch.float64) * scale)
    assert 0.0 <= entropy <= math.log(len(values)) + 1e-14


@LAW
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.sampled_from([1.0, 1e-140, 1e140]))
def test_entropy_is_the_sum_over_normalised_squares_at_any_scale(values, scale):
    weights = [value**2 for value in values]
    expected = -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
    found = entropy_nats(torch.tensor(values, dtype=torch.float64) * scale)
    assert math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-13)


def entropies(matrix, *dims):
    return [entropy_nats(values) for values in bond_spectra(mpo_of(matrix, *dims))]


def test_a_kronecker_product_has_no_entropy():
    matrix = np.kron(np.kron(gaussian(2, 3, seed=1), gaussian(4, 2, seed=2)), gaussian(3, 5, seed=3))
    assert max(entropies(matrix, (2, 4, 3), (3, 2, 5))) < 1e-13


def test_a_swap_of_two_sites_has_the_largest_entropy():
    swap = np.zeros((9, 9))
    for a in range(3):
        for b in range(3):
            swap[3 * a + b, 3 * b + a] = 1  # row digits (a, b), column digits (b, a)
    (values,) = bond_spectra(mpo_of(swap, (3, 3), (3, 3)))
    assert np.allclose(values, 1.0, atol=1e-14)  # nine equal ones
    assert math.isclose(entropy_nats(values), math.log(9), rel_tol=1e-14)


def test_a_sum_of_orthogonal_products_has_the_entropy_of_its_weights_at_every_bond():
    first, second = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    matrix = 3 * np.kron(first, np.kron(first, first)) + 4 * np.kron(second, np.kron(second, second))
    expected = -(9 / 25) * math.log(9 / 25) - (16 / 25) * math.log(16 / 25)
    assert np.allclose(entropies(matrix, (2, 2, 2), (2, 2, 2)), expected, rtol=1e-13)


def test_entropy_of_the_zero_matrix_is_zero():
    assert entropies(np.zeros((6, 6)), (2, 3), (3, 2)) == [0.0]


@LAW
@given(matrices(), st.data())
def test_bounds_from_the_spectra_hold_for_any_caps(drawn, data):
    matrix, *dims = drawn
    shape = SiteShape(*dims)
    bonds = shape.capped_bond_dims(data.draw(st.tuples(*[st.integers(1, 9)] * (shape.sites - 1))))
    mpo, error = decompose(torch.from_numpy(matrix), shape, Truncation(max_bond=bonds[1:-1]))
    assert mpo.bond_dims == bonds
    lower, upper = error_bounds(bond_spectra(mpo_of(matrix, *dims)), bonds)
    tails = [
        np.linalg.norm(s[d:]) for s, d in zip(unfolding_spectra(pad(matrix, *dims), *dims), bonds[1:-1], strict=True)
    ]
    slack = 1e-10 * np.linalg.norm(matrix)
    assert abs(lower - max(tails)) < slack and abs(upper - np.linalg.norm(tails)) < slack
    assert lower - slack <= error.absolute <= upper + slack


def test_bounds_coincide_where_one_bond_is_cut():
    values = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 2.0])]
    assert error_bounds(values, (1, 1, 2, 1)) == (math.sqrt(5), math.sqrt(5))
    assert error_bounds(values, (1, 1, 1, 1)) == (math.sqrt(5), 3.0)
    assert error_bounds(values, (1, 3, 2, 1)) == (0.0, 0.0)


def test_bounds_need_one_bond_for_each_spectrum():
    with pytest.raises(ValueError, match="argument 2"):
        error_bounds([torch.ones(3), torch.ones(3)], (1, 2, 1))

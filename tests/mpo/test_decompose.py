import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from oracle import (
    LAW,
    capped_sites,
    distance,
    gaussian,
    matrices,
    matrix_by_loops,
    pad,
    random_cores,
    ranks,
    site_dims,
    to_numpy,
    unfolding_spectra,
)

from mpocli.errors import InputError, UsageError
from mpocli.mpo import MPO, SiteShape, Truncation, decompose, stored_error, to_dense

MANY_SITES = [
    ((6, 1), (1, 5)),  # a truncated SVD
    ((1, 6), (5, 1)),
    ((7, 13), (11, 3)),
    ((8, 12, 8), (4, 4, 6)),
    ((2, 3, 5, 2), (3, 2, 2, 4)),
    ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)),
    ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
    ((5, 1, 1, 1, 7), (3, 1, 1, 1, 2)),
    ((2, 3, 2, 1, 2, 2), (2, 1, 3, 2, 2, 2)),
    ((2, 2, 1, 4, 3, 2, 2), (2, 2, 4, 1, 3, 2, 2)),
    ((2, 2, 2, 2, 2, 2, 2, 2), (2, 1, 2, 1, 2, 2, 1, 2)),
    ((2, 2, 2, 2, 3, 2, 2, 2, 2), (1, 2, 1, 2, 3, 1, 2, 1, 2)),
]


def from_numpy(matrix):
    return torch.from_numpy(np.ascontiguousarray(matrix))


@pytest.mark.parametrize(("out_dims", "in_dims"), MANY_SITES, ids=lambda dims: ",".join(map(str, dims)))
def test_full_bond_round_trip_loses_only_round_off(out_dims, in_dims):
    shape = SiteShape(out_dims, in_dims)
    matrix = gaussian(*shape.padded_shape)
    mpo, error = decompose(from_numpy(matrix), shape)
    assert distance(mpo.to_matrix(), matrix) < 1e-13
    assert mpo.bond_dims == shape.full_bond_dims
    assert mpo.num_params == shape.num_params()
    assert error.discarded_weight == (0.0,) * (shape.sites - 1)
    assert error.relative == 0.0


@LAW
@given(matrices(max_sites=9))
@example((np.zeros((12, 12)), (3, 4), (2, 6)))
@example((np.ones((1, 1)), (1, 1, 1), (1, 1, 1)))
@example((np.full((13, 1), 1e150), (13, 1), (1, 1)))
@example((gaussian(31, 37), (2, 16), (19, 2)))
def test_any_matrix_survives_the_round_trip_and_padding_is_cropped(drawn):
    matrix, *dims = drawn
    mpo = MPO.from_matrix(from_numpy(matrix), SiteShape(*dims))
    assert mpo.to_matrix().shape == matrix.shape == mpo.shape
    assert distance(mpo.to_matrix(), matrix) < 1e-13
    padded = to_dense(mpo.cores).numpy()
    assert distance(padded, pad(matrix, *dims)) < 1e-13  # what is cropped is zero


@LAW
@given(matrices(max_elements=120), st.integers(1, 6))
def test_matrix_is_the_product_of_slices_element_by_element(drawn, cap):
    matrix, *dims = drawn
    mpo = MPO.from_matrix(from_numpy(matrix), SiteShape(*dims), Truncation(max_bond=cap))
    by_loops = matrix_by_loops(to_numpy(mpo.cores))
    assert np.abs(to_dense(mpo.cores).numpy() - by_loops).max() < 1e-12
    assert np.array_equal(mpo.to_matrix().numpy(), to_dense(mpo.cores).numpy()[: len(matrix), : matrix.shape[1]])


@LAW
@given(matrices(), st.integers(1, 8), st.sampled_from([1.0, 1e-150, 1e150, 1e-9]))
@example((gaussian(24, 24), (2, 3, 4), (4, 3, 2)), 3, 1.0)
@example((np.zeros((8, 8)), (2, 4), (4, 2)), 1, 1.0)
def test_sweep_error_equals_discarded_weight(drawn, cap, scale):
    matrix, *dims = drawn
    matrix = matrix * scale
    mpo, error = decompose(from_numpy(matrix), SiteShape(*dims), Truncation(max_bond=cap))
    padded = pad(matrix, *dims)
    lost = np.linalg.norm((to_dense(mpo.cores).numpy() - padded) / scale) ** 2
    norm = np.linalg.norm(padded / scale) ** 2
    assert math.isclose(error.norm_squared / scale / scale, norm, rel_tol=1e-12)
    assert abs(sum(error.discarded_weight) / scale / scale - lost) < 1e-12 * norm + 1e-300
    assert abs(error.absolute / scale - math.sqrt(lost)) < 1e-7 * math.sqrt(norm) + 1e-300


@LAW
@given(site_dims(), st.integers(1, 12))
def test_bonds_of_a_gaussian_matrix_are_the_predicted_ones(dims, cap):
    shape = SiteShape(*dims)
    mpo = MPO.from_matrix(from_numpy(gaussian(*shape.padded_shape)), shape, Truncation(max_bond=cap))
    assert mpo.bond_dims == shape.capped_bond_dims(cap)
    assert max(mpo.bond_dims) <= cap
    assert mpo.num_params == shape.num_params(shape.capped_bond_dims(cap))


@LAW
@given(capped_sites())
@example(((2, 2, 2, 2, 2), (2, 2, 2, 2, 2), (4, 16, 1, 4)))
def test_bonds_capped_one_by_one_are_the_predicted_ones(sites):
    *dims, caps = sites
    shape = SiteShape(*dims)
    mpo = MPO.from_matrix(from_numpy(gaussian(*shape.padded_shape)), shape, Truncation(max_bond=caps))
    assert all(bond <= cap for bond, cap in zip(mpo.bond_dims[1:-1], caps, strict=True))
    assert mpo.bond_dims == shape.capped_bond_dims(caps)


@LAW
@given(matrices(), st.data())
def test_cutting_one_bond_loses_the_tail_of_its_spectrum(drawn, data):
    matrix, *dims = drawn
    shape = SiteShape(*dims)
    bond = data.draw(st.integers(1, shape.sites - 1))
    cap = data.draw(st.integers(1, shape.full_bond_dims[bond]))
    caps = list(shape.full_bond_dims[1:-1])
    caps[bond - 1] = cap
    mpo, error = decompose(from_numpy(matrix), shape, Truncation(max_bond=tuple(caps)))
    padded = pad(matrix, *dims)
    tail = np.linalg.norm(unfolding_spectra(padded, *dims)[bond - 1][cap:])
    assert abs(np.linalg.norm(to_dense(mpo.cores).numpy() - padded) - tail) < 1e-12 * np.linalg.norm(padded)
    assert abs(error.discarded_weight[bond - 1] - tail**2) < 1e-12 * error.norm_squared


@LAW
@given(st.data())
def test_error_is_at_most_sqrt_of_bonds_times_that_of_any_mpo_with_those_bonds(data):
    dims = data.draw(site_dims())
    shape = SiteShape(*dims)
    bonds = shape.capped_bond_dims(data.draw(st.integers(1, 5)))
    other = to_dense(random_cores(*dims, bonds, seed=data.draw(st.integers(0, 999)))).numpy()
    noise = 0.1 * np.linalg.norm(other) / math.sqrt(other.size) * gaussian(*other.shape)
    error = decompose(from_numpy(other + noise), shape, Truncation(max_bond=bonds[1:-1]))[1]
    assert error.absolute <= math.sqrt(shape.sites - 1) * np.linalg.norm(noise) * (1 + 1e-12)


@LAW
@given(matrices(), st.floats(0.0, 0.99))
@example((gaussian(24, 24), (2, 3, 4), (4, 3, 2)), 0.5)
@example((gaussian(36, 36) * 1e150, (2, 3, 6), (6, 3, 2)), 0.5)
@example((gaussian(36, 36) * 1e-150, (2, 3, 6), (6, 3, 2)), 0.5)
def test_relative_error_stays_within_the_tolerance(drawn, tolerance):
    matrix, *dims = drawn
    mpo, error = decompose(from_numpy(matrix), SiteShape(*dims), Truncation(rel_tol=tolerance))
    assert distance(to_dense(mpo.cores), pad(matrix, *dims)) <= tolerance * (1 + 1e-9) + 1e-13
    assert error.relative <= tolerance * (1 + 1e-9)


@LAW
@given(matrices(max_sites=2), st.floats(0.01, 0.99))
def test_tolerance_on_two_sites_keeps_the_fewest_singular_values_that_meet_it(drawn, tolerance):
    matrix, *dims = drawn
    mpo = MPO.from_matrix(from_numpy(matrix), SiteShape(*dims), Truncation(rel_tol=tolerance))
    values = unfolding_spectra(pad(matrix, *dims), *dims)[0]
    relative_tails = np.array([np.linalg.norm(values[kept:]) for kept in range(len(values) + 1)]) / np.linalg.norm(
        values
    )
    assume(np.abs(relative_tails - tolerance).min() > 1e-9)  # no tie for round-off to decide
    assert mpo.bond_dims[1] == max(1, int((relative_tails > tolerance).sum()))


@LAW
@given(matrices(), st.floats(0.1, 0.99))
@example((gaussian(24, 24), (2, 3, 4), (4, 3, 2)), 0.9)
def test_every_bond_may_lose_an_even_share_of_the_tolerance(drawn, tolerance):
    matrix, *dims = drawn
    shape = SiteShape(*dims)
    mpo, error = decompose(from_numpy(matrix), shape, Truncation(rel_tol=tolerance))
    share = tolerance**2 * np.linalg.norm(matrix) ** 2 / (shape.sites - 1)
    assert max(error.discarded_weight) <= share * (1 + 1e-9)
    # The first bond is cut while the matrix is whole, so that its spectrum decides alone.
    if shape.central > 0:
        values = unfolding_spectra(pad(matrix, *dims), *dims)[0]
        tails = np.array([np.square(values[kept:]).sum() for kept in range(len(values) + 1)])
        assume(np.abs(tails - share).min() > 1e-9 * share)
        assert mpo.bond_dims[1] == max(1, int((tails > share).sum()))


@LAW
@given(capped_sites(largest=3))
@example(((3, 4, 4, 4), (4, 4, 4, 3), (2, 5, 3)))
def test_tolerance_shrinks_a_rank_deficient_matrix_to_its_ranks(sites):
    *dims, bonds = sites
    matrix = to_dense(random_cores(*dims, (1, *bonds, 1)))
    mpo = MPO.from_matrix(matrix, SiteShape(*dims), Truncation(rel_tol=1e-6))
    assert mpo.bond_dims == ranks(matrix.numpy(), *dims)
    assert distance(mpo.to_matrix(), matrix) < 1e-6


def test_tolerance_shrinks_the_zero_matrix_to_bond_one():
    mpo, error = decompose(torch.zeros(12, 12), SiteShape((3, 2, 2), (2, 2, 3)), Truncation(rel_tol=0.1))
    assert error.relative == 0.0 and not mpo.to_matrix().any()
    assert mpo.bond_dims == (1, 1, 1, 1)


def test_tolerance_of_zero_loses_nothing():
    shape = SiteShape((3, 2, 2), (2, 2, 3))
    mpo, error = decompose(from_numpy(gaussian(12, 12)), shape, Truncation(rel_tol=0.0))
    assert mpo.bond_dims == shape.full_bond_dims and error.absolute == 0.0


def test_cap_holds_where_the_tolerance_alone_would_keep_more():
    matrix, shape = from_numpy(gaussian(24, 24)), SiteShape((2, 3, 4), (4, 3, 2))
    assert max(MPO.from_matrix(matrix, shape, Truncation(rel_tol=0.1)).bond_dims) > 2
    assert MPO.from_matrix(matrix, shape, Truncation(max_bond=2, rel_tol=0.1)).bond_dims == (1, 2, 2, 1)


@LAW
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 999))
def test_the_svd_shape_is_a_truncated_svd(rows, columns, rank, seed):
    matrix = gaussian(rows, columns, seed=seed)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    for shape in (SiteShape((rows, 1), (1, columns)), SiteShape((1, rows), (columns, 1))):
        mpo, error = decompose(from_numpy(matrix), shape, Truncation(max_bond=rank))
        assert mpo.bond_dims == (1, min(rank, rows, columns), 1)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        lost = np.linalg.norm(mpo.to_matrix().numpy() - matrix)
        assert abs(lost - np.linalg.norm(best - matrix)) < 1e-12 * np.linalg.norm(matrix)
        assert abs(error.absolute - lost) < 1e-7 * np.linalg.norm(matrix)


def test_bond_one_of_a_kronecker_product_is_exact_with_the_first_site_leading():
    first, second, third = gaussian(2, 3, seed=1), gaussian(4, 2, seed=2), gaussian(3, 5, seed=3)
    matrix = np.kron(np.kron(first, second), third)
    mpo, error = decompose(from_numpy(matrix), SiteShape((2, 4, 3), (3, 2, 5)), Truncation(max_bond=1))
    assert distance(mpo.to_matrix(), matrix) < 1e-13
    assert error.relative < 1e-13
    cosine = np.vdot(mpo.cores[0].numpy(), first) / np.linalg.norm(mpo.cores[0]) / np.linalg.norm(first)
    assert abs(abs(cosine) - 1) < 1e-13


def with_a_zero_block():
    matrix = gaussian(24, 24)
    matrix[8:16] = 0  # all of one index of the first site
    return matrix


@pytest.mark.parametrize("matrix", [np.zeros((24, 24)), np.ones((24, 24)), np.eye(24), with_a_zero_block()])
@pytest.mark.parametrize("cap", [None, 1, 5])
def test_degenerate_matrices_stay_finite_and_within_theory(matrix, cap):
    shape = SiteShape((3, 2, 4), (4, 2, 3))
    mpo, error = decompose(from_numpy(matrix), shape, Truncation(max_bond=cap))
    assert all(torch.isfinite(core).all() for core in mpo.cores)
    lost = np.linalg.norm(mpo.to_matrix().numpy() - matrix)
    assert abs(lost**2 - sum(error.discarded_weight)) < 1e-12 * (np.linalg.norm(matrix) ** 2 or 1)
    if cap is None:
        assert distance(mpo.to_matrix(), matrix) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_narrow_input_is_decomposed_in_float64(dtype):
    matrix = from_numpy(100 * gaussian(12, 10)).to(dtype)
    mpo = MPO.from_matrix(matrix, SiteShape((3, 4), (5, 2)))
    assert {core.dtype for core in mpo.cores} == {torch.float64}
    assert distance(mpo.to_matrix(), matrix.double()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_canonical_cores_costs_at_most_a_unit_a_column(dtype):
    matrix = gaussian(24, 24)
    mpo = MPO.from_matrix(from_numpy(matrix), SiteShape((2, 3, 4), (4, 3, 2)))
    rounded = mpo.to(dtype=dtype)
    assert {core.dtype for core in rounded.cores} == {dtype}
    # ‖δA_k‖_F ≤ u √χ for an isometry of χ columns, u ‖W‖_F for the central core; first order in u.
    unit = torch.finfo(dtype).eps / 2
    bound = unit * (math.sqrt(mpo.bond_dims[1]) + math.sqrt(mpo.bond_dims[2]) + 1) * 1.01
    lost, norm = stored_error(from_numpy(matrix), rounded)
    assert 0 < lost <= bound * norm


@pytest.mark.parametrize("caps", [None, 3, (4, 16, 1, 4), (4, 1, 16, 4)])
def test_input_is_left_alone_and_cores_own_no_more_than_themselves(caps):
    matrix = from_numpy(gaussian(32, 32))
    before = matrix.clone()
    mpo = MPO.from_matrix(matrix, SiteShape((2,) * 5, (2,) * 5), Truncation(max_bond=caps))
    assert torch.equal(matrix, before)
    for core in mpo.cores:
        assert core.is_contiguous()
        assert core.untyped_storage().nbytes() == core.numel() * core.element_size()


def test_transposed_and_strided_input_is_read_by_value():
    matrix = gaussian(40, 24)
    view = torch.from_numpy(matrix).T[:, ::2]
    assert distance(MPO.from_matrix(view, SiteShape((4, 6), (4, 5))).to_matrix(), matrix.T[:, ::2]) < 1e-13


def test_decomposing_a_parameter_gives_cores_without_a_graph():
    parameter = torch.nn.Parameter(from_numpy(gaussian(12, 12)))
    mpo = MPO.from_matrix(parameter, SiteShape((3, 4), (4, 3)))
    assert not any(core.requires_grad for core in mpo.cores)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_nan_or_infinity_enters(bad, dtype):
    matrix = torch.ones(6, 6, dtype=dtype)
    MPO.from_matrix(matrix, SiteShape((2, 3), (3, 2)))
    matrix[3, 3] = bad
    with pytest.raises(InputError, match=r"encoder\.weight: 1 of 36 elements"):
        MPO.from_matrix(matrix, SiteShape((2, 3), (3, 2)), name="encoder.weight")


def test_a_matrix_that_does_not_fit_its_sites_is_an_input_error_with_its_name():
    with pytest.raises(InputError, match=r"encoder\.weight: site shape 2,3x3,2 makes 6 rows, the matrix has 7"):
        decompose(torch.ones(7, 6), SiteShape((2, 3), (3, 2)), name="encoder.weight")


@pytest.mark.parametrize("caps", [(2,), (2, 2, 2)])
def test_a_list_of_caps_of_the_wrong_length_is_an_input_error(caps):
    with pytest.raises(InputError, match=f"{len(caps)} bond dimensions for 3 sites"):
        decompose(torch.ones(8, 8), SiteShape((2, 2, 2), (2, 2, 2)), Truncation(max_bond=caps))


@pytest.mark.parametrize("bonds", [(2, 2, 2, 1), (1, 2, 2, 2)])
def test_an_mpo_begins_and_ends_with_bond_one(bonds):
    with pytest.raises(InputError, match="bonds do not meet"):
        MPO(tuple(random_cores((2, 2, 2), (2, 2, 2), bonds)), (8, 8))


def test_neighbouring_cores_share_their_bond_and_fit_the_matrix():
    first, _ = random_cores((2, 2), (2, 2), (1, 3, 1))
    _, second = random_cores((2, 2), (2, 2), (1, 2, 1))
    with pytest.raises(InputError, match="bonds do not meet"):
        MPO((first, second), (4, 4))
    with pytest.raises(InputError, match="makes 4 rows, the matrix has 5"):
        MPO((second.transpose(0, 3), second), (5, 4))


def test_ratio_is_parameters_over_those_of_the_unpadded_matrix():
    mpo = MPO.from_matrix(from_numpy(gaussian(11, 10)), SiteShape((3, 4), (5, 2)), Truncation(max_bond=2))
    assert mpo.num_params == 2 * (15 + 8)
    assert mpo.ratio == 46 / 110


@LAW
@given(matrices(), st.integers(1, 6), st.sampled_from([torch.float64, torch.bfloat16]))
@example((gaussian(20, 4), (11, 2), (2, 2)), 3, torch.float64)  # blocks of two digits, the last ones padding
@example((gaussian(91, 2), (100, 1), (1, 2)), 1, torch.float64)
@example((np.zeros((4, 4)), (2, 2), (2, 2)), 1, torch.float64)
@example((gaussian(40, 8), (2, 11, 2), (2, 2, 2)), 3, torch.float64)
@example((gaussian(64, 3), (1, 17, 4), (1, 3, 1)), 3, torch.bfloat16)
def test_stored_error_is_the_error_of_what_is_stored(drawn, cap, dtype):
    matrix, *dims = drawn
    mpo = MPO.from_matrix(from_numpy(matrix), SiteShape(*dims), Truncation(max_bond=cap)).to(dtype=dtype)
    stored = matrix_by_loops(to_numpy(mpo.cores))[: len(matrix), : matrix.shape[1]]
    lost, norm = stored_error(from_numpy(matrix), mpo)
    assert math.isclose(norm, np.linalg.norm(matrix), rel_tol=1e-12)
    assert abs(lost - np.linalg.norm(stored - matrix)) <= 1e-12 * norm


@pytest.mark.parametrize("max_bond", [0, -1, (3, 0), (0, 3)])
def test_a_bond_dimension_below_one_is_a_usage_error(max_bond):
    with pytest.raises(UsageError, match="smallest bond dimension is 1"):
        Truncation(max_bond=max_bond)


@pytest.mark.parametrize("rel_tol", [-0.1, 1.0, 2.0, float("nan"), float("inf")])
def test_a_tolerance_outside_zero_to_one_is_a_usage_error(rel_tol):
    with pytest.raises(UsageError, match="relative tolerance"):
        Truncation(rel_tol=rel_tol)


def test_only_a_truncation_without_limits_is_lossless():
    assert Truncation().is_lossless and Truncation(rel_tol=0.0).is_lossless
    assert not Truncation(max_bond=10**9).is_lossless and not Truncation(rel_tol=1e-9).is_lossless

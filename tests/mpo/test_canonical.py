import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import (
    LAW,
    capped_sites,
    distance,
    gaussian,
    left_part,
    matrices,
    pad,
    random_cores,
    ranks,
    right_part,
    site_dims,
    to_numpy,
    unfolding_spectra,
)

from mpocli.mpo import (
    MPO,
    SiteShape,
    Truncation,
    bond_spectra,
    canonical_defect,
    canonicalize,
    compress,
    decompose,
    error_bounds,
    symmetric_gauge,
    to_dense,
)


@st.composite
def random_mpos(draw, max_bond=6):
    """MPOs with no canonical form, some with more bond than they can use, some rank-deficient."""
    dims = draw(site_dims())
    bonds = (1, *(draw(st.integers(1, max_bond)) for _ in dims[0][1:]), 1)
    cores = random_cores(*dims, bonds, seed=draw(st.integers(0, 999)))
    if draw(st.booleans()):
        k = draw(st.integers(0, len(cores) - 1))
        cores[k][-1:] = 0
    shape = SiteShape(*dims)
    return MPO(tuple(cores), shape.padded_shape)


def mpo_of(matrix, *dims):
    return MPO.from_matrix(torch.from_numpy(matrix), SiteShape(*dims))


ZERO = MPO(tuple(torch.zeros_like(core) for core in random_cores((3, 2, 4), (4, 2, 3), (1, 5, 5, 1))), (24, 24))
ZERO_BLOCK = mpo_of(np.vstack([gaussian(8, 24), np.zeros((8, 24)), gaussian(8, 24, seed=1)]), (3, 2, 4), (4, 2, 3))
LOW_RANK = mpo_of(np.kron(gaussian(4, 4), gaussian(6, 6, seed=1)), (2, 2, 6), (2, 2, 6))
ONE_BY_ONE = mpo_of(np.full((1, 1), -3.0), (1, 1, 1), (1, 1, 1))
DEGENERATE = pytest.mark.parametrize("mpo", [ZERO, ZERO_BLOCK, LOW_RANK, ONE_BY_ONE])


def isometry_defect(mpo, center):
    """Largest |AᵀA − 1| left and right of `center`, by numpy."""
    worst = 0.0
    for k, core in enumerate(to_numpy(mpo.cores)):
        if k < center:
            gram = np.einsum("aoib,aoic->bc", core, core)
        elif k > center:
            gram = np.einsum("aoib,coib->ac", core, core)
        else:
            continue
        worst = max(worst, np.abs(gram - np.eye(len(gram))).max())
    return worst


@LAW
@given(random_mpos())
@example(ZERO)
@example(ZERO_BLOCK)
@example(ONE_BY_ONE)
def test_canonicalizing_around_any_core_keeps_the_matrix_and_makes_isometries(mpo):
    matrix = to_dense(mpo.cores)
    for center in range(len(mpo.cores)):
        canonical = canonicalize(mpo, center)
        assert canonical.center == center and canonical.shape == mpo.shape
        assert isometry_defect(canonical, center) < 1e-13
        assert canonical_defect(canonical) < 1e-13
        assert distance(to_dense(canonical.cores), matrix) < 1e-13
        assert math.isclose(
            float(canonical.cores[center].norm()), float(matrix.norm()), rel_tol=1e-12
        )  # the centre carries the whole norm
        assert all(a <= b for a, b in zip(canonical.bond_dims, mpo.bond_dims, strict=True))


def test_canonical_form_is_around_the_central_core_unless_told():
    assert canonicalize(LOW_RANK).center == LOW_RANK.central == 1


def test_canonicalizing_cuts_bonds_that_the_neighbours_cannot_carry():
    wide = MPO(tuple(random_cores((2, 2, 2), (2, 2, 2), (1, 9, 9, 1))), (8, 8))
    assert canonicalize(wide, 1).bond_dims == (1, 4, 4, 1)


@LAW
@given(matrices(), st.integers(1, 9))
def test_a_decomposition_is_canonical_around_its_central_core(drawn, cap):
    matrix, *dims = drawn
    for truncation in (Truncation(), Truncation(max_bond=cap), Truncation(rel_tol=0.3)):
        mpo = MPO.from_matrix(torch.from_numpy(matrix), SiteShape(*dims), truncation)
        assert mpo.center == mpo.central
        assert isometry_defect(mpo, mpo.central) < 1e-13
        assert canonical_defect(mpo) < 1e-13


def test_canonical_defect_finds_a_false_claim_on_either_side():
    good = canonicalize(LOW_RANK, 1)
    assert canonical_defect(good) < 1e-13
    for k in (0, 2):
        cores = list(good.cores)
        cores[k] = 2 * cores[k]  # Gram 4, wanted 1
        assert math.isclose(canonical_defect(MPO(tuple(cores), good.shape, 1)), 3.0, rel_tol=1e-12)
    central = (good.cores[0], 2 * good.cores[1], good.cores[2])
    assert canonical_defect(MPO(central, good.shape, 1)) < 1e-13


def test_canonical_defect_is_zero_without_a_claim():
    assert canonical_defect(MPO(tuple(random_cores((2, 2), (2, 2), (1, 3, 1))), (4, 4))) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_canonicalizing_rounded_cores_restores_the_canonical_form(dtype):
    rounded = MPO.from_matrix(torch.from_numpy(gaussian(24, 24)), SiteShape((2, 3, 4), (4, 3, 2))).to(dtype=dtype)
    assert canonical_defect(rounded) > 1e-9  # the claim holds to the precision that stores it
    assert canonical_defect(rounded) < 4 * torch.finfo(dtype).eps
    again = canonicalize(rounded)
    assert canonical_defect(again) < 1e-13
    assert distance(to_dense(again.cores), to_dense([core.double() for core in rounded.cores])) < 1e-13


@LAW
@given(random_mpos(), st.integers(1, 5), st.sampled_from([1.0, 1e-150, 1e150]))
@example(ZERO, 1, 1.0)
@example(ZERO_BLOCK, 3, 1.0)
@example(LOW_RANK, 2, 1.0)
def test_compression_error_equals_its_discarded_weight(mpo, cap, scale):
    mpo = MPO((mpo.cores[0] * scale, *mpo.cores[1:]), mpo.shape)
    matrix = to_dense(mpo.cores) / scale
    small, error = compress(mpo, Truncation(max_bond=cap))
    lost = float((to_dense(small.cores) / scale - matrix).square().sum())
    norm = float(matrix.square().sum())
    assert math.isclose(error.norm_squared / scale / scale, norm, rel_tol=1e-12)
    assert abs(sum(error.discarded_weight) / scale / scale - lost) <= 1e-12 * norm
    assert max(small.bond_dims) <= cap
    assert small.center == small.central and isometry_defect(small, small.central) < 1e-13


@LAW
@given(matrices(), st.integers(1, 9))
def test_compression_and_decomposition_at_the_same_caps_obey_the_same_bounds(drawn, cap):
    matrix, *dims = drawn
    shape, truncation = SiteShape(*dims), Truncation(max_bond=cap)
    full = MPO.from_matrix(torch.from_numpy(matrix), shape)
    values = unfolding_spectra(pad(matrix, *dims), *dims)
    tails = [np.linalg.norm(sigma[cap:]) for sigma in values]
    bonds = shape.capped_bond_dims(cap)
    slack = 1e-10 * np.linalg.norm(matrix)
    for mpo, error in (compress(full, truncation), decompose(torch.from_numpy(matrix), shape, truncation)):
        assert max(tails) - slack <= error.absolute <= np.linalg.norm(tails) + slack
        lower, upper = error_bounds(bond_spectra(full), bonds)
        assert lower - slack <= error.absolute <= upper + slack
        assert all(a <= b for a, b in zip(mpo.bond_dims, bonds, strict=True))


@LAW
@given(random_mpos(), st.floats(0.0, 0.99))
@example(LOW_RANK, 0.5)
def test_compression_stays_within_its_tolerance(mpo, tolerance):
    small, error = compress(mpo, Truncation(rel_tol=tolerance))
    assert distance(to_dense(small.cores), to_dense(mpo.cores)) <= tolerance * (1 + 1e-9) + 1e-13
    assert error.relative <= tolerance * (1 + 1e-9)
    share = tolerance**2 * error.norm_squared / (len(mpo.cores) - 1)
    assert max(error.discarded_weight) <= share * (1 + 1e-9) + 1e-26 * error.norm_squared


@LAW
@given(random_mpos(max_bond=3))
@example(LOW_RANK)
@example(ZERO_BLOCK)
def test_compression_with_a_small_tolerance_finds_the_ranks(mpo):
    matrix = to_dense(mpo.cores).numpy()
    if np.any(matrix):
        dims = mpo.site_shape.out_dims, mpo.site_shape.in_dims
        assert compress(mpo, Truncation(rel_tol=1e-6))[0].bond_dims == ranks(matrix, *dims)


def test_compression_with_a_tolerance_shrinks_the_zero_matrix_to_bond_one():
    assert compress(ZERO, Truncation(rel_tol=0.1))[0].bond_dims == (1, 1, 1, 1)


@LAW
@given(capped_sites())
@example(((2, 2, 2, 2, 2), (2, 2, 2, 2, 2), (4, 16, 1, 4)))
def test_compressed_bonds_capped_one_by_one_are_the_predicted_ones(sites):
    *dims, caps = sites
    shape = SiteShape(*dims)
    small, _ = compress(mpo_of(gaussian(*shape.padded_shape), *dims), Truncation(max_bond=caps))
    assert small.bond_dims == shape.capped_bond_dims(caps)


@LAW
@given(random_mpos())
@example(ZERO_BLOCK)
@example(LOW_RANK)
@example(ONE_BY_ONE)
def test_symmetric_gauge_keeps_the_matrix_and_gives_both_neighbours_the_root_of_the_spectrum(mpo):
    gauged = symmetric_gauge(mpo)
    cores, matrix = to_numpy(gauged.cores), to_dense(mpo.cores).numpy()
    assert gauged.shape == mpo.shape
    assert distance(to_dense(gauged.cores), matrix) < 1e-13
    values = unfolding_spectra(matrix, mpo.site_shape.out_dims, mpo.site_shape.in_dims)
    for bond, sigma in enumerate(values, start=1):
        spectrum = np.zeros(gauged.bond_dims[bond])
        spectrum[: min(len(sigma), len(spectrum))] = sigma[: len(spectrum)]
        left, right = left_part(cores, bond), right_part(cores, bond)
        # Two canonical parts with √Λ each: Gram matrices diag(Λ) on both sides.
        assert np.abs(left.T @ left - np.diag(spectrum)).max() < 1e-12 * spectrum[0] + 1e-300
        assert np.abs(right @ right.T - np.diag(spectrum)).max() < 1e-12 * spectrum[0] + 1e-300


def test_symmetric_gauge_keeps_singular_values_down_to_round_off():
    left, _ = np.linalg.qr(gaussian(12, 12, seed=1))
    right, _ = np.linalg.qr(gaussian(12, 12, seed=2))
    matrix = left * 10.0 ** -np.arange(12) @ right.T
    gauged = symmetric_gauge(mpo_of(matrix, (12, 1), (1, 12)))
    assert distance(gauged.to_matrix(), matrix) < 1e-14
    assert (gauged.cores[1].flatten(1).norm(dim=1) > 0).all()


@DEGENERATE
@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_symmetric_gauge_of_a_degenerate_matrix_is_finite(mpo, scale):
    scaled = MPO((mpo.cores[0] * scale, *mpo.cores[1:]), mpo.shape)
    gauged = symmetric_gauge(scaled)
    assert all(torch.isfinite(core).all() for core in gauged.cores)
    assert distance(to_dense(gauged.cores), to_dense(scaled.cores)) < 1e-13


def test_gauges_leave_the_mpo_that_came_in_alone():
    before = [core.clone() for core in ZERO_BLOCK.cores]
    canonicalize(ZERO_BLOCK, 0)
    compress(ZERO_BLOCK, Truncation(max_bond=2))
    symmetric_gauge(ZERO_BLOCK)
    assert all(torch.equal(core, old) for core, old in zip(ZERO_BLOCK.cores, before, strict=True))

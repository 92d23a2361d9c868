"""One bond cut by projectors: the best approximation in any gauge, a bound that holds, two cores touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpocli.errors import InputError
from mpocli.mpo import MPO, SiteShape, bond_spectra, cut_bond, inner_bonds_of_centre

SITES = SiteShape((3, 2, 4, 2), (2, 3, 2, 3))


def trained_looking(seed: int = 0, dtype: torch.dtype = torch.float64) -> MPO:
    """An MPO far from any canonical form, as training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(48, 36, generator=generator, dtype=torch.float64)
    mpo = MPO.from_matrix(matrix, SITES)
    cores = [core + 0.3 * torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in mpo.cores]
    return MPO(tuple(core.to(dtype) for core in cores), mpo.shape)


def unfolding(matrix: np.ndarray, sites: SiteShape, bond: int) -> np.ndarray:
    """Rows (o_1 i_1 … o_k i_k), columns the rest; by plain numpy."""
    n = sites.sites
    tensor = matrix.reshape(*sites.out_dims, *sites.in_dims)
    left = [axis for k in range(bond) for axis in (k, n + k)]
    right = [axis for k in range(bond, n) for axis in (k, n + k)]
    rows = int(np.prod([tensor.shape[axis] for axis in left]))
    return tensor.transpose(left + right).reshape(rows, -1)


@pytest.mark.parametrize("bond", [1, 2, 3])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_is_the_best_approximation_of_its_unfolding_in_any_gauge(bond: int, share: float) -> None:
    """Eckart and Young on the matrix that numpy unfolds."""
    mpo = trained_looking()
    kept = max(1, int(share * mpo.bond_dims[bond]))
    after, cut = cut_bond(mpo, bond, kept)
    before = mpo.to_matrix().numpy()
    values = np.linalg.svd(unfolding(before, SITES, bond), compute_uv=False)
    best = np.sqrt((values[kept:] ** 2).sum())
    error = np.linalg.norm(before - after.to_matrix().numpy())
    assert abs(error - best) <= 1e-10 * np.linalg.norm(before)
    assert abs(cut.error_bound - best) <= 1e-9 * np.linalg.norm(before)
    assert after.bond_dims[bond] == kept == cut.after and cut.before == mpo.bond_dims[bond]


@pytest.mark.parametrize("bond", [1, 2, 3])
def test_only_the_two_cores_that_meet_there_change_and_by_the_projectors(bond: int) -> None:
    mpo = trained_looking(1)
    after, cut = cut_bond(mpo, bond, mpo.bond_dims[bond] - 2)
    for k, (old, new) in enumerate(zip(mpo.cores, after.cores, strict=True)):
        if k == bond - 1:
            assert torch.allclose(new, torch.einsum("aoib,bc->aoic", old, cut.left), atol=1e-12)
        elif k == bond:
            assert torch.allclose(new, torch.einsum("ab,boic->aoic", cut.right, old), atol=1e-12)
        else:
            assert new is old
    identity = torch.eye(cut.after, dtype=torch.float64)
    assert torch.allclose(cut.right @ cut.left, identity, atol=1e-10)
    assert torch.allclose(cut.left.T @ cut.left, identity, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("seed", range(8))
def test_the_bound_is_never_below_the_error_of_what_is_stored(dtype: torch.dtype, seed: int) -> None:
    mpo = trained_looking(seed, dtype)
    before = mpo.to(dtype=torch.float64).to_matrix()
    for bond in (1, 2, 3):
        for kept in (1, mpo.bond_dims[bond] // 2, mpo.bond_dims[bond] - 1, mpo.bond_dims[bond]):
            after, cut = cut_bond(mpo, bond, kept)
            assert {core.dtype for core in after.cores} == {dtype}
            error = float(torch.linalg.norm(before - after.to(dtype=torch.float64).to_matrix()))
            assert error <= cut.error_bound
            # And no empty promise: rounding adds what the dtype's precision explains.
            slack = 200 * torch.finfo(dtype).eps * float(torch.linalg.norm(before))
            assert cut.error_bound <= error + slack


def test_a_canonical_mpo_keeps_its_gauge() -> None:
    """Left-canonical before the centre: A P has orthonormal columns again, and no number grows."""
    generator = torch.Generator().manual_seed(3)
    mpo = MPO.from_matrix(torch.randn(48, 36, generator=generator, dtype=torch.float64), SITES)
    left, right = inner_bonds_of_centre(mpo.central, 4)
    after, _ = cut_bond(mpo, left, mpo.bond_dims[left] - 2)
    flat = after.cores[left - 1].reshape(-1, after.bond_dims[left])
    assert torch.allclose(flat.T @ flat, torch.eye(flat.shape[1], dtype=torch.float64), atol=1e-12)
    after, _ = cut_bond(mpo, right, mpo.bond_dims[right] - 2)
    flat = after.cores[right].reshape(after.bond_dims[right], -1)
    assert torch.allclose(flat @ flat.T, torch.eye(flat.shape[0], dtype=torch.float64), atol=1e-12)


def test_what_carries_nothing_goes_along() -> None:
    """A bond of 6 with a rank of 2, in float64: asked for 5, it is cut to 2 and loses nothing."""
    generator = torch.Generator().manual_seed(4)
    narrow = MPO.from_matrix(torch.randn(48, 36, generator=generator, dtype=torch.float64), SITES)
    narrow, _ = cut_bond(narrow, 2, 2)
    mixing = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    cores = list(narrow.cores)
    cores[1] = torch.tensordot(cores[1], mixing, 1)
    cores[2] = torch.tensordot(torch.linalg.pinv(mixing), cores[2], 1)
    wide = MPO(tuple(cores), narrow.shape)
    assert wide.bond_dims[2] == 6
    after, cut = cut_bond(wide, 2, 5)
    assert cut.after == 2
    assert torch.allclose(after.to_matrix(), narrow.to_matrix(), atol=1e-12)


def test_the_zero_matrix_keeps_one_dimension_and_stays_zero() -> None:
    mpo = MPO.from_matrix(torch.zeros(48, 36), SITES)
    for cores in (mpo.cores, (torch.ones_like(mpo.cores[0]), *mpo.cores[1:])):
        after, cut = cut_bond(MPO(tuple(cores), mpo.shape), 1, 1)
        assert cut.after == 1 and not after.to_matrix().any() and cut.error_bound == 0


@pytest.mark.parametrize(("bond", "kept"), [(0, 1), (4, 1), (1, 0), (1, 7), (-1, 1)])
def test_a_bond_or_width_that_is_not_there_is_refused(bond: int, kept: int) -> None:
    with pytest.raises(InputError, match="cannot be cut"):
        cut_bond(trained_looking(), bond, kept)


def test_the_spectra_rank_what_the_cut_then_loses() -> None:
    mpo = trained_looking(5)
    for bond, values in enumerate(bond_spectra(mpo), start=1):
        kept = mpo.bond_dims[bond] - 1
        _, cut = cut_bond(mpo, bond, kept)
        assert abs(cut.error_bound - float(values[kept:].norm())) <= 1e-9 * float(values.norm())

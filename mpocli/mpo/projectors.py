"""Shrink one bond of an MPO by a pair of projectors, touching the two cores that meet there and no other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpocli.errors import InputError
from mpocli.mpo.linalg import working_dtype
from mpocli.mpo.mpo import MPO


@dataclass(frozen=True, eq=False)
class BondCut:
    """Inner bond `bond` (1 … n−1) of an MPO cut from `before` to `after`.

    `left` = P (before × after) goes into the core on the left, A → A P, and `right` = Q (after × before) into the
    one on the right, B → Q B, with Q P = 1: gradients follow as g_A Qᵀ and Pᵀ g_B. `error_bound` ≥ ‖W−Ŵ‖_F of this
    cut with the cores as they are stored.
    """

    bond: int
    before: int
    after: int
    left: Tensor
    right: Tensor
    error_bound: float


def cut_bond(mpo: MPO, bond: int, kept: int) -> tuple[MPO, BondCut]:
    """The best approximation of the whole matrix with `kept` dimensions in one bond, and the projectors that make it.

    With X and Y all that is left and right of the bond, X = Q_x R_x and Y = R_y Q_y, and R_x R_y = U Σ Vᵀ cut to r:
    P = R_y V Σ⁻¹ T⁻¹ and Q = T Uᵀ R_x, where T makes the columns of P orthonormal, so that the gauge of a canonical
    MPO stays as it is. X P Q Y is then the best rank-r approximation of X Y, ‖W−Ŵ‖_F² = Σ_{j>r} σ_j² (MPOP, ACL 2021,
    Eq. 4 with one bond cut). Directions at round-off level are dropped with the others.

    The gauge may be any: trained cores need not be made canonical. Computes in float64 and returns cores of the
    MPO's own dtype. Raises `InputError` for a bond or a width that this MPO does not have.
    """
    before = mpo.bond_dims[bond] if 0 < bond < len(mpo.cores) else 0
    if not 1 <= kept <= before:
        raise InputError(f"bond {bond} of an MPO with bonds {mpo.bond_dims} cannot be cut to {kept}")
    wide = working_dtype(mpo.cores[0].device)
    cores = [core.to(wide) for core in mpo.cores]
    outer_x, outer_y = _left_factor(cores[: bond - 1]), _right_factor(cores[bond + 1 :])
    r_x, r_y = _absorb_left(outer_x, cores[bond - 1]), _absorb_right(cores[bond], outer_y)
    u, sigma, vh = torch.linalg.svd(r_x @ r_y, full_matrices=False)
    floor = torch.finfo(wide).eps * before * float(sigma[0])
    rank = min(kept, int((sigma > floor).sum()))
    if rank == 0:  # W = 0: any direction may stay, as long as it carries nothing
        left = torch.eye(before, 1, dtype=wide, device=r_x.device)
        right = torch.zeros(1, before, dtype=wide, device=r_x.device)
        rank = 1
    else:
        left, gauge = torch.linalg.qr(r_y @ vh[:rank].T / sigma[:rank])
        signs = gauge.diagonal().sign()
        left, gauge = left * signs, gauge * signs[:, None]
        right = gauge @ u[:, :rank].T @ r_x
    new_a, new_b = torch.tensordot(cores[bond - 1], left, 1), torch.tensordot(right, cores[bond], 1)
    stored = mpo.cores[0].dtype
    kept_a, kept_b = new_a.to(stored).contiguous(), new_b.to(stored).contiguous()
    # What rounding the two cores adds, by submultiplicativity.
    slip_a = _spectral(outer_x) * float(torch.linalg.vector_norm(kept_a.to(wide) - new_a))
    slip_b = float(torch.linalg.vector_norm(kept_b.to(wide) - new_b)) * _spectral(outer_y)
    dropped = float(torch.linalg.vector_norm(sigma[rank:]))
    round_off = 64 * torch.finfo(wide).eps * float(torch.linalg.vector_norm(sigma))
    bound = dropped + slip_a * _spectral(right @ r_y) + _spectral(r_x @ left) * slip_b + slip_a * slip_b + round_off
    changed = list(mpo.cores)
    changed[bond - 1], changed[bond] = kept_a, kept_b
    cut = BondCut(bond, before, rank, left, right, bound)
    return replace(mpo, cores=tuple(changed), center=None), cut


def inner_bonds_of_centre(central: int, sites: int) -> tuple[int, ...]:
    """The inner bonds next to the central core: two of them, or one where it stands at an end.

    >>> inner_bonds_of_centre(2, 5), inner_bonds_of_centre(0, 2)
    ((2, 3), (1,))
    """
    return tuple(bond for bond in (central, central + 1) if 0 < bond < sites)


def _left_factor(cores: list[Tensor]) -> Tensor:
    """R (k, χ) with X = Q R, Q orthonormal, for all that the cores are to the left of the bond behind them."""
    factor = cores[0].new_ones(1, 1) if cores else torch.ones(1, 1, dtype=torch.float64)
    for core in cores:
        factor = _absorb_left(factor, core)
    return factor


def _absorb_left(factor: Tensor, core: Tensor) -> Tensor:
    joined = torch.tensordot(factor.to(core), core, 1)
    r: Tensor = torch.linalg.qr(joined.reshape(-1, core.shape[3]), mode="r").R
    return r


def _right_factor(cores: list[Tensor]) -> Tensor:
    """R (χ, k) with Y = R Q, Q orthonormal, for all that the cores are to the right of the bond before them."""
    factor = cores[0].new_ones(1, 1) if cores else torch.ones(1, 1, dtype=torch.float64)
    for core in reversed(cores):
        factor = _absorb_right(core, factor)
    return factor


def _absorb_right(core: Tensor, factor: Tensor) -> Tensor:
    joined = torch.tensordot(core, factor.to(core), 1)
    r: Tensor = torch.linalg.qr(joined.reshape(core.shape[0], -1).T, mode="r").R
    return r.T


def _spectral(matrix: Tensor) -> float:
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    return largest if math.isfinite(largest) else float(torch.linalg.matrix_norm(matrix))

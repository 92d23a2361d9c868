"""What the bonds of an MPO carry: singular values, entanglement entropy, and the error bounds they give."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpocli.mpo.canonical import canonicalize
from mpocli.mpo.linalg import left_split
from mpocli.mpo.mpo import MPO


def norm_squared(mpo: MPO) -> float:
    """‖Ŵ‖_F² of the padded matrix, from the cores alone: E_k+1 = Σ_{o,i} A_kᵀ E_k A_k, (χ, χ) each.

    >>> from mpocli.mpo.shape import SiteShape
    >>> round(norm_squared(MPO.from_matrix(2 * torch.eye(4), SiteShape((2, 2), (2, 2)))), 9)
    16.0
    """
    inner = torch.ones(1, 1, dtype=torch.float64)
    for core in mpo.cores:
        core = core.to(device="cpu", dtype=torch.float64)
        # (χ, χ') · (χ', o, i, b') → (χ, o, i, b'); then over (χ, o, i) with the core itself
        half = torch.tensordot(inner, core, 1)
        inner = torch.tensordot(core, half, ([0, 1, 2], [0, 1, 2]))
    return float(inner)


def bond_spectra(mpo: MPO) -> list[Tensor]:
    """Singular values of every inner bond, largest first: n−1 vectors.

    Those of bond k are the singular values of the unfolding (o_1 i_1 … o_k i_k) × (the rest), read off an MPO
    that is first brought to canonical form, since cores that were trained are no longer canonical.
    """
    cores = list(canonicalize(mpo, 0).cores)
    spectra = []
    for k in range(len(cores) - 1):
        _, rest, weights = left_split(cores[k].reshape(-1, cores[k].shape[3]))
        spectra.append(weights.sqrt().sort(descending=True).values)
        cores[k + 1] = torch.tensordot(rest, cores[k + 1], 1)
    return spectra


def entropy_nats(singular_values: Tensor) -> float:
    """Entanglement entropy S = −Σ p ln p, p = σ²/Σσ², in nats: 0 for a product, ln χ for a flat spectrum.

    >>> round(entropy_nats(torch.ones(4)), 6) == round(math.log(4), 6)
    True
    """
    weights = singular_values.double().square()
    total = float(weights.sum())
    if total == 0.0:
        return 0.0
    p = weights / total
    return float(torch.special.entr(p).sum())


def error_bounds(spectra: Sequence[Tensor], bond_dims: Sequence[int]) -> tuple[float, float]:
    """Bounds on ‖W−Ŵ‖_F of a truncating sweep to `bond_dims` (n+1 numbers), from the spectra alone.

    max_k ε_k ≤ ‖W−Ŵ‖_F ≤ sqrt(Σ_k ε_k²), ε_k² = Σ_{j>d_k} σ_{k,j}² (MPOP, ACL 2021, Eq. 4 and appendix; Eq. 3
    prints ε_k as a plain sum, which is no bound of useful size).
    """
    squares = [
        float(values[bond:].double().square().sum()) for values, bond in zip(spectra, bond_dims[1:-1], strict=True)
    ]
    return math.sqrt(max(squares)), math.sqrt(sum(squares))

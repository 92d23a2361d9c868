"""Gauges of an MPO: canonical around any core, truncated from there, or symmetric."""

from __future__ import annotations

import torch

from mpocli.mpo.chain import canonical, trimmed
from mpocli.mpo.linalg import left_split, working_dtype
from mpocli.mpo.mpo import MPO
from mpocli.mpo.truncation import Truncation, TruncationError, choose_bond


def canonicalize(mpo: MPO, center: int | None = None) -> MPO:
    """The same matrix, left-canonical before `center` (default: the central core), right-canonical after it.

    QR sweeps from both ends in float64; bond dimensions shrink only where a bond exceeded what its neighbours
    can carry. Left-canonical means Σ_{a,o,i} A[a,o,i,b] A[a,o,i,b'] = δ_bb'.
    """
    center = mpo.central if center is None else center
    return MPO(canonical(mpo.cores, center), mpo.shape, center)


def canonical_defect(mpo: MPO) -> float:
    """Largest |AᵀA − 1| over the cores that `center` claims to be canonical, 0 without a claim."""
    if mpo.center is None:
        return 0.0
    worst = 0.0
    for k, core in enumerate(mpo.cores):
        if k == mpo.center:
            continue
        core = core.to(working_dtype(core.device))
        flat = core.reshape(-1, core.shape[3]) if k < mpo.center else core.reshape(core.shape[0], -1).T
        gram = flat.T @ flat
        worst = max(worst, float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()))
    return worst


def compress(mpo: MPO, truncation: Truncation) -> tuple[MPO, TruncationError]:
    """Truncate an MPO without building its matrix; the result is canonical around its central core.

    The error is measured against the MPO that came in; its squares add up exactly as in `decompose`.
    """
    start = canonicalize(mpo, 0)
    cores = list(start.cores)
    norm_squared = float(torch.linalg.vector_norm(cores[0])) ** 2
    n = len(cores)
    allowance = truncation.allowance(norm_squared, n - 1)
    caps = truncation.caps(mpo.site_shape)
    discarded = []
    for k in range(n - 1):
        bond, out, in_, _ = cores[k].shape
        basis, rest, weights = left_split(cores[k].reshape(bond * out * in_, -1))
        kept, lost = choose_bond(weights, caps[k + 1], allowance)
        discarded.append(lost)
        cores[k] = basis[:, :kept].reshape(bond, out, in_, kept)
        cores[k + 1] = torch.tensordot(rest[:kept], cores[k + 1], 1)
    truncated = trimmed(canonical(cores, mpo.central))
    return MPO(truncated, mpo.shape, mpo.central), TruncationError(tuple(discarded), norm_squared)


def symmetric_gauge(mpo: MPO) -> MPO:
    """The same matrix with √Λ of every bond spectrum Λ on both of its sides (the papers' released gauge).

    From the left-canonical cores A_k in the Schmidt basis, S_k = Λ_{k−1}^{−1/2} A_k Λ_k^{1/2}. Singular values
    at round-off level count as zero and their inverse too, so that rank-deficient matrices stay finite (the
    released code divides by them); their directions carry nothing in either form.
    """
    cores = list(canonicalize(mpo, 0).cores)
    previous = torch.ones(1, dtype=cores[0].dtype, device=cores[0].device)
    for k, core in enumerate(cores):
        bond, out, in_, _ = core.shape
        if k + 1 < len(cores):
            u, s, vh = torch.linalg.svd(core.reshape(bond * out * in_, -1), full_matrices=False)
            cores[k + 1] = torch.tensordot(s[:, None] * vh, cores[k + 1], 1)
            core = u.reshape(bond, out, in_, -1) * s.sqrt()
        else:
            s = previous
        floor = torch.finfo(core.dtype).eps * max(core.shape[0], core.shape[3]) * previous.max()
        inverse_root = torch.where(previous > floor, previous.clamp_min(floor).rsqrt(), 0.0)
        cores[k] = inverse_root[:, None, None, None] * core
        previous = s
    return MPO(tuple(core.contiguous() for core in cores), mpo.shape)

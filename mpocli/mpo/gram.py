"""Second moments of a layer's inputs as a norm: made safe to use, and its square root.

A Gram matrix G = XᵀX/tokens (I, I) measures the error of an approximation by what it does to the outputs,
‖(W−Ŵ)Xᵀ‖²_F/tokens = tr((W−Ŵ) G (W−Ŵ)ᵀ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpocli.errors import NumericsError
from mpocli.mpo.linalg import check_finite, eigen, working_dtype

# No direction counts for less than this part of the mean: errors there stay bounded, and roots can be inverted.
FLOOR = 1e-6


def regularised(gram: Tensor, tokens: int, *, least: float = FLOOR, name: str = "inputs") -> Tensor:
    """The Gram matrix XᵀX (I, I) of `tokens` inputs, divided by them and shrunk towards a multiple of the identity.

    G = (1−ρ) S + ρ tr(S)/I · 1 with S = XᵀX/tokens and ρ of the oracle-approximating shrinkage (Chen, Wiesel,
    Eldar and Hero 2010, Eq. 23),
        ρ = min(1, ((1−2/I) tr S² + tr² S) / ((tokens+1−2/I) (tr S² − tr² S / I))),
    and no less than `least`. With many tokens it is S but for round-off; with fewer tokens than inputs, directions that
    no token has shown keep a weight, so that an approximation cannot blow up there. The optimum is derived for
    independent Gaussian inputs; tokens of one text are neither, which makes ρ too small rather than too large.

    Computes in float64. All-zero inputs give the identity: nothing is known then. Raises `InputError` for a matrix
    that is not finite.

    >>> regularised(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), tokens=1)
    tensor([[2., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    check_finite(gram, f"{name}: second moments")
    wide = gram.to(working_dtype(gram.device))
    second = (wide + wide.T).div_(2 * max(tokens, 1))
    size = len(second)
    trace = float(second.trace())
    if trace <= 0.0:
        return torch.eye(size, dtype=second.dtype, device=second.device)
    mean = trace / size
    squared = float(torch.linalg.vector_norm(second)) ** 2
    spread = squared - trace**2 / size
    numerator = (1 - 2 / size) * squared + trace**2
    denominator = (tokens + 1 - 2 / size) * spread
    rho = 1.0 if denominator <= numerator else numerator / denominator
    rho = max(rho, least)
    second.mul_(1 - rho).diagonal().add_(rho * mean)
    return second


def factor(gram: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """R with Rᵀ R = G, and R⁻¹: of a Cholesky factor where that is known to be safe, else the `roots`.

    With G = L Lᵀ, 1/‖L⁻¹‖²_F = 1/tr G⁻¹ is a lower bound of the smallest eigenvalue. Where it is above `floor` times
    the mean, no root had to be raised, and R = Lᵀ does what S does, for much less.

    >>> factor(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))[0]
    tensor([[2., 1.],
            [0., 1.]])
    """
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not int(failed):
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        if 1 / float(inverse.square().sum()) >= floor * float(gram.diagonal().mean()):
            return lower.T, inverse.T
    return roots(gram, floor)


def roots(gram: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """S = G^{1/2} and S⁻¹, symmetric, by eigenvectors; eigenvalues below `floor` times the mean are raised to it.

    Never fails where a Cholesky factor would: a Gram matrix that is singular, or by round-off not even positive
    semi-definite, has roots all the same. Raises `NumericsError` where LAPACK does not converge.

    >>> root, inverse = roots(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), floor=0.5)
    >>> root.diagonal(), inverse.diagonal()
    (tensor([2., 1.]), tensor([0.5000, 1.0000]))
    """
    values, vectors = eigen(gram)
    mean = float(values.clamp_min(0).mean())
    if mean == 0.0:
        raise NumericsError("a Gram matrix of zeros has no inverse root", hint="calibrate on more text")
    values = values.clamp_min(floor * mean).sqrt()
    # Round-off of the two products is not symmetric.
    root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    return (root + root.T) / 2, (inverse + inverse.T) / 2


def inverse_root(gram: Tensor, dampings: Sequence[float], *, hint: str) -> Tensor:
    """Upper triangular U with UᵀU = H⁻¹, H the damped Gram matrix with its live diagonal scaled to a mean of 1.

    U_jj² is [H⁻¹]_jj of the columns from j on, and U_j: / U_jj the row of that inverse over its diagonal. With
    J H J = L Lᵀ, J the reversal, U = J L⁻¹ J: one factorisation, and H⁻¹ itself is never formed. The first of the
    `dampings`, which are added to the diagonal, that makes H positive definite is taken; an input that was always zero
    has a 1 there. Raises `NumericsError` where none does, with `hint` for what else could be tried.

    >>> inverse_root(torch.tensor([[1.6, 0.0], [0.0, 0.4]], dtype=torch.float64), (0.0,), hint="")
    tensor([[0.7906, 0.0000],
            [0.0000, 1.5811]], dtype=torch.float64)
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    scale = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    reverse = (gram / scale).flip(0, 1)
    reverse.diagonal()[dead.flip(0)] = 1.0
    for damping in dampings:
        damped = reverse.clone()
        damped.diagonal().add_(damping)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
            return inverse.flip(0, 1)
    raise NumericsError(
        f"the Gram matrix of {len(gram)} inputs is not positive definite, not even with {dampings[-1]:g} of its mean "
        "diagonal added",
        hint=f"calibrate on more tokens, or {hint}",
    )

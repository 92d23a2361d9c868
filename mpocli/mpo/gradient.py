"""What a gradient of the matrix, or any statistic that follows it, is for the cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpocli.mpo.chain import by_site
from mpocli.mpo.linalg import working_dtype
from mpocli.mpo.shape import SiteShape


def core_gradients(cores: Sequence[Tensor], matrix: Tensor, *, squared: bool = False) -> list[Tensor]:
    """Σ_ij (∂W_ij/∂A_k) G_ij for every core A_k of W: its gradient, where G (O×I) is the matrix's.

    With X_k and Y_k all that is left and right of core k, ∂W/∂A_k = X_k ⊗ Y_k. `squared` contracts with the squares
    of these derivatives instead: what second moments of G become if its elements are uncorrelated. Results have
    the cores' shapes, in float64.
    """
    wide = working_dtype(matrix.device)
    sites = SiteShape(tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores))
    flat = by_site(matrix, sites)
    left = [torch.ones(1, 1, dtype=wide, device=matrix.device)]  # (Π sites before k, χ)
    for core in cores[:-1]:
        left.append(torch.tensordot(left[-1], core.to(wide), 1).reshape(-1, core.shape[3]))
    right = [left[0]]  # (χ, Π sites after k), last first
    for core in reversed(cores[1:]):
        right.append(torch.tensordot(core.to(wide), right[-1], 1).reshape(core.shape[0], -1))
    gradients = []
    for k, core in enumerate(cores):
        x, y = left[k], right[len(cores) - 1 - k]
        if squared:
            x, y = x.square(), y.square()
        middle = x.T @ flat.reshape(x.shape[0], -1)  # (χ_k, o_k i_k Π after)
        gradients.append((middle.reshape(-1, y.shape[1]) @ y.T).reshape(core.shape))
    return gradients

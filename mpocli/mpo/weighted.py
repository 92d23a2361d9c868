"""The best low-rank approximation of a matrix in the norm of its inputs: the truncated SVD as a two-site MPO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpocli.mpo.gram import factor
from mpocli.mpo.linalg import eigen, eigenvalues, working_dtype
from mpocli.mpo.mpo import MPO
from mpocli.mpo.shape import SiteShape


def weighted_square(difference: Tensor, gram: Tensor | None, output: Tensor | None = None) -> float:
    """tr(H D G Dᵀ) of a difference D (O, I); a matrix that is None is the identity.

    >>> import torch
    >>> weighted_square(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    6.0
    """
    right = difference if gram is None else difference @ gram
    return float((difference * (right if output is None else output @ right)).sum(dtype=working_dtype(right.device)))


def svd_shape(rows: int, columns: int) -> SiteShape:
    """The truncated SVD W ≈ U V as an MPO: U (O, r) is the first core, V (r, I) the second.

    >>> str(svd_shape(768, 3072))
    '768,1x1,3072'
    """
    return SiteShape((rows, 1), (1, columns))


@dataclass(frozen=True, eq=False)
class _Whitened:
    """R W or R Wᵀ (q, N), whichever has fewer rows, R a root of the norm on that side, and A = R W G Wᵀ Rᵀ (q, q)."""

    scaled: Tensor
    square: Tensor
    inverse: Tensor | None  # of R, None for the identity
    by_outputs: bool

    @classmethod
    def of(cls, matrix: Tensor, gram: Tensor | None, output: Tensor | None) -> _Whitened:
        wide = matrix.to(working_dtype(matrix.device))
        by_outputs = wide.shape[0] <= wide.shape[1]
        own, other = (output, gram) if by_outputs else (gram, output)
        small = wide if by_outputs else wide.T  # (q, N)
        root, inverse = factor(own) if own is not None else (None, None)
        scaled = small if root is None else root @ small
        square = (scaled if other is None else scaled @ other) @ scaled.T
        return cls(scaled, square, inverse, by_outputs)


def spectrum(matrix: Tensor, gram: Tensor | None = None, output: Tensor | None = None) -> Tensor:
    """The `weights` of `WeightedSVD.of`, without its vectors: less than half the time.

    >>> import torch
    >>> spectrum(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([9., 1.], dtype=torch.float64)
    """
    return eigenvalues(_Whitened.of(matrix, gram, output).square).flip(0).clamp_min(0)


@dataclass(frozen=True, eq=False)
class WeightedSVD:
    """The best approximations of W (O, I) of every rank in the norm tr(H D G Dᵀ).

    `weights` are σ² of H^{1/2} W G^{1/2}, largest first: rank r leaves Σ_{j≥r} σ_j² of their sum. The first r columns
    of `left` (O, q) times the first r rows of `right` (q, I) are the approximation.
    """

    weights: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor, gram: Tensor | None = None, output: Tensor | None = None) -> WeightedSVD:
        """Of W (O, I) with the Gram matrix G (I, I) of its inputs and the weights H (O, O) of its outputs.

        None is the identity: with neither it is the plain truncated SVD. The closed form of SVD-LLM (Wang et al., ICLR
        2025, §3.1), Ŵ = H^{−1/2} (H^{1/2} W G^{1/2})_r G^{−1/2}, by eigenvectors of the smaller side: with the left
        ones U, Ŵ = H^{−1/2} U_r U_rᵀ H^{1/2} W, and with the right ones V, Ŵ = W G^{1/2} V_r V_rᵀ G^{−1/2}, so that
        only the smaller of G and H needs a root (any R with Rᵀ R = H does: `gram.factor`). Computes in float64.
        """
        problem = _Whitened.of(matrix, gram, output)
        values, vectors = eigen(problem.square)
        basis = vectors.flip(1)
        outer = basis if problem.inverse is None else problem.inverse @ basis  # (q, q)
        inner = basis.T @ problem.scaled  # (q, N)
        weights = values.flip(0).clamp_min(0)
        return cls(weights, outer, inner) if problem.by_outputs else cls(weights, inner.T, outer.T)

    @property
    def total(self) -> float:
        """tr(H W G Wᵀ)."""
        return float(self.weights.sum())

    def lost(self, rank: int) -> float:
        """tr(H D G Dᵀ) of the best approximation of this rank, from the spectrum."""
        return float(self.weights[rank:].sum())

    def mpo(self, rank: int) -> MPO:
        """The best approximation of this rank as an MPO of the shape (O, 1)x(1, I)."""
        rank = max(1, min(rank, len(self.weights)))
        rows, columns = self.left.shape[0], self.right.shape[1]
        first = self.left[:, :rank].reshape(1, rows, 1, rank)
        second = self.right[:rank].reshape(rank, 1, columns, 1)
        return MPO((first.contiguous(), second.contiguous()), (rows, columns))

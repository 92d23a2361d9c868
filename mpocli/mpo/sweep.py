"""Weighted alternating least squares: fit the cores of an MPO in the norm of a layer's inputs, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mpocli.errors import NumericsError
from mpocli.mpo.canonical import canonicalize
from mpocli.mpo.contract import to_dense
from mpocli.mpo.linalg import working_dtype
from mpocli.mpo.mpo import MPO

# Normal equations up to this many unknowns are solved by a factorisation, larger ones by conjugate gradients.
DIRECT_UNKNOWNS = 1536
_DIRECT_WORK = 2**27
_CG_STEPS = 4
_CG_TOL = 1e-6  # of the squared residual in the preconditioner's norm
_JITTER = 1e-12


@dataclass(frozen=True, eq=False)
class Fit:
    """An MPO after its sweeps. `errors` are tr((W−Ŵ) G (W−Ŵ)ᵀ) at the start and after every sweep."""

    mpo: MPO
    errors: tuple[float, ...]


def fit(
    matrix: Tensor,
    start: MPO,
    gram: Tensor | None = None,
    output: Tensor | None = None,
    *,
    sweeps: int = 10,
    tol: float = 1e-3,
    give_up: float = math.inf,
) -> Fit:
    """Sweep over the cores of `start`, each made better while the others stay.

    Minimises tr(H (W−Ŵ) G (W−Ŵ)ᵀ). With core k in the centre of the canonical form and E its environment, W ≈ E C
    (one-site DMRG of a quadratic form), the normal equations are Eᵀ (H ⊗ G) E C = Eᵀ (H W G). Without output weights
    they are the same for every o_k, of size χ_{k−1} i_k χ_k, and solved exactly up to `DIRECT_UNKNOWNS`; all others
    by conjugate gradients from the core as it is, preconditioned with that solution and the mean of H over the other
    sites. One sweep goes to the last core and back. Stops after `sweeps`, or as soon as a sweep takes off less than
    `tol` of the error, or after the first core if the error is above `give_up` then. The error never grows: a sweep
    that round-off would let grow is not taken.

    W is (O, I), G (I, I), H (O, O), None the identity, all without padding, which is fitted to zero and not counted;
    computes in float64 and keeps the bond dimensions. Raises `NumericsError` where the equations cannot be solved.
    """
    problem = _Problem.of(matrix, start, gram, output)
    centred = canonicalize(start, 0)
    cores = list(centred.cores)
    errors = [problem.error(cores)]
    best = list(cores)
    for _ in range(sweeps):
        n = len(cores)
        order = [*range(n - 1), *range(n - 1, 0, -1)]
        for position, k in enumerate(order):
            cores[k] = problem.solve(cores, k)
            if k == 0 and len(errors) == 1 and give_up < math.inf and (error := problem.error(cores)) > give_up:
                kept = cores if error < errors[0] else best
                return Fit(canonicalize(MPO(tuple(kept), start.shape)), (errors[0], min(error, errors[0])))
            forward = position < n - 1
            _shift(cores, k, forward=forward)
        # The way back ends at core 0, which the next sweep, or nobody, solves first.
        cores[0] = problem.solve(cores, 0)
        error = problem.error(cores)
        if not error < errors[-1]:
            break
        best = list(cores)
        errors.append(error)
        if errors[-2] - error <= tol * errors[-2]:
            break
    done = MPO(tuple(core.contiguous() for core in best), start.shape)
    return Fit(canonicalize(done), tuple(errors))


def _shift(cores: list[Tensor], k: int, *, forward: bool) -> None:
    """Move the centre from core k to its neighbour, by QR."""
    core = cores[k]
    if forward:
        left, out, in_, right = core.shape
        q, r = torch.linalg.qr(core.reshape(left * out * in_, right))
        if q.shape[1] < right:  # a bond wider than its left side: keep the width, the rest is zero
            q, r = _padded(q, r, right)
        cores[k] = q.reshape(left, out, in_, right)
        cores[k + 1] = torch.tensordot(r, cores[k + 1], 1)
    else:
        left, out, in_, right = core.shape
        q, r = torch.linalg.qr(core.reshape(left, out * in_ * right).T)
        if q.shape[1] < left:
            q, r = _padded(q, r, left)
        cores[k] = q.T.reshape(left, out, in_, right)
        cores[k - 1] = torch.tensordot(cores[k - 1], r.T, 1)


def _padded(q: Tensor, r: Tensor, width: int) -> tuple[Tensor, Tensor]:
    more = width - q.shape[1]
    return torch.nn.functional.pad(q, (0, more)), torch.nn.functional.pad(r, (0, 0, 0, more))


@dataclass(frozen=True, eq=False)
class _Problem:
    """W, G and H padded to the site shape, and the products with them."""

    target: Tensor  # (O, I)
    gram: Tensor | None  # (I, I), None for the identity
    output: Tensor | None  # (O, O), None for the identity
    weighted: Tensor  # H W G
    shape: tuple[int, int]  # without padding

    @classmethod
    def of(cls, matrix: Tensor, start: MPO, gram: Tensor | None, output: Tensor | None) -> _Problem:
        wide = working_dtype(matrix.device)
        rows, columns = start.site_shape.padded_shape
        target = matrix.new_zeros(rows, columns, dtype=wide)
        target[: matrix.shape[0], : matrix.shape[1]] = matrix
        gram, output = _padded_square(gram, columns, wide), _padded_square(output, rows, wide)
        return cls(target, gram, output, _times(output, target, gram), (matrix.shape[0], matrix.shape[1]))

    @cached_property
    def _gram32(self) -> Tensor | None:
        return None if self.gram is None else self.gram.float()

    @cached_property
    def _output32(self) -> Tensor | None:
        return None if self.output is None else self.output.float()

    def error(self, cores: list[Tensor]) -> float:
        rows, columns = self.shape
        difference = self.target - to_dense(cores)
        # Padding costs nothing, with weights or without.
        difference[rows:], difference[:, columns:] = 0.0, 0.0
        return float((difference * _times(self.output, difference, self.gram)).sum())

    def solve(self, cores: list[Tensor], k: int) -> Tensor:
        """The best core k, or a better one where that cannot be had at once."""
        environment = _Environment(cores, k)
        core = cores[k]
        right_side = environment.pull(self.weighted)
        precondition, is_exact = self._preconditioner(environment, core)
        if is_exact:
            return precondition(right_side)

        def apply(x: Tensor) -> Tensor:
            # Most of the work. Steps along directions that single precision has bent are still steps down.
            return environment.pull(_times(self._output32, environment.push(x).float(), self._gram32).to(x))

        x = core.clone()
        residual = right_side - apply(x)
        rest = precondition(residual)
        direction = rest
        norm = first = float((residual * rest).sum())
        for _ in range(_CG_STEPS):
            if not norm > _CG_TOL * first or not math.isfinite(norm):
                break
            applied = apply(direction)
            curvature = float((direction * applied).sum())
            if not curvature > 0.0:
                break
            step = norm / curvature
            x = x + step * direction
            residual = residual - step * applied
            rest = precondition(residual)
            after = float((residual * rest).sum())
            direction = rest + (after / norm) * direction
            norm = after
        return x

    def _preconditioner(self, environment: _Environment, core: Tensor) -> tuple[Callable[[Tensor], Tensor], bool]:
        """The inverse of (mean of H over the other sites) ⊗ (Eᵀ G E), and whether it is that of H ⊗ G."""
        left, out, in_, right = core.shape
        rows = _factored(environment.own_rows(self.output)) if self.output is not None else None
        work = left * right * self.target.numel() // out  # elements that the normal equations pass through
        small = left * in_ * right <= DIRECT_UNKNOWNS and work <= _DIRECT_WORK
        # A preconditioner need not be exact.
        gram = self.gram if rows is None else self._gram32
        columns = _factored(environment.normal(gram).to(core)) if small else None

        def precondition(x: Tensor) -> Tensor:
            if columns is not None:
                # (a, o, i, b) → ((a, i, b), o)
                flat = torch.cholesky_solve(x.permute(0, 2, 3, 1).reshape(-1, out), columns)
                x = flat.reshape(left, in_, right, out).permute(0, 3, 1, 2)
            if rows is not None:
                flat = x.permute(1, 0, 2, 3).reshape(out, -1)
                x = torch.cholesky_solve(flat, rows).reshape(out, left, in_, right).permute(1, 0, 2, 3)
            return x

        return precondition, small and rows is None


def _times(output: Tensor | None, matrix: Tensor, gram: Tensor | None) -> Tensor:
    """H D G."""
    right = matrix if gram is None else matrix @ gram
    return right if output is None else output @ right


def _padded_square(square: Tensor | None, size: int, dtype: torch.dtype) -> Tensor | None:
    if square is None or len(square) == size:
        return None if square is None else square.to(dtype)
    padded = square.new_zeros(size, size, dtype=dtype)
    padded[: len(square), : len(square)] = square
    return padded


def _factored(matrix: Tensor) -> Tensor:
    """A Cholesky factor of a positive semi-definite matrix, with as little added as it takes."""
    matrix = (matrix + matrix.T) / 2
    scale = float(matrix.diagonal().mean())
    jitter = _JITTER
    while jitter < 1.0:
        matrix.diagonal().add_(jitter * scale if scale > 0.0 else 1.0)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor
        jitter *= 100
    raise NumericsError("the normal equations of a core cannot be solved", hint="look for extreme values in the inputs")


class _Environment:
    """All cores but one: Ŵ = Σ L[o_<, i_<, a] C[a, o, i, b] R[b, o_>, i_>]."""

    def __init__(self, cores: list[Tensor], k: int) -> None:
        self.left = _joined_left(cores[:k], cores[k])  # (o_<, i_<, a)
        self.right = _joined_right(cores[k + 1 :], cores[k])  # (b, o_>, i_>)
        self.out, self.in_ = cores[k].shape[1], cores[k].shape[2]

    def push(self, core: Tensor) -> Tensor:
        """The matrix (O, I) with this core in the middle."""
        (ol, il, a), (b, og, ig) = self.left.shape, self.right.shape
        half = self.left.reshape(ol * il, a) @ core.reshape(a, -1)  # (o_< i_<, o i b)
        whole = half.reshape(-1, b) @ self.right.reshape(b, og * ig)  # (o_< i_< o i, o_> i_>)
        whole = whole.reshape(ol, il, self.out, self.in_, og, ig)
        return whole.permute(0, 2, 4, 1, 3, 5).reshape(ol * self.out * og, il * self.in_ * ig)

    def pull(self, matrix: Tensor) -> Tensor:
        """The adjoint of `push`: (O, I) → (a, o, i, b)."""
        (ol, il, a), (b, og, ig) = self.left.shape, self.right.shape
        split = matrix.reshape(ol, self.out, og, il, self.in_, ig).permute(0, 3, 1, 4, 2, 5)
        half = split.reshape(-1, og * ig) @ self.right.reshape(b, og * ig).T  # (o_< i_< o i, b)
        whole = self.left.reshape(ol * il, a).T @ half.reshape(ol * il, -1)
        return whole.reshape(a, self.out, self.in_, b)

    def own_rows(self, output: Tensor) -> Tensor:
        """H (O, O) averaged over the row digits of the other sites: (o, o)."""
        ol, og = self.left.shape[0], self.right.shape[1]
        split = output.reshape(ol, self.out, og, ol, self.out, og)
        mean: Tensor = torch.einsum("pogpqg->oq", split) / (ol * og)
        return mean

    def normal(self, gram: Tensor | None) -> Tensor:
        """Eᵀ G E, of size (a, i, b) squared."""
        (ol, il, a), (b, og, ig) = self.left.shape, self.right.shape
        in_ = self.in_
        if gram is None:
            lefts = self.left.reshape(ol * il, a)
            rights = self.right.reshape(b, og * ig)
            pair = torch.kron(lefts.T @ lefts, rights @ rights.T).reshape(a, b, a, b)
            eye = torch.eye(in_, dtype=pair.dtype, device=pair.device)
            return torch.einsum("abcd,ij->aibcjd", pair, eye).reshape(a * in_ * b, -1)
        # E[(a b), (o_< o_>), (i_< i_>)] of all cores around, in the precision of G
        left, right = self.left.to(gram), self.right.to(gram)
        around = torch.einsum("pxa,bqy->abpqxy", left, right).reshape(a * b, ol * og, il * ig)
        by_site = gram.reshape(il, in_, ig, il, in_, ig).permute(1, 0, 2, 4, 3, 5)
        by_site = by_site.reshape(in_, il * ig, in_, il * ig)  # (i, rest, i', rest')
        result = gram.new_empty(in_, a * b, in_, a * b)
        flat = around.reshape(a * b * ol * og, il * ig)
        last = around.reshape(a * b, -1).T  # ((o rest'), a'b')
        for i in range(in_):  # one i at a time bounds the memory
            half = flat @ by_site[i].reshape(il * ig, -1)  # (ab o, i' rest')
            half = half.reshape(a * b, ol * og, in_, il * ig).transpose(1, 2)  # (ab, i', o, rest')
            result[i] = (half.reshape(a * b * in_, -1) @ last).reshape(a * b, in_, a * b)
        # (i, a b, i', a' b') → (a, i, b, a', i', b')
        result = result.reshape(in_, a, b, in_, a, b).permute(1, 0, 2, 4, 3, 5)
        return result.reshape(a * in_ * b, -1)


def _joined_left(cores: list[Tensor], core: Tensor) -> Tensor:
    """(o_<, i_<, a) of the cores before one."""
    if not cores:
        return core.new_ones(1, 1, 1)
    joined = cores[0]
    for core in cores[1:]:
        joined = _join(joined, core)
    return joined[0]


def _joined_right(cores: list[Tensor], core: Tensor) -> Tensor:
    """(b, o_>, i_>) of the cores after one."""
    if not cores:
        return core.new_ones(1, 1, 1)
    joined = cores[-1]
    for other in reversed(cores[:-1]):
        joined = _join(other, joined)
    return joined[..., 0]


def _join(left: Tensor, right: Tensor) -> Tensor:
    (a, o, i, _), (_, p, j, c) = left.shape, right.shape
    product: Tensor = torch.tensordot(left, right, 1)  # (a, o, i, p, j, c)
    return product.transpose(2, 3).reshape(a, o * p, i * j, c)

"""Weighted alternating least squares: fit the cores of an MPO in the norm of a layer's inputs, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mpocli.mpo.canonical import canonicalize
from mpocli.mpo.contract import to_dense
from mpocli.mpo.environment import Environment
from mpocli.mpo.linalg import working_dtype
from mpocli.mpo.mpo import MPO
from mpocli.mpo.preconditioner import Solver, by_factors, by_inputs

# Normal equations of the inputs are formed and factorised up to this many unknowns, and where that takes no longer than
# so many products with the weights: to solve them, and to precondition others with them. Else the factors of a
# Kronecker product stand for them.
DIRECT_UNKNOWNS = 1536
_TO_SOLVE, _TO_PRECONDITION = 32, 2
# How many times the error to get below may stand after the first core, of two and of more: of 300 fits to matrices of
# real models, those that came within 5 % of it stood at most 3.2 and 5.1 times above it then. The start says nothing:
# it is blind to the norm.
_FIRST_OF_TWO, _FIRST_OF_MORE = 3.5, 6.0
# Steps of conjugate gradients at most, and what they leave of the squared residual in the preconditioner's norm: not
# less, since the other cores are not final either, and ten sweeps end at the same error (a thirtieth of the tolerance
# takes up to half as many products more). Inputs alone have outliers, and nothing but these steps for them.
_STEPS, _TOL = 6, 3e-2
_STEPS_BY_INPUTS, _TOL_BY_INPUTS = 32, 1e-4


@dataclass(frozen=True, eq=False)
class Fit:
    """An MPO after its sweeps. `errors` are tr(H (W−Ŵ) G (W−Ŵ)ᵀ) at the start and after every sweep."""

    mpo: MPO
    errors: tuple[float, ...]


def fit(
    matrix: Tensor,
    start: MPO,
    gram: Tensor | None = None,
    output: Tensor | None = None,
    *,
    sweeps: int = 10,
    tol: float = 5e-3,
    target: float = math.inf,
) -> Fit:
    """Sweep over the cores of `start`, each made better while the others stay.

    Minimises tr(H (W−Ŵ) G (W−Ŵ)ᵀ). With core k in the centre of the canonical form and E its environment, W ≈ E C
    (one-site DMRG of a quadratic form), the normal equations are Eᵀ (H ⊗ G) E C = Eᵀ (H W G). Without output weights
    they are the same for every o_k, of size χ_{k−1} i_k χ_k, and solved exactly up to `DIRECT_UNKNOWNS`; all others
    by a few steps of conjugate gradients from the core as it is (`preconditioner`). One sweep goes to the last core
    and back. Stops after `sweeps`, or as soon as a sweep takes off less than `tol` of the error, or when the error will
    hardly get below `target`: far too large after the first core (the start comes back then), or too large for what the
    sweeps that are left can take off, if none takes off more than the last one. The error never grows: a sweep that
    round-off would let grow is not taken.

    W is (O, I), G (I, I), H (O, O), None the identity, all without padding, which is fitted to zero and not counted;
    keeps the bond dimensions. Cores, equations and errors are float64, products inside conjugate gradients float32: G
    and H that are both nearly singular need `gram.regularised` first. With a `target` and weights on both sides errors
    are float32 too. Raises `NumericsError` where the equations cannot be solved.
    """
    problem = _Problem.of(matrix, start, gram, output, exact=target == math.inf or output is None)
    centred = canonicalize(start, 0)
    cores = list(centred.cores)
    errors = [problem.error(cores)]
    best = list(cores)
    first = target * (_FIRST_OF_TWO if len(cores) == 2 else _FIRST_OF_MORE)
    for left in range(sweeps - 1, -1, -1):
        if not _sweep(problem, cores, first if len(errors) == 1 else math.inf):
            break
        error = problem.error(cores)
        gain = errors[-1] - error
        if not gain > 0.0:
            break
        best = list(cores)
        errors.append(error)
        if gain <= tol * errors[-2] or error - left * gain > target:
            break
    done = MPO(tuple(core.contiguous() for core in best), start.shape)
    return Fit(canonicalize(done), tuple(errors))


def _sweep(problem: _Problem, cores: list[Tensor], limit: float) -> bool:
    """Once to the last core and back, unless the error is above `limit` after the first."""
    n = len(cores)
    for position, k in enumerate([*range(n - 1), *range(n - 1, 0, -1)]):
        cores[k] = problem.solve(cores, k)
        if position == 0 and problem.is_above(limit, cores):
            return False
        _shift(cores, k, forward=position < n - 1)
    # The next sweep, or nobody, solves this one first.
    cores[0] = problem.solve(cores, 0)
    return True


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


@dataclass(eq=False)
class _Problem:
    """W, G and H padded to the site shape, and the products with them. G and H have a mean diagonal of 1."""

    target: Tensor  # (O, I)
    gram: Tensor | None  # (I, I), None for the identity
    output: Tensor | None  # (O, O), None for the identity
    shape: tuple[int, int]  # without padding
    scale: float  # of the error
    exact: bool  # whether errors are in the working dtype; outliers of inputs alone cancel in float32
    # H (W − Ŵ) G of the cores as they are, None where that is not known. In single precision: steps along directions
    # that it has bent are still steps down, and errors are summed anew after every sweep.
    _residual: Tensor | None = None

    @classmethod
    def of(
        cls, matrix: Tensor, start: MPO, gram: Tensor | None, output: Tensor | None, *, exact: bool = True
    ) -> _Problem:
        wide = working_dtype(matrix.device)
        rows, columns = start.site_shape.padded_shape
        target = matrix.new_zeros(rows, columns, dtype=wide)
        target[: matrix.shape[0], : matrix.shape[1]] = matrix
        (gram, of_gram), (output, of_output) = _padded_unit(gram, columns, wide), _padded_unit(output, rows, wide)
        return cls(target, gram, output, (matrix.shape[0], matrix.shape[1]), of_gram * of_output, exact)

    @cached_property
    def _weighted(self) -> Tensor:
        return _times(self.output, self.target, self.gram)

    @cached_property
    def _gram32(self) -> Tensor | None:
        return None if self.gram is None else self.gram.float()

    @cached_property
    def _output32(self) -> Tensor | None:
        return None if self.output is None else self.output.float()

    def error(self, cores: list[Tensor]) -> float:
        difference = self.target - to_dense(cores)
        if self.exact:
            weighted = _times(self.output, difference, self.gram)
        else:
            weighted = _times(self._output32, difference.float(), self._gram32)
        self._residual = weighted.float()
        return self._summed(difference, weighted)

    def is_above(self, limit: float, cores: list[Tensor]) -> bool:
        """Whether the error is, to single precision where that is all that is known."""
        if limit == math.inf:
            return False
        if self._residual is None:
            return self.error(cores) > limit
        return self._summed(self.target - to_dense(cores), self._residual) > limit

    def _summed(self, difference: Tensor, weighted: Tensor) -> float:
        """Padding costs nothing, with weights or without."""
        rows, columns = self.shape
        return self.scale * float((difference * weighted)[:rows, :columns].sum())

    def solve(self, cores: list[Tensor], k: int) -> Tensor:
        """The best core k, or a better one where that cannot be had at once."""
        environment = Environment(cores, k)
        if not self._is_direct(cores[k]):
            return self._improved(cores, k, environment, by_factors)
        if self.output is not None:
            return self._improved(cores, k, environment, by_inputs)
        self._residual = None
        exact = by_inputs(environment, self.gram, None, self.target.dtype)
        return exact(environment.pull(self._weighted))

    def _is_direct(self, core: Tensor) -> bool:
        """Whether forming the normal equations of the inputs is worth it."""
        left, out, in_, right = core.shape
        rows, columns = self.target.shape
        unknowns = left * in_ * right
        form = left * right / out * rows * columns**2 + unknowns**3 / 6
        product = rows * columns * (columns + (0 if self.output is None else rows))
        most = _TO_SOLVE if self.output is None else _TO_PRECONDITION
        return unknowns <= DIRECT_UNKNOWNS and form <= most * product

    def _improved(self, cores: list[Tensor], k: int, environment: Environment, how: Callable[..., Solver]) -> Tensor:
        """A few steps of preconditioned conjugate gradients from core k as it is."""
        wide = self.target.dtype
        environment = environment.to(torch.float32)
        precondition = how(environment, self._gram32, self._output32, wide)
        if self._residual is None:
            self.error(cores)
        assert self._residual is not None
        steps, tol = (_STEPS, _TOL) if self.output is not None else (_STEPS_BY_INPUTS, _TOL_BY_INPUTS)
        x = cores[k]
        residual = environment.pull(self._residual).to(wide)
        rest = direction = precondition(residual)
        norm = first = float((residual * rest).sum())
        for _ in range(steps):
            if not norm > tol * first or not math.isfinite(norm):
                break
            product = _times(self._output32, environment.push(direction.float()), self._gram32)
            applied = environment.pull(product).to(wide)
            curvature = float((direction * applied).sum())
            if not curvature > 0.0:
                break
            step = norm / curvature
            x = x + step * direction
            self._residual = self._residual - step * product
            residual = residual - step * applied
            rest = precondition(residual)
            after = float((residual * rest).sum())
            direction = rest + (after / norm) * direction
            norm = after
        return x


def _times(output: Tensor | None, matrix: Tensor, gram: Tensor | None) -> Tensor:
    """H D G."""
    right = matrix if gram is None else matrix @ gram
    return right if output is None else output @ right


def _padded_unit(square: Tensor | None, size: int, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """With zeros to a size, divided by its mean diagonal, and that."""
    if square is None:
        return None, 1.0
    mean = float(square.diagonal().mean())
    mean = mean if mean > 0.0 else 1.0
    padded = square.new_zeros(size, size, dtype=dtype)
    padded[: len(square), : len(square)] = square
    return padded.div_(mean), mean

"""Independent answers for the tests of `mpocli.mpo` and `mpocli.nn`: plain numpy, no code of the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The same examples in every run: a law that fails in CI fails at the desk.
LAW = settings(deadline=None, derandomize=True, database=None, max_examples=30)

Dims = tuple[int, ...]


def digits(number: int, dims: Sequence[int]) -> list[int]:
    """The digits of a number in mixed radix `dims`, most significant first."""
    result = []
    for dim in reversed(dims):
        number, digit = divmod(number, dim)
        result.append(digit)
    return result[::-1]


def to_numpy(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def matrix_by_loops(cores: Sequence[np.ndarray]) -> np.ndarray:
    """W[o, i] = A_1[o_1, i_1] A_2[o_2, i_2] … A_n[o_n, i_n], the definition, one element at a time."""
    out_dims, in_dims = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    matrix = np.zeros((math.prod(out_dims), math.prod(in_dims)))
    for row, column in np.ndindex(*matrix.shape):
        product = np.ones((1, 1))
        for core, o, i in zip(cores, digits(row, out_dims), digits(column, in_dims), strict=True):
            product = product @ core[:, o, i, :]
        matrix[row, column] = product[0, 0]
    return matrix


def pad(matrix: np.ndarray, out_dims: Sequence[int], in_dims: Sequence[int]) -> np.ndarray:
    padded = np.zeros((math.prod(out_dims), math.prod(in_dims)))
    for row, column in np.ndindex(*matrix.shape):
        padded[row, column] = matrix[row, column]
    return padded


def unfolding(padded: np.ndarray, out_dims: Sequence[int], in_dims: Sequence[int], bond: int) -> np.ndarray:
    """The matrix (o_1 i_1 … o_k i_k) × (o_{k+1} i_{k+1} … o_n i_n), k = `bond`, by index arithmetic."""
    columns = math.prod(o * i for o, i in zip(out_dims[bond:], in_dims[bond:], strict=True))
    result = np.zeros((padded.size // columns, columns))
    for row, column in np.ndindex(*padded.shape):
        position = 0
        for o, i, a, b in zip(out_dims, in_dims, digits(row, out_dims), digits(column, in_dims), strict=True):
            position = (position * o + a) * i + b
        result[divmod(position, columns)] = padded[row, column]
    return result


def unfolding_spectra(padded: np.ndarray, out_dims: Sequence[int], in_dims: Sequence[int]) -> list[np.ndarray]:
    """Singular values of every unfolding, by numpy's SVD."""
    return [
        np.linalg.svd(unfolding(padded, out_dims, in_dims, bond), compute_uv=False) for bond in range(1, len(out_dims))
    ]


def ranks(padded: np.ndarray, out_dims: Sequence[int], in_dims: Sequence[int]) -> Dims:
    """Ranks of every unfolding, ends 1: the smallest bonds that hold the matrix exactly."""
    inner = [
        int((values > 1e-10 * max(values[0], 1e-300)).sum()) for values in unfolding_spectra(padded, out_dims, in_dims)
    ]
    return (1, *inner, 1)


def left_part(cores: Sequence[np.ndarray], bond: int) -> np.ndarray:
    """Everything left of a bond as a matrix (o_1 i_1 … o_k i_k) × χ_k."""
    part = np.ones((1, 1))
    for core in cores[:bond]:
        part = np.einsum("xa,aoib->xoib", part, core).reshape(-1, core.shape[3])
    return part


def right_part(cores: Sequence[np.ndarray], bond: int) -> np.ndarray:
    """Everything right of a bond as a matrix χ_k × (o_{k+1} i_{k+1} … o_n i_n)."""
    part = np.ones((1, 1))
    for core in reversed(cores[bond:]):
        part = np.einsum("aoib,bx->aoix", core, part).reshape(core.shape[0], -1)
    return part


def dense_by_einsum(cores: Sequence[Tensor]) -> Tensor:
    """The padded matrix, differentiable, site by site with `einsum`."""
    result = cores[0]
    for core in cores[1:]:
        joined = torch.einsum("aoib,bpjc->aopijc", result, core)
        a, o, p, i, j, c = joined.shape
        result = joined.reshape(a, o * p, i * j, c)
    return result[0, :, :, 0]


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def random_cores(out_dims: Sequence[int], in_dims: Sequence[int], bonds: Sequence[int], seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy(rng.standard_normal((bonds[k], out_dims[k], in_dims[k], bonds[k + 1])))
        for k in range(len(out_dims))
    ]


def integer_cores(out_dims: Sequence[int], in_dims: Sequence[int], bonds: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Cores of −1, 0 and 1, whose products are exact in every floating-point type while they stay small."""
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy(rng.integers(-1, 2, (bonds[k], out_dims[k], in_dims[k], bonds[k + 1])).astype(float))
        for k in range(len(out_dims))
    ]


def distance(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """‖a − b‖_F / ‖b‖_F, absolute where b is zero."""
    a, b = (x.detach().double().numpy() if isinstance(x, Tensor) else x for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    scale = float(np.abs(b).max(initial=0.0)) or 1.0  # the squares of 1e-200 are zero
    a, b = a / scale, b / scale
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


@st.composite
def site_dims(draw: st.DrawFn, max_sites: int = 6, max_elements: int = 600) -> tuple[Dims, Dims]:
    """Row and column factors of 2 to `max_sites` sites, 1×1 sites among them, in any order."""
    room = max_elements
    sites = []
    for _ in range(draw(st.integers(2, max_sites))):
        out = draw(st.integers(1, min(6, room)))
        room //= out
        in_ = draw(st.integers(1, min(6, room)))
        room //= in_
        sites.append((out, in_))
    sites = draw(st.permutations(sites))
    return tuple(out for out, _ in sites), tuple(in_ for _, in_ in sites)


@st.composite
def capped_sites(draw: st.DrawFn, largest: int = 9) -> tuple[Dims, Dims, Dims]:
    """Row factors, column factors and one number for each inner bond, reachable or not."""
    dims = draw(site_dims())
    return *dims, draw(st.tuples(*[st.integers(1, largest)] * (len(dims[0]) - 1)))


@st.composite
def matrices(draw: st.DrawFn, max_sites: int = 6, max_elements: int = 600) -> tuple[np.ndarray, Dims, Dims]:
    """A Gaussian matrix, at most a tenth smaller than its sites make it, and the sites' dimensions."""
    out_dims, in_dims = draw(site_dims(max_sites, max_elements))
    rows, columns = (draw(st.integers(-(-10 * size // 11), size)) for size in (math.prod(out_dims), math.prod(in_dims)))
    return gaussian(rows, columns, seed=draw(st.integers(0, 999))), out_dims, in_dims


class Recorder(TorchDispatchMode):
    """Counts multiply-accumulates of matrix products and the elements of what every operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.largest = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.macs += result.numel() * args[0].shape[-1]
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
                self.elements += value.numel()
        return result

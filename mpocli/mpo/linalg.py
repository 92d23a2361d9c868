"""The one factorisation every sweep is made of, and the checks around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mpocli.errors import InputError, NumericsError

# Largest elements between this and its inverse can be squared and summed without a thought.
_SAFE_SCALE = {torch.float64: 1e-100, torch.float32: 1e-12}


def working_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it (Apple's does not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_finite(tensor: Tensor, name: str) -> None:
    """`InputError` naming the tensor and how many of its elements are NaN or infinite."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # eight-bit floats have no arithmetic
    # A sum over 10⁸ elements can only overflow in half precision; then the count below tells the truth.
    if bool(torch.isfinite(tensor.sum())):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InputError(
            f"{name}: {bad} of {tensor.numel()} elements are NaN or infinite",
            hint="repair or re-download the checkpoint; nothing was written",
        )


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A finite tensor in another dtype, still finite.

    `InputError` where it holds NaN or infinity, `NumericsError` where the new dtype cannot hold its numbers.
    """
    if not tensor.is_floating_point():
        return tensor
    check_finite(tensor, name)
    if tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise NumericsError(
            f"{name}: its largest element, {float(tensor.abs().max()):.3g}, does not fit in {dtype_name(dtype)}",
            hint="store it wider, as ‹dtype› bfloat16",
        )
    return narrow


@contextmanager
def _one_thread(size: int) -> Iterator[None]:
    """Small LAPACK problems on one thread.

    They gain nothing from a second one, and on a machine whose cores are busy the threads' busy-waiting makes
    them a hundred times slower (measured: 0.03 s against 5 s for a 384×384 eigenproblem).
    """
    threads = torch.get_num_threads()
    if threads == 1 or size > 1024:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def left_split(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A = U R with orthonormal columns U (m×q) and R = Uᵀ A (q×N), q = min(m, N), most important first.

    Rows of R are orthogonal with norms σ_j, A's singular values, so that cutting both after r columns/rows is
    the best rank-r approximation. For m ≤ N (the rule in a sweep) U comes from the eigenvectors of the Gram
    matrix A Aᵀ: one m×m problem instead of an SVD of A, many times faster. Squaring limits only how well
    singular vectors below 1e-8 σ_1 are told apart from one another; U is orthogonal to round-off, hence A = U R
    is too. The weights are measured on R itself and do not suffer from the square.

    Returns U, R and σ² (q numbers). Raises `NumericsError` where LAPACK does not converge.
    """
    rows, columns = matrix.shape
    try:
        if rows <= columns:
            # The squares must neither overflow nor vanish; scaling is a copy, so only where they might.
            scale = max(float(matrix.amax()), -float(matrix.amin()))
            safe = scale == 0.0 or _SAFE_SCALE[matrix.dtype] < scale < 1 / _SAFE_SCALE[matrix.dtype]
            scaled = matrix if safe else matrix / scale
            gram = scaled @ scaled.T
            del scaled
            with _one_thread(rows):
                basis = torch.linalg.eigh(gram).eigenvectors.flip(1)
            rest = basis.T @ matrix
        else:
            with _one_thread(columns):
                q, r = torch.linalg.qr(matrix)
                u, s, vh = torch.linalg.svd(r, full_matrices=False)
            basis, rest = q @ u, s[:, None] * vh
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"a {rows}x{columns} factorisation did not converge ({error})",
            hint="try another ‹shape› or ‹sites› for this matrix, or ‹ignore› it",
        ) from error
    return basis, rest, torch.linalg.vector_norm(rest, dim=1).square()


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and eigenvectors (columns) of a symmetric matrix.

    Raises `NumericsError` where LAPACK does not converge.
    """
    with _converging(matrix), _one_thread(len(matrix)):
        values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def eigenvalues(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix, smallest first; raises as `eigen` does."""
    with _converging(matrix), _one_thread(len(matrix)):
        values: Tensor = torch.linalg.eigvalsh(matrix)
    return values


@contextmanager
def _converging(matrix: Tensor) -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"the eigenvalues of a {len(matrix)}x{len(matrix)} matrix did not converge ({error})",
            hint="look for extreme values in the weights or in the inputs",
        ) from error

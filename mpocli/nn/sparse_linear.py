"""Linear layers for inference whose weight, a matrix with many zeros, is multiplied by a sparse kernel."""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows of x that are multiplied at once: their columns stay in the cache while W's values stream by. On 512 rows this
# took half to three quarters of the time of one product.
_ROWS = 32
# Both sides of a matrix are multiples of this: enough for either backend of torch's 2:4 kernels in half precision.
_TILE = 64


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W (O × I) in compressed rows (CSR, int32 indices), in the place of a dense layer.

    `dense` keeps its parameters, and they are this module's too, under the same names: a state dict and code that
    reads `.weight` see no difference. `transposed` says that it stores Wᵀ, as GPT-2's `Conv1D`. The packed matrix is
    a copy: a later change of the weight does not reach it. Where a gradient could be asked for, or x is of another
    dtype, the dense layer answers.

    >>> with torch.no_grad():
    ...     SparseLinear(nn.Linear(4, 2))(torch.ones(3, 5, 4)).shape
    torch.Size([3, 5, 2])
    """

    path: ClassVar[Literal["csr", "2:4"]] = "csr"
    dense: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    packed: Tensor

    def __init__(self, dense: nn.Module, *, transposed: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "dense", dense)  # as a submodule it would add its names to the state dict
        self.weight, self.bias = cast(nn.Parameter, dense.weight), cast("nn.Parameter | None", dense.bias)
        matrix = self.weight.detach().to(dtype)
        matrix = matrix.T if transposed else matrix
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("packed", self._pack(matrix), persistent=False)
        self.train(dense.training)

    @staticmethod
    def _pack(matrix: Tensor) -> Tensor:
        """The matrix in CSR, with the int32 indices that MKL takes, so that a product needs no conversion."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            found = matrix.to_sparse_csr()
            crow, columns = found.crow_indices().int(), found.col_indices().int()
            return torch.sparse_csr_tensor(crow, columns, found.values(), found.shape, check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        # A compiler takes no sparse tensor.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.dtype != self.packed.dtype:
            answer: Tensor = self.dense(x)
            return answer
        return self._product(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """(rows, in_features) → (rows, out_features)."""
        if len(x) == 1:  # a matrix-vector product, a little faster than the same as a matrix
            return F.linear(x, self.packed, self.bias)
        y = x.new_empty(len(x), self.out_features)
        for rows, place in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            product = torch.sparse.mm(self.packed, rows.T).T
            if self.bias is None:
                place.copy_(product)
            else:
                torch.add(product, self.bias, out=place)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class SemiStructuredLinear(SparseLinear):
    """The same on a GPU's 2:4 kernels, in half precision: W as its non-zeros, half its size, and their places.

    `dtype` is that of the product where autocast makes it narrower than the weight.
    """

    path = "2:4"

    @staticmethod
    def _pack(matrix: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor")
            packed: Tensor = torch.sparse.to_sparse_semi_structured(matrix.contiguous())
        return packed

    def forward(self, x: Tensor) -> Tensor:
        narrow = torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()
        return super().forward(x.to(self.packed.dtype) if narrow else x)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed, None if self.bias is None else self.bias.to(x.dtype))


def fits_semi_structured(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether a 2:4 kernel can take an (O, I) matrix in `dtype`: the device, the sizes, and its zeros.

    >>> fits_semi_structured(torch.zeros(64, 64), torch.bfloat16)  # not on a GPU
    False
    """
    if matrix.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.version.cuda is None or torch.cuda.get_device_capability(matrix.device) < (8, 0):
        return False
    return not any(side % _TILE for side in matrix.shape) and is_two_of_four(matrix)


def is_two_of_four(matrix: Tensor) -> bool:
    """Whether at most two of every four neighbours in a row are non-zero.

    >>> is_two_of_four(torch.tensor([[1.0, 2, 0, 0, 3, 0, 0, 4]])), is_two_of_four(torch.tensor([[1.0, 2, 3, 0]]))
    (True, False)
    """
    rows, columns = matrix.shape
    return columns % 4 == 0 and bool(((matrix.reshape(rows, -1, 4) != 0).sum(-1) <= 2).all())

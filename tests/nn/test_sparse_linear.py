"""Sparse linear layers compute what the dense ones do, and leave these as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mpocli.nn.sparse_linear import SparseLinear, fits_semi_structured, is_two_of_four

SPARSITIES = {"half": 0.5, "most": 0.9, "all": 1.0, "none": 0.0}


def layer(
    kind: str, sparsity: float, *, outs: int = 37, ins: int = 29, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A dense layer with random zeros in its weight, and a bias that is not zero."""
    generator = torch.Generator().manual_seed(5)
    made: nn.Module = Conv1D(outs, ins) if kind == "conv1d" else nn.Linear(ins, outs, bias=kind == "linear")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        assert isinstance(made.weight, nn.Parameter)
        made.weight.masked_fill_(torch.rand(made.weight.shape, generator=generator) < sparsity, 0)
    return made.to(dtype)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def reference(dense: nn.Module, x: Tensor) -> Tensor:
    """In float64, by the definition."""
    assert isinstance(dense.weight, nn.Parameter)
    matrix = dense.weight.double().T if isinstance(dense, Conv1D) else dense.weight.double()
    y = torch.einsum("...i,oi->...o", x.double(), matrix)
    return y if dense.bias is None else y + dense.bias.double()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (31,), (32,), (33,), (5, 13), (2, 3, 7), (0,), ()], ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES.values(), ids=SPARSITIES.keys())
@pytest.mark.parametrize("kind", ["linear", "bias-free", "conv1d"])
def test_a_sparse_layer_computes_what_the_dense_one_does(kind: str, sparsity: float, shape: tuple[int, ...]) -> None:
    dense, x = layer(kind, sparsity), rows(*shape, 29)
    sparse = SparseLinear(dense, transposed=kind == "conv1d")
    y = sparse(x)
    assert y.shape == (*shape, 37) and y.dtype == torch.float32 and y.is_contiguous()
    expected = reference(dense, x)
    assert (y - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_an_input_that_is_not_contiguous_is_read_in_its_order() -> None:
    dense, x = layer("linear", 0.5), rows(29, 4, 50).permute(2, 1, 0)
    expected = reference(dense, x)
    assert (SparseLinear(dense)(x) - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_the_sparse_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, a layer that always fell back to the dense one would pass."""
    sparse = SparseLinear(layer("linear", 0.5))
    monkeypatch.setattr(nn.Linear, "forward", None)
    for count in (1, 2, 40):
        sparse(rows(count, 29))
    assert sparse.packed.layout == torch.sparse_csr
    assert sparse.packed.crow_indices().dtype == sparse.packed.col_indices().dtype == torch.int32
    assert sparse.packed.values().numel() == int((sparse.weight != 0).sum())


def test_where_a_gradient_is_wanted_the_dense_layer_answers() -> None:
    sparse = SparseLinear(layer("linear", 0.5))
    sparse(rows(3, 29)).sum().backward()
    assert sparse.weight.grad is not None and sparse.weight.grad.norm() > 0


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_where_another_dtype_comes_in_the_dense_layer_answers(autocast: bool) -> None:
    dense = layer("linear", 0.5, dtype=torch.bfloat16 if not autocast else torch.float32)
    sparse, x = SparseLinear(dense, dtype=torch.float32), rows(3, 29).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(sparse(x), dense(x))


def test_names_and_parameters_are_those_of_the_dense_layer() -> None:
    for kind in ("linear", "bias-free", "conv1d"):
        dense = layer(kind, 0.5).eval()
        sparse = SparseLinear(dense, transposed=kind == "conv1d")
        assert [*sparse.state_dict()] == [*dense.state_dict()]
        assert all(a is b for a, b in zip(sparse.parameters(), dense.parameters(), strict=True))
        assert sparse.dense is dense and not sparse.training
        assert (sparse.out_features, sparse.in_features) == (37, 29)


@torch.no_grad()
def test_a_sparse_layer_can_change_its_dtype() -> None:
    dense = layer("linear", 0.5)
    sparse = SparseLinear(dense).double()
    assert sparse.packed.dtype == torch.float64
    x = rows(3, 29).double()
    assert torch.allclose(sparse(x), reference(dense, x), rtol=1e-12)


# --- 2:4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "fits"), [("1100", True), ("0000", True), ("10010110", True), ("1110", False), ("11000111", False)]
)
def test_two_of_four_counts_in_groups_of_four(pattern: str, fits: bool) -> None:
    row = torch.tensor([float(bit) for bit in pattern])
    assert is_two_of_four(torch.stack([torch.zeros_like(row), row])) is fits


def test_two_of_four_needs_whole_groups() -> None:
    assert not is_two_of_four(torch.zeros(4, 6))


def test_there_is_no_semi_structured_kernel_on_a_cpu() -> None:
    assert not fits_semi_structured(torch.zeros(64, 64, dtype=torch.bfloat16), torch.bfloat16)


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 kernels are CUDA's")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_semi_structured_kernel_computes_what_the_dense_one_does(bias: bool, autocast: bool) -> None:
    from mpocli.nn.sparse_linear import SemiStructuredLinear

    dense = nn.Linear(128, 192, bias=bias).cuda()
    dense.weight.view(192, 32, 4)[:, :, 1:3] = 0
    if not autocast:
        dense.bfloat16()
    assert fits_semi_structured(dense.weight, torch.bfloat16)
    sparse = SemiStructuredLinear(dense, dtype=torch.bfloat16)
    x = rows(3, 11, 128).cuda().to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y, expected = sparse(x), dense(x)
    assert y.dtype == expected.dtype
    assert (y - expected).float().norm() <= 1e-2 * expected.float().norm()

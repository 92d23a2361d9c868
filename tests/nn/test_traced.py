"""Every module compiles as one graph and can be exported, lengths left open, and then computes what it does itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpocli.mpo import MPO
from mpocli.mpo.shape import SiteShape
from mpocli.nn import DenseExperts, MPOEmbedding, MPOExperts, MPOLinear, Router, RouterOptions, attach_router
from mpocli.nn.sparse_linear import SparseLinear

LINEAR = {"chain": SiteShape((4, 3, 4), (4, 4, 4)), "svd": SiteShape((48, 1), (1, 64))}
TABLE = {"chain": SiteShape((6, 5, 7), (4, 4, 3)), "svd": SiteShape((210, 1), (1, 48))}


def matrix(rows: int, columns: int, sites: SiteShape) -> MPO:
    return MPO.from_matrix(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)), sites)


def linear(form: str) -> nn.Module:
    return MPOLinear.from_mpo(matrix(48, 64, LINEAR[form]), torch.ones(48))


def table(form: str) -> nn.Module:
    return MPOEmbedding.from_mpo(matrix(209, 48, TABLE[form]), padding_idx=3, scale=2.0)


def sparse(_: str) -> nn.Module:
    with torch.no_grad():
        dense = nn.Linear(64, 48)
        dense.weight[torch.rand(48, 64) < 0.9] = 0
    return SparseLinear(dense)


class Network(nn.Module):
    """A feed-forward network of experts."""

    def __init__(self, form: str) -> None:
        super().__init__()
        kind: Any = {"one": "switch"}.get(form, "topk")
        capacity = 0.7 if form == "dropping" else None
        options = RouterOptions(kind, 1 if form == "one" else 2, capacity_factor=capacity)
        router = Router(64, 3, options, generator=torch.Generator().manual_seed(2))
        if form == "dense":
            up: Any = DenseExperts.from_matrix(torch.randn(48, 64), experts=3, place="in")
            down: Any = DenseExperts.from_matrix(torch.randn(64, 48), experts=3, place="out")
        else:
            up = MPOExperts.from_mpo(matrix(48, 64, LINEAR["chain"]), torch.ones(48), experts=3, place="in")
            back = SiteShape(LINEAR["chain"].in_dims, LINEAR["chain"].out_dims)
            down = MPOExperts.from_mpo(matrix(64, 48, back), torch.ones(64), experts=3, place="out")
        for layer in (up, down):
            layer.perturb(0.1, torch.Generator().manual_seed(3))
            attach_router(layer, router, own=layer is up)
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.down(self.up(x).relu())
        return answer


CASES = [(linear, "chain"), (linear, "svd"), (table, "chain"), (table, "svd"), (sparse, "csr")]
CASES += [(Network, form) for form in ("one", "dropping", "dense")]


def inputs(batch: int, length: int, make: Callable[[str], nn.Module]) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    if make is table:
        return torch.randint(0, 209, (batch, length), generator=generator)
    return torch.randn(batch, length, 64, generator=generator)


@pytest.mark.parametrize(("make", "form"), CASES)
def test_a_module_compiles_as_one_graph_and_is_exported_with_open_lengths(
    make: Callable[[str], nn.Module], form: str
) -> None:
    module = make(form).eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    length, batch = (torch.export.Dim(name, min=2, max=4096) for name in ("length", "batch"))
    exported = torch.export.export(module, (inputs(2, 5, make),), dynamic_shapes=({0: batch, 1: length},)).module()
    for shape in ((2, 5), (3, 70), (4, 6)):
        x = inputs(*shape, make)
        with torch.no_grad():
            expected = module(x)
            assert torch.allclose(compiled(x), expected, rtol=1e-4, atol=1e-4)
            assert torch.allclose(exported(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "form"), [(linear, "chain"), (table, "chain"), (Network, "dropping")])
def test_gradients_of_a_compiled_module_are_its_own(make: Callable[[str], nn.Module], form: str) -> None:
    module, x = make(form), inputs(3, 9, make)
    if make is table:
        x[0] = 3  # the padding
    found = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        call(x).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in module.named_parameters()})
    for name, expected in found[0].items():
        assert (expected is None) == (found[1][name] is None)
        if expected is not None:
            assert torch.allclose(found[1][name], expected, rtol=1e-3, atol=1e-3), name


def test_a_compiled_embedding_refuses_an_id_that_it_has_not() -> None:
    for form in TABLE:
        torch._dynamo.reset()
        compiled = torch.compile(table(form).eval(), fullgraph=True, backend="eager")
        with torch.no_grad(), pytest.raises(IndexError):
            compiled(torch.tensor([[1, 209]]))

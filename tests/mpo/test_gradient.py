"""Gradients of cores from the matrix's, against autograd and a Jacobian that numpy builds element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpocli.mpo import MPO, SiteShape, core_gradients, to_dense

SHAPES = {
    "svd": (SiteShape((6, 1), (1, 8)), (6, 8)),
    "three sites": (SiteShape((2, 3, 1), (2, 2, 2)), (6, 8)),
    "1x1 between": (SiteShape((2, 1, 1, 3), (4, 1, 1, 2)), (6, 8)),
    "padded": (SiteShape((2, 3), (3, 6)), (6, 17)),
}


def example(name: str) -> tuple[MPO, torch.Tensor]:
    sites, shape = SHAPES[name]
    generator = torch.Generator().manual_seed(1)
    mpo = MPO.from_matrix(torch.randn(shape, generator=generator, dtype=torch.float64), sites)
    cores = tuple(core + 0.1 * torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in mpo.cores)
    return MPO(cores, shape), torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_autograd_s(name: str) -> None:
    mpo, matrix = example(name)
    cores = [core.clone().requires_grad_() for core in mpo.cores]
    rows, columns = mpo.shape
    (to_dense(cores)[:rows, :columns] * matrix).sum().backward()
    for core, found in zip(cores, core_gradients(mpo.cores, matrix), strict=True):
        assert core.grad is not None and found.shape == core.shape
        assert torch.allclose(found, core.grad, atol=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_squared_ones_contract_with_the_squares_of_the_jacobian(name: str) -> None:
    mpo, matrix = example(name)
    variance = matrix.square().numpy()
    found = core_gradients(mpo.cores, matrix.square(), squared=True)
    for k, core in enumerate(mpo.cores):
        wanted = np.zeros(core.numel())
        for element in range(core.numel()):
            unit = torch.zeros(core.numel(), dtype=torch.float64)
            unit[element] = 1.0
            cores = [unit.reshape(core.shape) if j == k else other for j, other in enumerate(mpo.cores)]
            derivative = MPO(tuple(cores), mpo.shape).to_matrix().numpy()  # W is linear in every core
            wanted[element] = (derivative**2 * variance).sum()
        assert np.allclose(found[k].numpy().reshape(-1), wanted, atol=1e-10)

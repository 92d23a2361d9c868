"""The solvers of a core's normal equations against those equations, written out entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mpocli.mpo import SiteShape, Truncation, canonicalize, decompose
from mpocli.mpo.environment import Environment
from mpocli.mpo.preconditioner import by_factors, by_inputs

SITES = SiteShape((2, 3, 2), (3, 2, 2))


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(size: int, seed: int) -> Tensor:
    draw = normal(size, size, seed=seed)
    return draw @ draw.T + 0.1 * torch.eye(size, dtype=torch.float64)


def product(dims: tuple[int, ...], seed: int) -> Tensor:
    """A matrix that is a Kronecker product over the sites."""
    whole = torch.ones(1, 1, dtype=torch.float64)
    for k, size in enumerate(dims):
        whole = torch.kron(whole, definite(size, seed + k))
    return whole


def environment_of(k: int) -> tuple[Environment, Tensor]:
    start, _ = decompose(normal(12, 12, seed=1), SITES, Truncation(3))
    cores = list(canonicalize(start, k).cores)
    return Environment(cores, k), cores[k]


def written_out(environment: Environment, core: Tensor, gram: Tensor | None, output: Tensor | None) -> Tensor:
    """Eᵀ (H ⊗ G) E, column by column: what a unit core makes of a matrix, weighted and pulled back."""
    columns = []
    for index in np.ndindex(*core.shape):
        unit = torch.zeros_like(core)
        unit[index] = 1.0
        made = environment.push(unit)
        made = made if gram is None else made @ gram
        columns.append(environment.pull(made if output is None else output @ made).reshape(-1))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("weights", ["both", "inputs", "outputs", "none"])
def test_factors_solve_the_equations_of_weights_that_are_products(k: int, weights: str) -> None:
    environment, core = environment_of(k)
    gram = product(SITES.in_dims, 10) if weights in ("both", "inputs") else None
    output = product(SITES.out_dims, 20) if weights in ("both", "outputs") else None
    # Means over the other sites give each factor up to a number: a product has one in all.
    gram = None if gram is None else gram / gram.diagonal().mean()
    output = None if output is None else output / output.diagonal().mean()
    right = normal(*core.shape, seed=30)
    solved = by_factors(environment, gram, output, torch.float64)(right)
    exact = torch.linalg.solve(written_out(environment, core, gram, output), right.reshape(-1)).reshape(core.shape)
    torch.testing.assert_close(solved, exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("with_gram", [True, False])
def test_without_output_weights_the_inputs_solve_them_whatever_they_are(k: int, with_gram: bool) -> None:
    environment, core = environment_of(k)
    gram = definite(12, 40) if with_gram else None
    right = normal(*core.shape, seed=50)
    solved = by_inputs(environment, gram, None, torch.float64)(right)
    exact = torch.linalg.solve(written_out(environment, core, gram, None), right.reshape(-1)).reshape(core.shape)
    torch.testing.assert_close(solved, exact, rtol=1e-7, atol=1e-7 * float(exact.abs().max()))

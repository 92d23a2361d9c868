"""GPTQ beside a slow reference, and chains of cores: the loss that is told is the loss that there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mpocli.errors import NumericsError
from mpocli.methods.rounding import round_chain
from mpocli.mpo import MPO, SiteShape, Truncation, decompose, site_shape
from mpocli.mpo.gram import inverse_root
from mpocli.quant.gptq import gptq
from mpocli.quant.grid import Grid, Rounded, best_scales, nearest, searched

MINILM = Path(__file__).parents[3] / "shared" / "models" / "minilm-l6"


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gram(size: int, tokens: int, seed: int = 0, damping: float = 0.01) -> Tensor:
    """Second moments of inputs of which few directions are large."""
    inputs = _random(seed, tokens, size) @ (_random(seed + 1, size, size) / size**0.5) * _random(seed + 2, size).exp()
    gram = inputs.T @ inputs / tokens
    return gram + damping * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)


def _loss(matrix: Tensor, made: Rounded, gram: Tensor) -> float:
    difference = matrix.double() - made.values().double()
    return float((difference @ gram * difference).sum())


def _slow(matrix: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """Column by column with the inverse of what is left, as in Optimal Brain Quantisation: no Cholesky factor."""
    work, values = matrix.clone(), torch.zeros_like(matrix)
    columns = matrix.shape[1]
    size = grid.size(columns)
    diagonal = [float(torch.linalg.inv(gram[j:, j:])[0, 0]) for j in range(columns)]
    for j in range(columns):
        inverse = torch.linalg.inv(gram[j:, j:])
        if j % size == 0:
            weights = torch.tensor([1 / one for one in diagonal[j : j + size]])
            scales, offsets = best_scales(work[:, None, j : j + size].float(), grid, weights[None, None])
        scale = scales.double()
        start = offsets.double() if grid.offsets else -(grid.levels // 2) * scale
        code = ((work[:, j : j + 1] - start) / scale).round().clamp(0, grid.levels - 1)
        values[:, j : j + 1] = start + scale * code
        error = (work[:, j] - values[:, j]) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
    return values


@pytest.mark.parametrize("grid", [Grid(3, 8), Grid(2, 5, offsets=True), Grid(4, 0), Grid(3, 0, offsets=True)])
def test_gptq_is_what_a_slow_reference_finds(grid: Grid) -> None:
    matrix, gram = _random(3, 12, 20), _gram(20, 200)
    slow = _slow(matrix, gram, grid)
    made = gptq(matrix, gram, grid)
    difference = matrix - slow
    assert _loss(matrix, made, gram) == pytest.approx(float((difference @ gram * difference).sum()), rel=1e-6)
    assert torch.allclose(made.values().double(), slow, atol=1e-5)


@pytest.mark.parametrize("columns", [150])
@pytest.mark.parametrize("group", [0, 50, 128, 130])
def test_blocks_of_columns_change_nothing(columns: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, gram, grid = _random(4, 6, columns), _gram(columns, 600), Grid(3, group)
    found = gptq(matrix, gram, grid)
    monkeypatch.setattr("mpocli.quant.gptq._block", lambda size, columns: columns)
    whole = gptq(matrix, gram, grid)
    assert float((found.codes != whole.codes).float().mean()) < 0.02  # a tie may fall the other way
    assert _loss(matrix, found, gram) == pytest.approx(_loss(matrix, whole, gram), rel=1e-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_loses_no_more_than_rounding_to_nearest_on_random_matrices(bits: int) -> None:
    for seed in range(3):
        matrix, gram, grid = _random(seed, 16, 48), _gram(48, 100, seed), Grid(bits, 16, bits < 4)
        losses = [_loss(matrix, make, gram) for make in (gptq(matrix, gram, grid), nearest(matrix, grid))]
        assert losses[0] < losses[1]
        assert losses[0] <= _loss(matrix, searched(matrix, grid), gram)


@pytest.mark.skipif(not MINILM.is_dir(), reason=f"{MINILM} is not there")
def test_gptq_loses_no_more_than_rounding_to_nearest_on_matrices_of_minilm() -> None:
    with safe_open(MINILM / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "layer.2." in name and name.endswith("weight")]
        matrices = {name: file.get_tensor(name)[:96] for name in names}  # rows are rounded one by one
    matrices = {name: matrix for name, matrix in matrices.items() if matrix.dim() == 2 and matrix.shape[1] <= 384}
    assert len(matrices) == 5 and json.loads((MINILM / "config.json").read_text())["hidden_size"] == 384
    gram = _gram(384, 1000)
    for name, matrix in matrices.items():
        made, plain = gptq(matrix, gram, Grid(4, 64)), nearest(matrix, Grid(4, 64))
        assert _loss(matrix, made, gram) < 0.9 * _loss(matrix, plain, gram), name


def _singular(kind: str) -> Tensor:
    if kind == "few tokens":
        inputs = _random(5, 6, 24)
        return inputs.T @ inputs
    if kind == "dead inputs":
        return torch.diag((torch.arange(24) % 3).double())
    if kind == "nothing known":
        return torch.zeros(24, 24, dtype=torch.float64)
    return _gram(24, 100) * (1e200 if kind == "huge" else 1e-200)


@pytest.mark.parametrize("kind", ["few tokens", "dead inputs", "nothing known", "huge", "tiny"])
def test_a_gram_matrix_without_a_cholesky_factor_is_damped_until_it_has_one(kind: str) -> None:
    matrix, gram = _random(6, 10, 24), _singular(kind)
    made = gptq(matrix, gram, Grid(4, 8))
    assert _loss(matrix, made, gram) <= _loss(matrix, nearest(matrix, Grid(4, 8)), gram)
    assert float((made.values().double() - matrix).norm() / matrix.norm()) < 0.5


def test_a_gram_matrix_that_is_none_is_one_clear_line() -> None:
    wrong = torch.diag(torch.tensor([1.0, -0.9, 1.0], dtype=torch.float64))
    with pytest.raises(NumericsError, match="Gram matrix of 3 inputs is not positive definite"):
        inverse_root(wrong, (0.0, 1e-2), hint="round to nearest")


# --- chains -----------------------------------------------------------------------------------------------------------


def _svd(rows: int, columns: int, padded: SiteShape, rank: int) -> MPO:
    mpo, _ = decompose(_random(7, rows, columns), padded, Truncation(rank))
    return mpo


CHAINS = {
    "pair": _svd(24, 36, SiteShape((24, 1), (1, 36)), 9),
    "padded pair": _svd(23, 35, SiteShape((24, 1), (1, 36)), 9),
    "two": _svd(24, 36, site_shape(24, 36, 2), 9),
    "three": _svd(24, 36, site_shape(24, 36, 3), 9),
    "padded five": _svd(23, 35, site_shape(24, 36, 5), 9),
    "zeros": MPO((torch.zeros(1, 24, 1, 4), torch.zeros(4, 1, 36, 1)), (24, 36)),
}


def _values(made: Rounded, like: Tensor) -> Tensor:
    return made.values().double().reshape(like.shape)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("known", [True, False])
def test_the_loss_of_a_chain_is_that_of_its_parts(name: str, known: bool) -> None:
    mpo = CHAINS[name].to(dtype=torch.float64)
    gram = _gram(mpo.shape[1], 300) if known else None
    grids = [Grid(3, 16, offsets=True)] * len(mpo.cores)
    chain = round_chain(mpo, gram, grids)
    cores = tuple(_values(made, core) for made, core in zip(chain.rounded, mpo.cores, strict=True))
    difference = mpo.to_matrix() - MPO(cores, mpo.shape).to_matrix()
    weighted = difference if gram is None else difference @ gram
    assert chain.loss == pytest.approx(float((weighted * difference).sum()), rel=1e-6, abs=1e-9)
    if gram is not None and name != "zeros":
        plain = tuple(
            _values(nearest(core.flatten(0, 1).flatten(1), grid), core)
            for core, grid in zip(mpo.cores, grids, strict=True)
        )
        worse = mpo.to_matrix() - MPO(plain, mpo.shape).to_matrix()
        assert chain.loss < float((worse @ gram * worse).sum())


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_what_is_not_rounded_of_a_chain_is_what_its_loss_counts(chosen: int, moves: bool) -> None:
    mpo, gram = CHAINS["three"].to(dtype=torch.float64), _gram(36, 300)
    grids = [Grid(4, 0) if k == chosen else None for k in range(3)]
    chain = round_chain(mpo, gram, grids, moves=moves)
    cores = list(chain.mpo.cores)
    cores[chosen] = _values(chain.rounded[0], mpo.cores[chosen])
    assert torch.equal(cores[chosen], chain.mpo.cores[chosen])
    difference = mpo.to_matrix() - MPO(tuple(cores), mpo.shape).to_matrix()
    assert chain.loss == pytest.approx(float((difference @ gram * difference).sum()), rel=1e-6)
    others = [torch.equal(cores[k], mpo.cores[k]) for k in range(3) if k != chosen]
    assert all(others) if not moves or chosen == mpo.center else not all(others)

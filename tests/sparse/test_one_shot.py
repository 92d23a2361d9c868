"""One-shot pruning against slow loops in numpy, and against what pruning without compensation loses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpocli.errors import InputError, NumericsError
from mpocli.sparse import Pattern, n_of_m_mask, rowwise_mask, smallest_mask, zeros_in
from mpocli.sparse.one_shot import core_gram, sparsegpt, wanda_scores

ANY = Pattern()


def correlated(tokens: int, features: int, seed: int) -> Tensor:
    """Inputs whose features share a few directions and differ in size, as those of a language model do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, features, generator=generator)
    own = torch.randn(tokens, features, generator=generator)
    return (shared + 0.7 * own) * torch.linspace(0.3, 3.0, features)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def literal(
    weight: np.ndarray, gram: np.ndarray, sparsity: float, block: int, damping: float, n_of_m: tuple[int, int] | None
) -> np.ndarray:
    """SparseGPT as the paper states it: an explicit inverse for every column, one row and one weight at a time."""
    weight, hessian = weight.astype(np.float64).copy(), gram.astype(np.float64).copy()
    rows, columns = weight.shape
    dead = np.flatnonzero(np.diag(hessian) == 0)
    live = [j for j in range(columns) if j not in dead]
    hessian += damping * np.mean([hessian[j, j] for j in live]) * np.eye(columns)
    for j in dead:
        hessian[j, j] = 1.0
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    pruned = np.zeros(weight.shape, bool)

    def score(row: int, j: int) -> float:
        return 0.0 if j in dead else weight[row, j] ** 2 / inverses[j][0, 0]

    for j in range(columns):
        if n_of_m is None and j % block == 0:
            end = min(j + block, columns)
            entries = [(score(row, k), row, k) for row in range(rows) for k in range(j, end)]
            budget = math.floor(rows * end * sparsity + 1e-9) - math.floor(rows * j * sparsity + 1e-9)
            for _, row, k in sorted(entries)[:budget]:
                pruned[row, k] = True
        if n_of_m is not None and j % n_of_m[1] == 0:
            for row in range(rows):
                places = sorted(range(j, j + n_of_m[1]), key=lambda k, row=row: score(row, k))
                for k in places[: n_of_m[1] - n_of_m[0]]:
                    pruned[row, k] = True
        for row in range(rows):
            if pruned[row, j]:
                weight[row, j:] -= weight[row, j] / inverses[j][0, 0] * inverses[j][0]
                weight[row, j] = 0.0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "columns", "block", "sparsity"), [(5, 12, 4, 0.5), (7, 13, 5, 0.3), (3, 10, 128, 0.77), (1, 9, 3, 0.9)]
)
def test_sparsegpt_is_the_papers_column_by_column_update(
    rows: int, columns: int, block: int, sparsity: float, dtype: torch.dtype
) -> None:
    x, weight = correlated(60, columns, 1).to(dtype), random_weight(rows, columns).to(dtype)
    got = sparsegpt(weight, x.T @ x, sparsity, ANY, block=block, damping=0.05)
    expected = literal(weight.numpy(), (x.T @ x).numpy(), sparsity, block, 0.05, None)
    assert got.dtype == dtype
    assert np.array_equal(got.numpy() == 0, expected == 0)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-11 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(("keep", "group", "block"), [(2, 4, 8), (1, 3, 7), (2, 4, 3), (4, 6, 128)])
def test_sparsegpt_chooses_every_group_from_the_weights_as_they_then_are(keep: int, group: int, block: int) -> None:
    x, weight = correlated(80, 24, 2).double(), random_weight(6, 24).double()
    got = sparsegpt(weight, x.T @ x, 0.123, Pattern(keep, group), block=block)
    expected = literal(weight.numpy(), (x.T @ x).numpy(), 0.0, block, 0.01, (keep, group))
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-11)
    assert (got.reshape(6, -1, group) != 0).sum(-1).eq(keep).all()
    # With the weights as they were, some group would have lost others: the case is not a trivial one.
    first = literal(weight.numpy(), np.diag(np.diag((x.T @ x).numpy())), 0.0, block, 0.01, (keep, group))
    assert not np.array_equal(first == 0, expected == 0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 23),
    block=st.integers(1, 30),
    sparsity=st.sampled_from([0.0, 0.29, 0.5, 0.613, 0.9, 1.0]),
)
def test_the_number_of_zeros_is_exact_whatever_the_blocks(rows: int, columns: int, block: int, sparsity: float) -> None:
    x = correlated(50, columns, 3)
    got = sparsegpt(random_weight(rows, columns), x.T @ x, sparsity, ANY, block=block)
    assert int((got == 0).sum()) == math.floor(rows * columns * sparsity + 1e-9)
    assert not torch.signbit(got[got == 0]).any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_compensation_loses_less_than_wanda_and_that_less_than_magnitude(seed: int, sparsity: float) -> None:
    x, weight = correlated(400, 48, seed), random_weight(32, 48, seed + 100)
    scores = wanda_scores(weight, x.square().sum(0))

    def error(pruned: Tensor) -> float:
        return float(torch.linalg.norm((weight - pruned) @ x.T))

    magnitude = error(weight * smallest_mask(weight.abs(), zeros_in(weight.numel(), sparsity)))
    wanda = error(weight * rowwise_mask(scores, sparsity))
    compensated = error(sparsegpt(weight, x.T @ x, sparsity, ANY))
    assert compensated < wanda < magnitude


@pytest.mark.parametrize("seed", range(4))
def test_compensation_loses_less_in_groups_too(seed: int) -> None:
    x, weight = correlated(400, 48, seed), random_weight(32, 48, seed + 100)
    wanda = weight * n_of_m_mask(wanda_scores(weight, x.square().sum(0)), 2, 4)
    compensated = sparsegpt(weight, x.T @ x, 0.5, Pattern(2, 4))
    assert torch.linalg.norm((weight - compensated) @ x.T) < torch.linalg.norm((weight - wanda) @ x.T)


def test_uncorrelated_inputs_leave_what_is_kept_as_it_was() -> None:
    norms = torch.linspace(1, 9, 10).double()
    weight = random_weight(4, 10).double()
    got = sparsegpt(weight, torch.diag(norms), 0.5, ANY, damping=0.0)
    expected = weight * smallest_mask(wanda_scores(weight, norms), 20)
    assert torch.equal(got, expected)


def test_wanda_scores_are_the_root_of_each_entrys_squared_share() -> None:
    x, weight = correlated(30, 7, 5), random_weight(3, 7)
    scores = wanda_scores(weight.bfloat16(), x.double().square().sum(0))
    assert scores.dtype == torch.float32
    for row in range(3):
        for j in range(7):
            share = np.linalg.norm(x[:, j].numpy() * float(weight.bfloat16()[row, j]))
            assert float(scores[row, j]) == pytest.approx(share, rel=1e-5)


def test_a_transposed_weight_gives_the_same_and_stays_as_it_was() -> None:
    """A Conv1D's weight is a transpose; a copy that is none would be pruned under the caller's hands."""
    x, stored = correlated(60, 12, 6), random_weight(12, 9)
    before = stored.clone()
    got = sparsegpt(stored.T, x.T @ x, 0.5, ANY)
    assert torch.equal(got, sparsegpt(stored.T.contiguous(), x.T @ x, 0.5, ANY))
    assert torch.equal(stored, before) and got.is_contiguous()


def test_a_weight_that_is_a_parameter_gives_a_plain_tensor() -> None:
    weight = torch.nn.Parameter(random_weight(3, 6))
    assert not sparsegpt(weight, torch.eye(6), 0.5, ANY).requires_grad
    assert not wanda_scores(weight, torch.ones(6)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, weight = correlated(60, 12, 6), random_weight(9, 12).to(dtype)
    got = sparsegpt(weight, x.T @ x, 0.5, ANY)
    assert torch.equal(got, sparsegpt(weight.float(), x.T @ x, 0.5, ANY).to(dtype))


def test_inputs_that_are_always_zero_go_first() -> None:
    x = correlated(60, 12, 7).double()
    x[:, [2, 7]] = 0
    weight = random_weight(5, 12).double()
    got = sparsegpt(weight, x.T @ x, 0.5, ANY)
    assert not got[:, [2, 7]].any() and int((got == 0).sum()) == 30
    np.testing.assert_allclose(
        got.numpy(), literal(weight.numpy(), (x.T @ x).numpy(), 0.5, 128, 0.01, None), rtol=0, atol=1e-11
    )
    # What they leave over is not touched: nothing is known about it.
    few = sparsegpt(weight, x.T @ x, 0.05, ANY)
    assert int((few == 0).sum()) == 3
    assert torch.equal(few[:, [2, 7]][few[:, [2, 7]] != 0], weight[:, [2, 7]][few[:, [2, 7]] != 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", [ANY, Pattern(2, 4)])
@pytest.mark.parametrize(
    ("case", "x"),
    [
        ("constant", torch.full((50, 20), 3.0)),
        ("three tokens", correlated(3, 20, 8)),
        ("one direction", torch.randn(50, 1) @ torch.ones(1, 20)),
        ("tiny", 1e-15 * correlated(50, 20, 8)),
        ("huge", 1e15 * correlated(50, 20, 8)),
        ("nothing at all", torch.zeros(5, 20)),
    ],
)
def test_degenerate_inputs_are_pruned_all_the_same(case: str, x: Tensor, pattern: Pattern, dtype: torch.dtype) -> None:
    x, weight = x.to(dtype), random_weight(7, 20).to(dtype)
    got = sparsegpt(weight, x.T @ x, 0.5, pattern, block=8)
    assert torch.isfinite(got).all() and int((got == 0).sum()) == 70
    if case in ("constant", "three tokens", "one direction") and pattern.keep is None:
        lost = torch.linalg.norm((weight - got) @ x.T) / torch.linalg.norm(weight @ x.T)
        uncompensated = torch.linalg.norm((weight - weight * (got != 0)) @ x.T) / torch.linalg.norm(weight @ x.T)
        assert lost < 0.5 * uncompensated


def test_damping_rises_until_the_gram_matrix_can_be_factorised() -> None:
    """Rounding made an eigenvalue −0.05 of the mean diagonal: 0.01 is not enough, 0.1 is."""
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]]).double()
    weight = torch.tensor([[1.0, 1.0]]).double()
    raised = sparsegpt(weight, gram, 0.5, ANY, damping=0.01)
    assert torch.equal(raised, sparsegpt(weight, gram, 0.5, ANY, damping=0.1))


def test_a_matrix_that_is_no_gram_matrix_is_an_error() -> None:
    with pytest.raises(NumericsError, match="not positive definite"):
        sparsegpt(torch.ones(2, 2), torch.tensor([[1.0, 20.0], [20.0, 1.0]]), 0.5, ANY)


def test_what_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericsError, match="Gram matrix"):
        sparsegpt(torch.ones(2, 2), torch.tensor([[math.inf, 0.0], [0.0, 1.0]]), 0.5, ANY)
    with pytest.raises(NumericsError, match="the weight"):
        sparsegpt(torch.tensor([[1.0, math.nan]]), torch.eye(2), 0.5, ANY)


def test_a_dimension_that_is_no_multiple_of_the_group_is_an_error() -> None:
    with pytest.raises(InputError, match="10 input columns are no multiple of 4"):
        sparsegpt(torch.ones(2, 10), torch.eye(10), 0.5, Pattern(2, 4))


# --- the central core of an MPO -----------------------------------------------------------------------------------

SITES = [
    # in_dims, out_dims, bond_dims, central
    ((2, 3, 2), (3, 2, 2), (1, 4, 3, 1), 1),
    ((2, 2, 3, 2, 2), (2, 1, 2, 3, 2), (1, 3, 4, 5, 2, 1), 2),
    ((3, 2), (2, 3), (1, 4, 1), 0),
    ((3, 2), (2, 3), (1, 4, 1), 1),
    ((5,), (3,), (1, 1), 0),
]


def random_cores(in_dims: tuple[int, ...], out_dims: tuple[int, ...], bonds: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(9)
    shapes = zip(bonds[:-1], out_dims, in_dims, bonds[1:], strict=True)
    return [generator.normal(size=shape) for shape in shapes]


def right_entry(cores: list[np.ndarray], bond: int, outs: tuple[int, ...], ins: tuple[int, ...]) -> float:
    """R[b, o, r] as a product of small matrices, one for every core."""
    row = np.eye(cores[0].shape[0] if cores else 1)[bond]
    for core, o, i in zip(cores, outs, ins, strict=True):
        row = row @ core[:, o, i, :]
    return float(row[0])


@pytest.mark.parametrize(("in_dims", "out_dims", "bonds", "central"), SITES)
@pytest.mark.parametrize("padding", [0, 1])
def test_core_gram_sums_over_every_vector_that_reaches_the_centre(
    in_dims: tuple[int, ...], out_dims: tuple[int, ...], bonds: tuple[int, ...], central: int, padding: int
) -> None:
    cores = random_cores(in_dims, out_dims, bonds)
    x = np.random.default_rng(10).normal(size=(6, math.prod(in_dims) - padding))
    padded = np.pad(x, ((0, 0), (0, padding))).reshape(6, *in_dims)
    right, bond = cores[central + 1 :], bonds[central + 1]
    expected = np.zeros((in_dims[central] * bond,) * 2)
    for token in padded:
        for left in np.ndindex(*in_dims[:central]):
            for outs in np.ndindex(*out_dims[central + 1 :]):
                z = np.zeros((in_dims[central], bond))
                for i in range(in_dims[central]):
                    for b in range(bond):
                        for ins in np.ndindex(*in_dims[central + 1 :]):
                            z[i, b] += right_entry(right, b, outs, ins) * token[(*left, i, *ins)]
                expected += np.outer(z, z)
    gram = torch.tensor(x.T @ x)
    got = core_gram([torch.tensor(core) for core in right], gram, in_dims, central)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("in_dims", "out_dims", "bonds", "central"), SITES)
def test_core_gram_weighs_a_change_of_the_core_by_what_it_does_to_the_cores_output(
    in_dims: tuple[int, ...], out_dims: tuple[int, ...], bonds: tuple[int, ...], central: int
) -> None:
    """With nothing left of the centre, tr(D M Dᵀ) is the squared error of the whole layer's output."""
    in_dims, out_dims, bonds = in_dims[central:], out_dims[central:], (1, *bonds[central + 1 :])
    cores = random_cores(in_dims, out_dims, bonds)
    change = np.random.default_rng(11).normal(size=cores[0].shape)
    x = np.random.default_rng(12).normal(size=(8, math.prod(in_dims)))
    y = np.zeros((8, math.prod(out_dims)))
    for row, outs in enumerate(np.ndindex(*out_dims)):
        for column, ins in enumerate(np.ndindex(*in_dims)):
            first = change[0, outs[0], ins[0], :]
            entry = sum(first[b] * right_entry(cores[1:], b, outs[1:], ins[1:]) for b in range(len(first)))
            y[:, row] += entry * x[:, column]
    flat = change.reshape(out_dims[0], -1)  # (left · out, in · right)
    gram = core_gram([torch.tensor(core) for core in cores[1:]], torch.tensor(x.T @ x), in_dims, 0).numpy()
    assert np.trace(flat @ gram @ flat.T) == pytest.approx(np.sum(y**2), rel=1e-11)

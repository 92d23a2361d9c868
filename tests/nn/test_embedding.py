import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import (
    LAW,
    Recorder,
    capped_sites,
    dense_by_einsum,
    distance,
    gaussian,
    integer_cores,
    matrix_by_loops,
    random_cores,
    to_numpy,
)
from torch.autograd import gradcheck
from torch.nn import functional as F

import mpocli.nn.embedding as implementation
from mpocli.mpo import MPO, SiteShape, Truncation
from mpocli.nn import MPOEmbedding

# Row factors, column factors, bonds, and the table's size where it is not their product.
TABLES = {
    "five": ((3, 2, 4, 2, 3), (2, 1, 3, 2, 2), (1, 4, 6, 5, 3, 1), (139, 23)),
    "two": ((6, 7), (3, 4), (1, 5, 1), (42, 12)),
    "four": ((3, 2, 2, 4), (2, 2, 1, 3), (1, 3, 4, 5, 1), (47, 12)),
    "svd": ((40, 1), (1, 9), (1, 4, 1), (40, 9)),
    "svd_left": ((1, 40), (9, 1), (1, 4, 1), (40, 9)),
    "ones": ((4, 1, 1, 1, 5), (3, 1, 1, 1, 2), (1, 4, 4, 4, 3, 1), (19, 6)),
    "bond_one": ((3, 2, 4), (2, 3, 2), (1, 1, 1, 1), (24, 12)),
}
EVERY_TABLE = pytest.mark.parametrize("name", TABLES)


def table_of(name, seed=0, dtype=torch.float64, **options):
    out_dims, in_dims, bonds, shape = TABLES[name]
    mpo = MPO(tuple(random_cores(out_dims, in_dims, bonds, seed)), shape)
    return MPOEmbedding.from_mpo(mpo, dtype=dtype, **options)


def dense(table):
    return dense_by_einsum(table.cores)[: table.num_embeddings, : table.embedding_dim]


@EVERY_TABLE
def test_every_id_finds_its_row(name):
    table = table_of(name)
    ids = torch.arange(table.num_embeddings)
    assert distance(table(ids), dense(table)) < 1e-14
    assert distance(table(ids.flip(0)), dense(table).flip(0)) < 1e-14
    for k in ids[:: max(1, len(ids) // 7)]:
        assert distance(table(k), dense(table)[k]) < 1e-13


@LAW
@given(capped_sites(largest=5), st.data())
@example(((1, 1), (1, 1), (1,)), None)
def test_lookup_is_the_dense_embedding_for_any_ids_and_shape(sites, data):
    out_dims, in_dims, bonds = sites
    cores = tuple(random_cores(out_dims, in_dims, (1, *bonds, 1)))
    table = MPOEmbedding.from_mpo(MPO(cores, (math.prod(out_dims), math.prod(in_dims))), dtype=torch.float64)
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3)) if data else [2]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, table.num_embeddings, shape))
    rows = table(ids)
    assert rows.shape == (*shape, table.embedding_dim)
    size = math.prod(float(core.norm()) for core in cores)
    assert float((rows - F.embedding(ids, dense(table))).detach().abs().max()) < 1e-14 * size


@EVERY_TABLE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_small_integers_are_looked_up_exactly_in_every_dtype(name, dtype):
    out_dims, in_dims, bonds, shape = TABLES[name]
    cores = integer_cores(out_dims, in_dims, bonds, seed=4)
    cores = [torch.where(torch.arange(core.shape[3]) < 2, core, 0.0) for core in cores]  # bond 2, to stay small
    matrix = matrix_by_loops(to_numpy(cores))[: shape[0], : shape[1]]
    assert 0 < np.abs(matrix).max() <= 128
    table = MPOEmbedding.from_mpo(MPO(tuple(cores), shape), dtype=dtype)
    rows = table(torch.arange(shape[0]))
    assert rows.dtype == dtype
    assert np.array_equal(rows.detach().double().numpy(), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_a_canonical_table_grows_with_the_root_of_the_bond(dtype):
    mpo = MPO.from_matrix(torch.from_numpy(gaussian(24, 24)), SiteShape((2, 3, 4), (4, 3, 2)), Truncation(max_bond=4))
    rows = MPOEmbedding.from_mpo(mpo, dtype=dtype)(torch.arange(24)).double()
    # As in a linear layer: n cores and n products, each moves the table by ≤ u √χ ‖W‖_F.
    bound = 2 * 3 * math.sqrt(4) * torch.finfo(dtype).eps / 2
    assert 0 < distance(rows, mpo.to_matrix()) <= bound


def test_repeated_ids_have_equal_rows_and_add_up_in_the_gradient():
    table = table_of("five")
    once = table(torch.tensor([7]))
    rows = table(torch.tensor([[7, 3], [7, 7]]))
    assert torch.equal(rows[0, 0], rows[1, 0]) and torch.equal(rows[0, 0], rows[1, 1])
    assert distance(rows[0, 0], once[0]) < 1e-14
    thrice = torch.autograd.grad(table(torch.tensor([7, 7, 7])).sum(), table.cores)
    single = torch.autograd.grad(table(torch.tensor([7])).sum(), table.cores)
    for many, one in zip(thrice, single, strict=True):
        assert distance(many, 3 * one) < 1e-14


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_no_ids_give_no_rows(shape):
    rows = table_of("five")(torch.zeros(shape, dtype=torch.long))
    assert rows.shape == (*shape, 23)
    assert rows.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_both_index_types_are_read(dtype):
    table = table_of("five")
    ids = torch.tensor([[0, 5], [138, 5]])
    assert torch.equal(table(ids.to(dtype)), table(ids))


@EVERY_TABLE
@pytest.mark.parametrize("where", ["below", "above"])
def test_an_id_outside_the_vocabulary_is_an_index_error_padding_rows_too(name, where):
    table = table_of(name)
    last = table.num_embeddings - 1
    table(torch.tensor([0, last]))
    bad = -1 if where == "below" else last + 1
    with pytest.raises(IndexError, match=f"in a table of {last + 1}"):
        table(torch.tensor([0, bad]))


@EVERY_TABLE
def test_padding_id_reads_its_row_and_gets_no_gradient(name):
    table = table_of(name, padding_idx=5)
    assert table.padding_idx == 5
    ids = torch.tensor([[1, 5, 5], [2, 5, 1]])
    assert distance(table(ids), F.embedding(ids, dense(table))) < 1e-13
    target = torch.from_numpy(gaussian(2, 3, table.embedding_dim))
    found = torch.autograd.grad((table(ids) * target).sum(), table.cores)
    oracle = (F.embedding(ids, dense(table), padding_idx=5) * target).sum()
    for gradient, expected in zip(found, torch.autograd.grad(oracle, table.cores), strict=True):
        assert distance(gradient, expected) < 1e-12
    alone = torch.autograd.grad(table(torch.tensor([5, 5])).sum(), table.cores)
    assert not any(gradient.any() for gradient in alone)
    unpadded = table_of(name)
    assert all(gradient.any() for gradient in torch.autograd.grad(unpadded(torch.tensor([5])).sum(), unpadded.cores))


@EVERY_TABLE
@pytest.mark.parametrize("scale", [8.0, -0.5, 0.0])
def test_scale_multiplies_rows_and_gradients_but_not_the_stored_table(name, scale):
    plain, scaled = table_of(name), table_of(name, scale=scale)
    ids = torch.arange(0, plain.num_embeddings, 2)
    assert distance(scaled(ids), scale * dense(plain)[ids]) < 1e-14
    assert torch.equal(scaled.dense_weight(), plain.dense_weight())
    found = torch.autograd.grad(scaled(ids).sum(), scaled.cores)
    for gradient, one in zip(found, torch.autograd.grad(plain(ids).sum(), plain.cores), strict=True):
        assert distance(gradient, scale * one) < 1e-12


@EVERY_TABLE
@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
@pytest.mark.parametrize("digits", [0, 64])
def test_values_and_gradients_do_not_depend_on_the_chunks(monkeypatch, name, chunk, digits):
    monkeypatch.setattr(implementation, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(implementation, "_MAX_DIGITS", digits)
    table = table_of(name)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, table.num_embeddings, (3, 17)))
    target = torch.from_numpy(gaussian(3, 17, table.embedding_dim))
    oracle = F.embedding(ids, dense(table))
    rows = table(ids)
    assert distance(rows, oracle) < 1e-14
    found = torch.autograd.grad((rows * target).sum(), table.cores)
    for gradient, expected in zip(found, torch.autograd.grad((oracle * target).sum(), table.cores), strict=True):
        assert distance(gradient, expected) < 1e-13
    with torch.no_grad():
        assert distance(table(ids), oracle) < 1e-14


@EVERY_TABLE
def test_gradients_of_every_core_are_those_through_an_explicit_table(name):
    table = table_of(name)
    ids = torch.arange(table.num_embeddings)
    target = torch.from_numpy(gaussian(*table.shape))
    found = torch.autograd.grad((table(ids) * target).sum(), table.cores)
    for gradient, expected in zip(found, torch.autograd.grad((dense(table) * target).sum(), table.cores), strict=True):
        assert expected.any()
        assert distance(gradient, expected) < 1e-13


@pytest.mark.parametrize("name", ["bond_one", "svd", "ones"])
def test_lookup_passes_gradcheck(name):
    table = table_of(name, padding_idx=None, scale=2.0)
    ids = torch.tensor([[0, 3], [17, 3]])
    assert gradcheck(lambda *cores: table(ids), table.cores)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("out_dims", "in_dims", "bonds"),
    [
        ((6, 8, 10, 8), (4, 4, 4, 3), (1, 8, 16, 8, 1)),
        ((60, 64), (16, 12), (1, 16, 1)),
        ((3840, 1), (1, 192), (1, 16, 1)),
    ],
)
def test_lookup_never_builds_the_table(out_dims, in_dims, bonds, training):
    table = MPOEmbedding.from_mpo(
        MPO(tuple(random_cores(out_dims, in_dims, bonds)), (math.prod(out_dims), math.prod(in_dims)))
    )
    ids = torch.arange(0, 3840, 60).reshape(4, 16)
    with Recorder() as lookup, torch.set_grad_enabled(training):
        rows = table(ids)
        if training:
            rows.sum().backward()
    assert lookup.largest < math.prod(table.shape) / 2
    with Recorder() as rebuild:
        table.dense_weight()
    assert rebuild.largest == math.prod(table.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("out_dims", "in_dims", "bonds"),
    [
        ((6, 8, 10, 8), (4, 4, 4, 3), (1, 8, 16, 8, 1)),
        ((6, 8, 10, 8), (3, 4, 4, 4), (1, 8, 16, 8, 1)),
        ((6, 8, 10, 8), (4, 4, 4, 3), (1, 24, 48, 24, 1)),
        ((60, 64), (16, 12), (1, 16, 1)),
        ((3840, 1), (1, 192), (1, 16, 1)),
        ((1, 3840), (192, 1), (1, 16, 1)),
    ],
)
def test_intermediates_stay_below_the_chunk_size(monkeypatch, out_dims, in_dims, bonds, training):
    chunk = 300_000
    monkeypatch.setattr(implementation, "_CHUNK_ELEMENTS", chunk)
    table = MPOEmbedding.from_mpo(
        MPO(tuple(random_cores(out_dims, in_dims, bonds)), (math.prod(out_dims), math.prod(in_dims)))
    )
    ids = torch.arange(0, 3840, 3)
    assert max(chunk, *(core.numel() for core in table.cores), ids.numel() * table.embedding_dim) == chunk
    with Recorder() as lookup, torch.set_grad_enabled(training):
        rows = table(ids)
        if training:
            rows.sum().backward()
    assert lookup.largest <= chunk


@pytest.mark.parametrize("dims", [((3840, 1), (1, 192)), ((1, 3840), (192, 1))])
def test_lookup_in_an_svd_table_handles_no_more_than_two_thin_factors(dims):
    table = MPOEmbedding.from_mpo(MPO(tuple(random_cores(*dims, (1, 16, 1))), (3840, 192)))
    ids = torch.arange(0, 3840, 3)
    with Recorder() as lookup, torch.no_grad():
        table(ids)
    thin = sum(core.numel() for core in table.cores) + ids.numel() * (16 + 192)
    assert lookup.elements < 8 * thin  # some reshapes of each, but not ids × 16 × 192


@EVERY_TABLE
def test_dense_weight_is_the_table(name):
    table = table_of(name)
    assert table.dense_weight().shape == (table.num_embeddings, table.embedding_dim)
    assert distance(table.dense_weight(), dense(table)) < 1e-14


@EVERY_TABLE
def test_autocast_leaves_the_rows_as_exact_as_the_dense_table(name):
    table = table_of(name, dtype=torch.float32)
    ids = torch.arange(table.num_embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        rows = table(ids)
        assert rows.dtype == torch.nn.Embedding(2, 2)(torch.tensor([1])).dtype == torch.float32
    assert torch.equal(rows, table(ids))


def test_a_decomposed_embedding_reads_what_it_did():
    original = torch.nn.Embedding(23, 12, padding_idx=0, dtype=torch.float64)
    mpo = MPO.from_matrix(original.weight.detach(), SiteShape((2, 3, 4), (3, 2, 2)))
    table = MPOEmbedding.from_mpo(mpo, padding_idx=0, dtype=torch.float64)
    ids = torch.tensor([[0, 22, 5], [5, 1, 0]])
    assert float((table(ids) - original(ids)).detach().abs().max()) < 1e-13

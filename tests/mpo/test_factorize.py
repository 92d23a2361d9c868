import math
from itertools import permutations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import LAW

from mpocli.errors import InputError
from mpocli.mpo import SiteShape, site_shape
from mpocli.mpo.factorize import _best_order
from mpocli.mpo.tables import published_shape


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (30720, 768, "6,8,10,8,8x4,4,4,4,3"),
        (30522, 768, "6,8,10,8,8x4,4,4,4,3"),
        (3072, 768, "4,4,8,6,4x3,4,4,4,4"),
        (768, 3072, "3,4,4,4,4x4,4,8,6,4"),
        (768, 768, "3,4,4,4,4x4,4,4,4,3"),
        (30000, 128, "5,10,10,10,6x2,2,4,4,2"),
        (1024, 1024, "4,4,4,4,4x4,4,4,4,4"),
        (4096, 1024, "4,4,8,8,4x4,4,4,4,4"),
        (32128, 768, "8,8,8,8,8x3,4,4,4,4"),
    ],
)
def test_five_site_default_is_the_papers_shape(rows, columns, expected):
    assert str(site_shape(rows, columns, 5)) == expected


@pytest.mark.parametrize(("rows", "columns"), [(3072, 768), (4096, 1024)])
def test_a_matrix_and_its_transpose_have_transposed_five_site_shapes(rows, columns):
    up, down = site_shape(rows, columns, 5), site_shape(columns, rows, 5)
    assert (up.out_dims, up.in_dims) == (down.in_dims, down.out_dims)


def test_every_published_shape_fits_its_matrix():
    sizes = [128, 768, 1024, 3072, 4096, 30000, 30522, 30720, 32128, 50257]
    found = 0
    for sites in (3, 5, 7, 9):
        for rows in sizes:
            for columns in sizes:
                shape = published_shape(rows, columns, sites)
                if shape is not None:
                    shape.check_fits((rows, columns))
                    assert shape.sites == sites
                    found += 1
    assert found == 12 + 16 + 16 + 16  # 768, 3072, 1024 and 4096 squared, and BERT's four for nine sites


@pytest.mark.parametrize("sites", [3, 5, 7, 9])
@pytest.mark.parametrize(
    ("rows", "columns"),
    # BERT, T5 and GPT-2: attention, feed-forward both ways, fused q/k/v; small, base and large
    [(768, 768), (3072, 768), (768, 3072), (2304, 768), (512, 512), (2048, 512), (1024, 1024), (1024, 4096)],
)
def test_model_widths_factor_without_padding(rows, columns, sites):
    shape = site_shape(rows, columns, sites)
    assert shape.sites == sites
    assert shape.padded_shape == (rows, columns)


@pytest.mark.parametrize("sites", range(2, 10))
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 13, 127, 1009, 30522, 50257, 65521, 151936])
def test_primes_and_vocabularies_are_padded_by_at_most_a_tenth(rows, sites):
    site_shape(rows, 768, sites).check_fits((rows, 768))
    site_shape(768, rows, sites).check_fits((768, rows))
    assert site_shape(rows, rows, sites).sites == sites


@LAW
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(2, 9))
def test_any_size_is_covered_with_at_most_a_tenth_of_padding(rows, columns, sites):
    shape = site_shape(rows, columns, sites)
    assert shape.sites == sites
    assert rows <= shape.padded_shape[0] <= 1.1 * rows
    assert columns <= shape.padded_shape[1] <= 1.1 * columns


def params_by_definition(sizes):
    """Σ d_{k−1} s_k d_k with d_k = min of the products left and right, for sites of s_k = o_k i_k."""
    bonds = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1)]
    return sum(bonds[k] * size * bonds[k + 1] for k, size in enumerate(sizes))


@LAW
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 5))
def test_no_other_order_of_the_same_sites_has_fewer_parameters(rows, columns, sites):
    shape = site_shape(rows, columns, sites)
    if published_shape(rows, columns, sites) is None:
        assert shape.num_params() == min(params_by_definition(order) for order in permutations(shape.site_sizes))


@LAW
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=2, max_size=5))
@example([(2, 1), (3, 1), (8, 1), (100, 1), (2, 1)])  # the largest site stands best beside the centre
def test_the_chosen_order_of_uneven_sites_has_the_fewest_parameters(pairs):
    shape = _best_order(pairs)
    assert sorted(zip(shape.out_dims, shape.in_dims, strict=True)) == sorted(pairs)
    sizes = [o * i for o, i in pairs]
    assert shape.num_params() == min(params_by_definition(order) for order in permutations(sizes))


@LAW
@given(st.integers(2, 3000), st.integers(2, 3000), st.integers(2, 4))
def test_no_other_pairing_of_the_same_factors_has_fewer_parameters(rows, columns, sites):
    shape = site_shape(rows, columns, sites)
    if published_shape(rows, columns, sites) is None:
        others = (
            params_by_definition([o * i for o, i in zip(out, in_, strict=True)])
            for out in permutations(shape.out_dims)
            for in_ in permutations(shape.in_dims)
        )
        assert shape.num_params() == min(others)


def test_order_decides_the_size_of_384_squared():
    shape = site_shape(384, 384, 5)
    assert round(shape.num_params() / 384**2, 3) == 1.125
    assert sorted(shape.out_dims) == sorted(shape.in_dims) == [2, 3, 4, 4, 4]
    # The same factors in one other order, from the largest down, cost a third more.
    assert SiteShape((4, 4, 4, 3, 2), (4, 4, 4, 3, 2)).num_params() / 384**2 > 1.45


def test_a_size_one_short_of_even_factors_is_padded_by_that_one():
    assert str(site_shape(127, 128, 7)) == ",".join("2" * 7) + "x" + ",".join("2" * 7)
    assert site_shape(1023, 1025, 5).padded_shape[0] == 1024


def test_small_sizes_use_sites_of_one():
    assert str(site_shape(1, 1, 4)) == "1,1,1,1x1,1,1,1"
    assert sorted(site_shape(2, 3, 3).out_dims) == [1, 1, 2]
    assert sorted(site_shape(2, 3, 3).in_dims) == [1, 1, 3]


@pytest.mark.parametrize(("rows", "columns", "sites"), [(4, 4, 1), (4, 4, 0), (0, 4, 3), (4, 0, 3)])
def test_fewer_than_two_sites_or_an_empty_matrix_is_an_input_error(rows, columns, sites):
    with pytest.raises(InputError, match=f"{rows}x{columns} matrix on {sites} sites"):
        site_shape(rows, columns, sites)


def test_bert_base_at_a_cap_of_256_counts_73_million():
    dense = 109_482_240  # BertModel, bert-base-uncased
    embedding = site_shape(30522, 768, 5)
    up, down = site_shape(3072, 768, 5), site_shape(768, 3072, 5)
    assert embedding.capped_bond_dims(256) == (1, 24, 256, 256, 24, 1)  # 768 → 256
    assert up.capped_bond_dims(256) == down.capped_bond_dims(256) == (1, 12, 192, 256, 16, 1)  # 384 → 256
    embedding_params = 24 * 24 + 24 * 32 * 256 + 256 * 40 * 256 + 256 * 32 * 24 + 24 * 24
    ffn_params = 12 * 12 + 12 * 16 * 192 + 192 * 32 * 256 + 256 * 24 * 16 + 16 * 16
    assert embedding.num_params(embedding.capped_bond_dims(256)) == embedding_params == 3_015_808
    assert up.num_params(up.capped_bond_dims(256)) == ffn_params == 1_708_432
    kept = dense - 30522 * 768 - 24 * 3072 * 768
    total = kept + embedding_params + 24 * ffn_params
    assert f"{dense / 1e6:.2f}M → {total / 1e6:.2f}M" == "109.48M → 73.44M"

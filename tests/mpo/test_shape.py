import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import LAW, gaussian, matrix_by_loops, pad, random_cores, ranks, site_dims, to_numpy

from mpocli.errors import InputError
from mpocli.mpo import SiteShape

# Sources: mpo-papers §1.4, slides' example of MPOP.
PAPERS = [
    # shape, inner bonds, ratio, central share in %, auxiliary parameters
    ("5,10,10,10,6x2,2,4,4,2", (10, 200, 480, 12), 1.070, 93.4, 270_644),
    ("4,4,8,6,4x3,4,4,4,4", (12, 192, 384, 16), 1.078, 92.7, 184_720),
    ("3,4,4,4,4x4,4,8,6,4", (12, 192, 384, 16), 1.078, 92.7, 184_720),
    ("8,4,4,4,6x3,4,4,4,4", (24, 384, 384, 24), 1.125, 88.9, 296_064),
    ("3,4,4,4,4x4,4,4,4,3", (12, 192, 192, 12), 1.125, 88.9, 74_016),
    ("4,4,4,4,3x4,4,4,4,3", (16, 256, 144, 9), 1.147, 87.2, 86_609),
    ("4,4,4,4,4x4,4,4,4,4", (16, 256, 256, 16), 1.125, 88.9, 131_584),
    ("4,4,8,8,4x4,4,4,4,4", (16, 256, 512, 16), 1.078, 92.7, 328_192),
    ("6,8,10,8,8x4,4,4,4,3", (24, 768, 768, 24), 1.050, 95.2, 1_180_800),
    ("4,8,20,12,4x4,4,4,4,3", (16, 512, 576, 12), 1.025, 97.5, 594_320),
]


@pytest.mark.parametrize(("text", "inner", "ratio", "central_share", "auxiliary"), PAPERS)
def test_published_shape_has_the_published_counts(text, inner, ratio, central_share, auxiliary):
    shape = SiteShape.parse(text)
    params = shape.num_params()
    assert shape.full_bond_dims == (1, *inner, 1)
    assert round(params / math.prod(shape.padded_shape), 3) == ratio
    assert round(100 * shape.core_sizes()[shape.central] / params, 1) == central_share
    assert params - shape.core_sizes()[shape.central] == auxiliary


@pytest.mark.parametrize(
    ("text", "inner", "ratio"),
    [
        ("8,8,8,8,8x3,4,4,4,4", (24, 768, 1024, 32), "1.065"),
        ("8,8,8,8,8x4,4,4,4,4", (32, 1024, 1024, 32), "1.063"),
        ("2,3,4,4,4,2x2,3,4,4,4,2", (4, 36, 576, 64, 4), "1.57"),
        ("2,2,2,2,3,2,2,2,2x2,2,2,2,3,2,2,2,2", (4, 16, 64, 256, 256, 64, 16, 4), "1.24"),
        ("3,4,1,1,4,4,4x4,4,1,1,4,4,3", (12, 192, 192, 192, 192, 12), "1.25"),
        ("8,2,2,2,2,6x8,2,2,2,2,6", (64, 256, 576, 144, 36), "1.72"),
        ("32,1,1,1,1,1,1,1,1,1,1,1,1,1,24x32,1,1,1,1,1,1,1,1,1,1,1,1,1,24", (576,) * 14, "8.88"),
        ("32,24x32,24", (576,), "1.56"),
    ],
)
def test_shape_of_any_length_has_the_published_bonds_and_ratio(text, inner, ratio):
    shape = SiteShape.parse(text)
    assert shape.full_bond_dims == (1, *inner, 1)
    decimals = len(ratio.partition(".")[2])
    assert f"{shape.num_params() / math.prod(shape.padded_shape):.{decimals}f}" == ratio


def test_core_sizes_are_the_slides_example():
    shape = SiteShape.parse("3,4,4,4,4x4,4,8,6,4")
    products = [1 * 3 * 4 * 12, 12 * 4 * 4 * 192, 192 * 4 * 8 * 384, 384 * 4 * 6 * 16, 16 * 4 * 4 * 1]
    assert list(shape.core_sizes()) == products
    assert [f"{100 * size / sum(products):.2g}" for size in products] == ["0.0057", "1.4", "93", "5.8", "0.01"]


@LAW
@given(site_dims(), st.integers(0, 999))
def test_full_bonds_are_the_ranks_of_a_gaussian_matrix(dims, seed):
    shape = SiteShape(*dims)
    assert shape.full_bond_dims == ranks(gaussian(*shape.padded_shape, seed=seed), *dims)


@LAW
@given(st.data())
def test_capped_bonds_are_the_ranks_that_random_cores_of_that_size_reach(data):
    dims = data.draw(site_dims(max_elements=300))
    caps = data.draw(st.tuples(*[st.integers(1, 6)] * (len(dims[0]) - 1)))
    shape = SiteShape(*dims)
    bonds = [1, *(min(full, cap) for full, cap in zip(shape.full_bond_dims[1:-1], caps, strict=True)), 1]
    matrix = matrix_by_loops(to_numpy(random_cores(*dims, bonds)))
    assert shape.capped_bond_dims(caps) == ranks(matrix, *dims)


@LAW
@given(site_dims(), st.integers(1, 40))
@example(((3, 4, 4), (4, 4, 3)), 1)
def test_one_cap_is_the_smaller_of_cap_and_full_bond_everywhere(dims, cap):
    shape = SiteShape(*dims)
    expected = (1, *(min(cap, full) for full in shape.full_bond_dims[1:-1]), 1)
    assert shape.capped_bond_dims(cap) == expected
    assert shape.capped_bond_dims((cap,) * (shape.sites - 1)) == expected
    assert shape.capped_bond_dims(None) == shape.full_bond_dims


def test_a_list_of_caps_needs_one_for_each_inner_bond():
    shape = SiteShape((2, 2, 2), (2, 2, 2))
    assert shape.capped_bond_dims((3, 2)) == (1, 3, 2, 1)
    for caps in [(3,), (3, 2, 2)]:
        with pytest.raises(InputError, match=f"{len(caps)} bond dimensions for 3 sites"):
            shape.capped_bond_dims(caps)


@LAW
@given(site_dims(), st.integers(1, 9))
def test_parameters_are_the_elements_of_the_cores(dims, cap):
    shape = SiteShape(*dims)
    bonds = shape.capped_bond_dims(cap)
    cores = random_cores(*dims, bonds)
    assert shape.core_sizes(bonds) == tuple(core.numel() for core in cores)
    assert shape.num_params(bonds) == sum(core.numel() for core in cores)


def test_a_full_bond_mpo_of_three_sites_or_more_is_larger_than_its_matrix():
    for text, *_ in PAPERS:
        shape = SiteShape.parse(text)
        assert shape.num_params() > math.prod(shape.padded_shape)


def test_central_core_is_the_middle_one_and_left_of_the_middle_for_even_counts():
    assert [SiteShape((2,) * n, (2,) * n).central for n in range(2, 10)] == [0, 1, 1, 2, 2, 3, 3, 4]


@LAW
@given(site_dims(max_sites=9))
def test_text_of_a_shape_parses_to_the_shape(dims):
    shape = SiteShape(*dims)
    assert SiteShape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "x", "3,4", "3,4x", "x3,4", "3,ax4,4", "3,,4x4,4,4", "3.5,4x4,4", "2,2x2,2x2,2"])
def test_text_that_is_no_shape_is_an_input_error_that_shows_the_form(text):
    with pytest.raises(InputError, match="rows x columns"):
        SiteShape.parse(text)


def test_parsing_unequal_numbers_of_factors_names_both_numbers():
    with pytest.raises(InputError, match="2 row factors and 3 column factors"):
        SiteShape((2, 3), (4, 1, 1))
    with pytest.raises(InputError, match="2 row factors and 3 column factors"):
        SiteShape.parse("2,3x4,1,1")


@pytest.mark.parametrize("dims", [((6,), (6,)), ((), ()), ((2, 0), (2, 2)), ((2, 2), (-2, -2))])
def test_one_site_or_a_factor_below_one_is_an_input_error(dims):
    with pytest.raises(InputError, match="two sites or more and factors of 1 or more"):
        SiteShape(*dims)


@pytest.mark.parametrize("size", [1, 7, 99, 100, 110, 111, 30720])
def test_padding_of_a_tenth_fits_and_one_more_row_or_column_does_not(size):
    largest = size * 11 // 10
    SiteShape((largest, 1), (1, size)).check_fits((size, size))
    SiteShape((size, 1), (1, largest)).check_fits((size, size))
    for rows, columns, word, product in [
        (largest + 1, size, "rows", largest + 1),
        (size, largest + 1, "columns", largest + 1),
    ]:
        with pytest.raises(InputError, match=rf"layer\.3: .* makes {product} {word}, the matrix has {size}\b"):
            SiteShape((rows, 1), (1, columns)).check_fits((size, size), "layer.3")


def test_products_below_the_matrix_do_not_fit_and_the_hint_names_the_range():
    with pytest.raises(InputError, match=r"makes 12 rows, the matrix has 13.*between 13 and 14"):
        SiteShape((3, 4), (5, 5)).check_fits((13, 25))


def test_padding_an_array_changes_no_element_of_it():
    matrix = gaussian(5, 7)
    padded = pad(matrix, (2, 3), (2, 4))
    assert padded.shape == (6, 8)
    assert np.array_equal(padded[:5, :7], matrix) and not padded[5:].any() and not padded[:, 7:].any()

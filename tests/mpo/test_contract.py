import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import LAW, Recorder, distance, gaussian, integer_cores, matrix_by_loops, random_cores, site_dims, to_numpy
from torch.autograd import gradcheck

from mpocli.mpo import SiteShape, apply_chain, chain_macs, choose_path, rebuild_macs, site_shape, to_dense


@st.composite
def chains(draw, max_elements=120):
    """Row factors, column factors, and bonds that need not be reachable."""
    dims = draw(site_dims(max_elements=max_elements))
    return *dims, (1, *(draw(st.integers(1, 5)) for _ in dims[0][1:]), 1)


@LAW
@given(chains())
@example(((6, 1), (1, 5), (1, 3, 1)))
@example(((1, 1, 1), (1, 1, 1), (1, 1, 1, 1)))
@example(((2, 2, 1, 2, 2, 2, 1, 2, 2), (1, 2, 1, 1, 2, 1, 1, 2, 1), (1, 2, 3, 4, 5, 4, 3, 2, 2, 1)))
def test_matrix_is_the_definition_exactly_on_integers(chain):
    cores = integer_cores(*chain)
    assert np.array_equal(to_dense(cores).numpy(), matrix_by_loops(to_numpy(cores)))


@LAW
@given(chains(), st.integers(1, 5), st.sampled_from(["left", "right"]))
@example(((6, 1), (1, 5), (1, 3, 1)), 2, "left")
@example(((1, 5), (6, 1), (1, 3, 1)), 2, "right")
@example(((1, 1), (1, 1), (1, 1, 1)), 1, "left")
def test_chain_from_either_end_is_x_times_the_transpose_exactly_on_integers(chain, batch, path):
    cores = integer_cores(*chain)
    matrix = matrix_by_loops(to_numpy(cores))
    x = np.random.default_rng(1).integers(-3, 4, (batch, matrix.shape[1])).astype(float)
    assert np.array_equal(apply_chain(torch.from_numpy(x), cores, path).numpy(), x @ matrix.T)


@LAW
@given(chains(), st.sampled_from([1.0, 1e-70, 1e70]))
def test_real_cores_contract_to_round_off_whatever_the_path(chain, scale):
    cores = random_cores(*chain)
    cores[0] = cores[0] * scale
    matrix = to_dense(cores)
    assert distance(matrix, matrix_by_loops(to_numpy(cores))) < 1e-12
    x = torch.from_numpy(gaussian(3, matrix.shape[1]))
    size = float(torch.linalg.vector_norm(x)) * math.prod(float(core.norm()) for core in cores)
    for path in ("left", "right"):
        assert float((apply_chain(x, cores, path) - x @ matrix.T).norm()) < 1e-14 * size


@pytest.mark.parametrize("path", ["left", "right"])
def test_chain_of_an_empty_batch_is_empty(path):
    cores = random_cores((2, 3), (3, 4), (1, 2, 1))
    assert apply_chain(torch.zeros(0, 12, dtype=torch.float64), cores, path).shape == (0, 6)


@LAW
@given(chains())
@example(((6, 1), (1, 5), (1, 3, 1)))
@example(((2, 2, 2, 2), (3, 1, 2, 2), (1, 2, 5, 3, 1)))
def test_predicted_costs_are_the_multiplications_that_run(chain):
    cores = random_cores(*chain)
    with Recorder() as rebuild:
        to_dense(cores)
    assert rebuild_macs(*chain) == rebuild.macs
    for path in ("left", "right"):
        with Recorder() as run:
            apply_chain(torch.ones(3, math.prod(chain[1]), dtype=torch.float64), cores, path)
        assert 3 * chain_macs(*chain, path) == run.macs


def test_costs_of_small_chains_are_those_counted_by_hand():
    two = ((2, 3), (5, 7), (1, 4, 1))
    assert rebuild_macs(*two) == (2 * 5) * 4 * (3 * 7)
    assert chain_macs(*two, "left") == 7 * (5 * 2 * 4) + 2 * (4 * 7 * 3)
    assert chain_macs(*two, "right") == 5 * (7 * 3 * 4) + 3 * (4 * 5 * 2)
    three = ((2, 2, 2), (2, 2, 2), (1, 3, 5, 1))
    assert rebuild_macs(*three) == 4 * 3 * (4 * 5) + (4 * 4) * 5 * 4
    assert chain_macs(*three, "left") == 4 * (2 * 2 * 3) + (2 * 2) * (3 * 2 * 2 * 5) + 4 * (5 * 2 * 2)


def test_the_svd_shape_costs_what_two_thin_layers_cost():
    assert chain_macs((768, 1), (1, 512), (1, 64, 1), "right") == 64 * (768 + 512)
    assert chain_macs((1, 768), (512, 1), (1, 64, 1), "left") == 64 * (768 + 512)


@LAW
@given(chains(), st.integers(0, 200))
@example(((6, 1), (1, 5), (1, 1, 1)), 100)
@example(((1, 6), (5, 1), (1, 1, 1)), 100)
@example(((2, 2, 2), (2, 2, 2), (1, 4, 4, 1)), 100)
def test_chosen_path_runs_the_fewest_multiplications(chain, tokens):
    cores = random_cores(*chain)
    x = torch.ones(tokens or 1, math.prod(chain[1]), dtype=torch.float64)
    macs = {}
    with Recorder() as run:
        x @ to_dense(cores).T
    macs["rebuild"] = run.macs
    for path in ("left", "right"):
        with Recorder() as run:
            apply_chain(x, cores, path)
        macs[path] = run.macs
    if tokens:
        assert macs[choose_path(tokens, *chain)] == min(macs.values())


def test_every_path_is_chosen_somewhere():
    square = ((4, 4, 4), (4, 4, 4), (1, 16, 16, 1))
    assert choose_path(1000, *square) == "rebuild"
    assert choose_path(1000, (64, 1), (1, 64), (1, 4, 1)) == "right"
    assert choose_path(1000, (1, 64), (64, 1), (1, 4, 1)) == "left"


def test_rebuilding_a_full_bond_feed_forward_matrix_is_two_products_around_the_central_core():
    shape = site_shape(3072, 768, 5)
    pairs = 12 * 12 * (16 * 192) + 384 * (24 * 16) * 16  # cores 1·2 and 4·5
    outer = 192 * 192 * (32 * 384) + (192 * 32) * 384 * (24 * 16)  # with the central core between
    assert rebuild_macs(shape.out_dims, shape.in_dims, shape.full_bond_dims) == pairs + outer


@pytest.mark.parametrize(
    "chain",
    [
        ((2, 2, 2), (2, 1, 2), (1, 2, 3, 1)),
        ((3, 1), (1, 2), (1, 2, 1)),
        ((2, 1, 1, 2), (1, 1, 2, 1), (1, 2, 1, 2, 1)),
    ],
)
def test_contractions_pass_gradcheck(chain):
    cores = [core.requires_grad_() for core in random_cores(*chain)]
    x = torch.from_numpy(gaussian(2, math.prod(chain[1]))).requires_grad_()
    assert gradcheck(lambda *cores: to_dense(cores), cores)
    for path in ("left", "right"):
        assert gradcheck(lambda x, *cores, path=path: apply_chain(x, cores, path), (x, *cores))


def test_shape_and_costs_disagree_loudly_on_the_number_of_sites():
    with pytest.raises(ValueError, match="zip"):
        chain_macs((2, 2), (2, 2, 2), (1, 2, 1), "left")
    with pytest.raises(ValueError, match="zip"):
        rebuild_macs((2, 2), (2, 2, 2), (1, 2, 1))


def test_the_padded_matrix_has_the_sizes_of_the_site_shape():
    shape = SiteShape((3, 2), (2, 5))
    assert to_dense(random_cores(shape.out_dims, shape.in_dims, (1, 4, 1))).shape == shape.padded_shape == (6, 10)

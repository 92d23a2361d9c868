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

from mpocli.mpo import MPO, SiteShape, Truncation, chain_macs, choose_path, rebuild_macs
from mpocli.nn import MPOLinear

# Sites, bonds and number of tokens that make each path the cheapest.
PATHS = [
    ("rebuild", (3, 2, 3), (2, 3, 2), (1, 6, 6, 1), 500),
    ("right", (18, 1), (1, 12), (1, 2, 1), 5),
    ("left", (1, 18), (12, 1), (1, 2, 1), 5),
]


def layer_of(out_dims, in_dims, bonds, shape=None, bias=True, seed=0, **options):
    """A layer in float64 with Gaussian cores and bias."""
    mpo = MPO(tuple(random_cores(out_dims, in_dims, bonds, seed)), shape or (math.prod(out_dims), math.prod(in_dims)))
    given_bias = torch.from_numpy(gaussian(mpo.shape[0], seed=seed + 1)) if bias else None
    return MPOLinear.from_mpo(mpo, given_bias, dtype=torch.float64, **options)


@pytest.mark.parametrize(("path", "out_dims", "in_dims", "bonds", "tokens"), PATHS)
@pytest.mark.parametrize("crop", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_every_path_is_the_dense_layer(path, out_dims, in_dims, bonds, tokens, crop, bias):
    assert choose_path(tokens, out_dims, in_dims, bonds) == path
    layer = layer_of(out_dims, in_dims, bonds, shape=(18 - crop, 12 - crop), bias=bias)
    x = torch.from_numpy(gaussian(tokens, 12 - crop))
    weight = dense_by_einsum(layer.cores)[: 18 - crop, : 12 - crop]
    assert distance(layer(x), F.linear(x, weight, layer.bias)) < 1e-13


@pytest.mark.parametrize(("out_dims", "in_dims", "bonds"), [dims for _, *dims, _ in PATHS])
@pytest.mark.parametrize("tokens", [1, 2, 500])
def test_a_call_runs_no_more_multiplications_than_the_cheapest_path(out_dims, in_dims, bonds, tokens):
    layer = layer_of(out_dims, in_dims, bonds, bias=False)
    with Recorder() as run:
        layer(torch.ones(tokens, 12, dtype=torch.float64))
    rebuild = rebuild_macs(out_dims, in_dims, bonds) + tokens * 18 * 12
    chains = (tokens * chain_macs(out_dims, in_dims, bonds, path) for path in ("left", "right"))
    assert run.macs == min(rebuild, *chains)


@LAW
@given(capped_sites(largest=5), st.lists(st.integers(1, 3), max_size=3), st.booleans())
@example(((1, 1), (1, 1), (1,)), [], False)
@example(((2, 3), (3, 2), (4,)), [7, 1, 2], True)
def test_any_leading_shape_is_kept(sites, leading, bias):
    out_dims, in_dims, bonds = sites
    layer = layer_of(out_dims, in_dims, (1, *bonds, 1), bias=bias)
    x = torch.from_numpy(gaussian(*leading, layer.in_features))
    y = layer(x).detach()
    assert y.shape == (*leading, layer.out_features)
    expected = (x @ dense_by_einsum(layer.cores).T + (layer.bias if bias else 0.0)).detach()
    size = float(x.norm()) * math.prod(float(core.norm()) for core in layer.to_mpo().cores) + float(expected.norm())
    assert float((y - expected).norm()) < 1e-14 * size


@pytest.mark.parametrize("shape", [(0, 12), (0, 5, 12), (5, 0, 12)])
@pytest.mark.parametrize(("path", "out_dims", "in_dims", "bonds", "tokens"), PATHS)
def test_an_empty_batch_gives_an_empty_result(path, out_dims, in_dims, bonds, tokens, shape):
    layer = layer_of(out_dims, in_dims, bonds)
    assert layer(torch.zeros(shape, dtype=torch.float64)).shape == (*shape[:-1], 18)


def test_a_decomposed_linear_layer_computes_what_it_did():
    dense = torch.nn.Linear(22, 24, dtype=torch.float64)
    mpo = MPO.from_matrix(dense.weight.detach(), SiteShape((2, 3, 4), (2, 4, 3)))
    layer = MPOLinear.from_mpo(mpo, dense.bias, dtype=torch.float64)
    x = torch.from_numpy(gaussian(4, 7, 22))
    assert distance(layer(x), dense(x)) < 1e-13
    with torch.no_grad():
        dense.bias.zero_()
    assert layer.bias.any()  # its own copy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out_dims", "in_dims", "bonds", "tokens"),
    [
        ((2, 3, 2), (2, 2, 2), (1, 2, 2, 1), 200),  # rebuilt
        ((2, 3, 2), (2, 2, 2), (1, 2, 2, 1), 1),
        ((12, 1), (1, 8), (1, 3, 1), 3),  # from the right
        ((1, 12), (8, 1), (1, 3, 1), 3),  # from the left
    ],
)
def test_small_integers_are_exact_in_every_dtype(dtype, out_dims, in_dims, bonds, tokens):
    cores = integer_cores(out_dims, in_dims, bonds)
    matrix = matrix_by_loops(to_numpy(cores))
    x = np.random.default_rng(2).integers(-1, 2, (tokens, matrix.shape[1])).astype(float)
    bias = np.arange(len(matrix)) - 4.0
    expected = x @ matrix.T + bias
    assert np.abs(expected).max() <= 128 and expected.any()  # integers that bfloat16 holds
    layer = MPOLinear.from_mpo(MPO(tuple(cores), matrix.shape), torch.from_numpy(bias), dtype=dtype)
    y = layer(torch.from_numpy(x).to(dtype))
    assert y.dtype == dtype
    assert np.array_equal(y.detach().double().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 300])
def test_rounding_of_a_canonical_layer_grows_with_the_root_of_the_bond(dtype, tokens):
    weight = torch.from_numpy(gaussian(24, 24))
    mpo = MPO.from_matrix(weight, SiteShape((2, 3, 4), (4, 3, 2)), Truncation(max_bond=4))
    layer = MPOLinear.from_mpo(mpo, dtype=dtype)
    x = torch.from_numpy(gaussian(tokens, 24)).to(dtype)
    exact = x.double() @ mpo.to_matrix().T
    # Rounding an isometry of χ columns moves W by ≤ u √χ ‖W‖_F; so does rounding a product with it. There are
    # n cores and n products, and x is as long as ‖x‖_F over all tokens.
    unit = torch.finfo(dtype).eps / 2
    bound = 2 * 3 * math.sqrt(4) * unit * float(mpo.to_matrix().norm()) * float(x.double().norm())
    error = float((layer(x).detach().double() - exact).norm())
    assert error <= bound < float(exact.norm()) / 3


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dense_weight_is_what_the_dense_layer_of_that_kind_stores(kind):
    layer = layer_of((3, 2), (2, 5), (1, 4, 1), kind=kind)
    x = torch.from_numpy(gaussian(4, 10))
    stored = layer.dense_weight()
    assert stored.is_contiguous()
    if kind == "linear":
        assert stored.shape == (6, 10)
        expected = F.linear(x, stored, layer.bias)
    else:
        assert stored.shape == (10, 6)
        expected = torch.addmm(layer.bias, x, stored)  # GPT-2's Conv1D
    assert distance(layer(x), expected) < 1e-13


@pytest.mark.parametrize(("path", "out_dims", "in_dims", "bonds", "tokens"), PATHS)
@pytest.mark.parametrize("crop", [0, 1])
def test_gradients_are_those_through_an_explicit_matrix(path, out_dims, in_dims, bonds, tokens, crop):
    layer = layer_of(out_dims, in_dims, bonds, shape=(18 - crop, 12 - crop))
    x = torch.from_numpy(gaussian(tokens, 12 - crop)).requires_grad_()
    target = torch.from_numpy(gaussian(tokens, 18 - crop, seed=3))
    wanted = [x, *layer.cores, layer.bias]
    found = torch.autograd.grad((layer(x) * target).sum(), wanted)
    weight = dense_by_einsum(layer.cores)[: 18 - crop, : 12 - crop]
    expected = torch.autograd.grad(((x @ weight.T + layer.bias) * target).sum(), wanted)
    for gradient, oracle in zip(found, expected, strict=True):
        assert oracle.any()
        assert distance(gradient, oracle) < 1e-12


@pytest.mark.parametrize(
    ("out_dims", "in_dims", "bonds", "shape", "tokens"),
    [
        ((2, 2, 3), (2, 3, 2), (1, 3, 2, 1), (11, 11), 3),
        ((2, 2, 3), (2, 3, 2), (1, 3, 2, 1), (12, 12), 40),
        ((5, 1), (1, 4), (1, 2, 1), (5, 4), 2),
    ],
)
def test_layer_passes_gradcheck(out_dims, in_dims, bonds, shape, tokens):
    layer = layer_of(out_dims, in_dims, bonds, shape=shape)
    x = torch.from_numpy(gaussian(tokens, shape[1])).requires_grad_()
    assert gradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()), fast_mode=tokens > 5)


@pytest.mark.parametrize(("path", "out_dims", "in_dims", "bonds", "tokens"), PATHS)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_every_path_the_dtype_of_the_dense_layer(path, out_dims, in_dims, bonds, tokens, bias):
    layer = layer_of(out_dims, in_dims, bonds, bias=bias).float()
    x = torch.ones(tokens, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.nn.Linear(12, 18, bias=bias)(x).dtype == torch.bfloat16


def test_input_of_another_width_is_an_error():
    for tokens in (1, 500):
        with pytest.raises(RuntimeError):
            layer_of((3, 2, 3), (2, 3, 2), (1, 6, 6, 1))(torch.ones(tokens, 24, dtype=torch.float64))

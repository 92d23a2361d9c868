import math

import pytest
import torch
from oracle import dense_by_einsum, distance, gaussian, random_cores
from torch import nn

from mpocli.errors import InputError
from mpocli.mpo import MPO, SiteShape, Truncation
from mpocli.nn import TOMBSTONE, MPOEmbedding, MPOLinear

SITES = SiteShape((2, 3, 4), (4, 3, 2))
BONDS = (1, 5, 6, 1)


def mpo_of(sites=SITES, bonds=BONDS, shape=None, seed=0):
    return MPO(tuple(random_cores(sites.out_dims, sites.in_dims, bonds, seed)), shape or sites.padded_shape)


def linear(**options):
    return MPOLinear.from_mpo(mpo_of(), torch.ones(24), dtype=torch.float64, **options)


def embedding(**options):
    return MPOEmbedding.from_mpo(mpo_of(), dtype=torch.float64, **options)


MODULES = pytest.mark.parametrize("module", [linear(), embedding()], ids=["linear", "embedding"])


@MODULES
def test_cores_are_parameters_named_by_their_site(module):
    names = [name for name, _ in module.named_parameters()]
    assert names[:3] == ["core_0", "core_1", "core_2"]
    assert names[3:] == (["bias"] if isinstance(module, MPOLinear) else [])
    assert [tuple(core.shape) for core in module.cores] == [(1, 2, 4, 5), (5, 3, 3, 6), (6, 4, 2, 1)]
    for k, core in enumerate(module.cores):
        assert core is module.get_parameter(f"core_{k}")


def test_eleven_cores_stay_in_the_order_of_their_sites():
    sites = SiteShape((1,) * 10 + (2,), (2,) + (1,) * 10)
    layer = MPOLinear((2, 2), sites, (1, *range(2, 12), 1), bias=False)
    assert [core.shape[0] for core in layer.cores] == [1, *range(2, 12)]
    assert [name for name, _ in layer.named_parameters()] == [f"core_{k}" for k in range(11)]


@MODULES
def test_the_dense_name_holds_one_zero_in_the_state_dict(module):
    state = module.state_dict()
    assert TOMBSTONE == "weight"
    assert state["weight"].tolist() == [0.0]
    assert set(state) == {"core_0", "core_1", "core_2", "weight"} | ({"bias"} if "bias" in state else set())
    assert "weight" not in dict(module.named_parameters())
    assert sum(value.numel() for value in state.values()) == (
        sum(parameter.numel() for parameter in module.parameters()) + 1
    )


@pytest.mark.parametrize(
    ("module", "dense"),
    [(linear(), nn.Linear(24, 24)), (embedding(), nn.Embedding(24, 24))],
    ids=["linear", "embedding"],
)
def test_loading_cores_into_the_dense_module_is_an_error_even_when_lenient(module, dense):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        dense.load_state_dict(module.state_dict(), strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tombstone_tells_the_dtype_of_the_cores(dtype):
    for module in (linear().to(dtype), MPOLinear(SITES.padded_shape, SITES, BONDS, dtype=dtype)):
        assert module.weight.dtype == module.core_0.dtype == dtype
        assert module.weight.device == module.core_0.device


@MODULES
def test_state_dict_restores_the_same_matrix(module):
    other = type(module)(module.shape, module.sites, module.bond_dims, dtype=torch.float64)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight_matrix(), module.weight_matrix())


@MODULES
def test_weight_matrix_is_the_contraction_of_the_cores_without_padding(module):
    cropped = type(module).from_mpo(mpo_of(shape=(22, 23)), dtype=torch.float64)
    expected = dense_by_einsum(mpo_of().cores)
    assert distance(module.weight_matrix(), expected) < 1e-14
    assert cropped.weight_matrix().shape == (22, 23)
    assert distance(cropped.weight_matrix(), expected[:22, :23]) < 1e-14


@MODULES
def test_mpo_survives_a_module_unchanged_and_without_a_graph(module):
    back = module.to_mpo()
    assert back.shape == (24, 24) and back.bond_dims == BONDS
    for core, original in zip(back.cores, mpo_of().cores, strict=True):
        assert torch.equal(core, original)
        assert not core.requires_grad


@MODULES
def test_loaded_cores_are_copies_cast_to_the_modules_dtype(module):
    source = mpo_of(seed=1)
    half = type(module)(source.shape, SITES, BONDS, dtype=torch.bfloat16)
    half.load_mpo(source)
    for parameter, core in zip(half.cores, source.cores, strict=True):
        assert torch.equal(parameter, core.to(torch.bfloat16))
    double = type(module).from_mpo(source, dtype=torch.float64)
    with torch.no_grad():
        double.core_0.zero_()
    assert source.cores[0].any()


@MODULES
def test_modules_made_from_an_mpo_have_the_default_dtype_unless_told(module):
    assert type(module).from_mpo(mpo_of()).core_0.dtype == torch.get_default_dtype()


@MODULES
@pytest.mark.parametrize("bonds", [(1, 1, 1, 1), (1, 5, 1, 1), (1, 5, 7, 1)])
def test_loading_an_mpo_of_other_bonds_is_an_error(module, bonds):
    other = type(module)(module.shape, SITES, BONDS, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError)):
        other.load_mpo(mpo_of(bonds=bonds))


def test_loading_an_mpo_of_other_sites_is_an_error():
    layer = linear()
    two = SiteShape((4, 6), (4, 6))
    with pytest.raises((ValueError, RuntimeError)):
        layer.load_mpo(mpo_of(two, (1, 5, 1)))
    three = MPOLinear((24, 24), SITES, (1, 1, 1, 1))
    with pytest.raises((ValueError, RuntimeError)):
        three.load_mpo(mpo_of(SiteShape((2, 3), (4, 3)), (1, 1, 1)))
    ones = SiteShape((24, 1, 1), (24, 1, 1))
    with pytest.raises((ValueError, RuntimeError)):
        layer.load_mpo(mpo_of(ones, (1, 1, 1, 1)))


@pytest.mark.parametrize("module", [MPOLinear, MPOEmbedding])
def test_sites_that_do_not_hold_the_weight_are_an_input_error(module):
    with pytest.raises(InputError, match=f"{module.__name__}: site shape {SITES} makes 24 rows, the matrix has 25"):
        module((25, 24), SITES, BONDS)


@pytest.mark.parametrize(
    ("update", "trained"),
    [("auxiliary", {0, 2}), ("central", {1}), ("all", {0, 1, 2}), ("none", set())],
)
@MODULES
def test_update_lets_gradients_reach_the_cores_of_its_role_only(module, update, trained):
    module.set_update(update)
    module.zero_grad()
    x = torch.tensor([1, 2]) if isinstance(module, MPOEmbedding) else torch.ones(2, 24, dtype=torch.float64)
    out = module(x).sum()
    if out.requires_grad:
        out.backward()
    for k, core in enumerate(module.cores):
        assert core.requires_grad == (k in trained)
        assert (core.grad is not None) == (k in trained)
        assert k not in trained or core.grad.any()
    if isinstance(module, MPOLinear):
        assert module.bias.requires_grad and module.bias.grad is not None


@MODULES
def test_central_and_auxiliary_parameters_are_all_cores_once(module):
    assert [id(core) for core in module.central_parameters()] == [id(module.core_1)]
    assert [id(core) for core in module.auxiliary_parameters()] == [id(module.core_0), id(module.core_2)]
    even = MPOLinear((16, 16), SiteShape((2,) * 4, (2,) * 4), (1, 2, 2, 2, 1))
    assert [id(core) for core in even.central_parameters()] == [id(even.core_1)]


@MODULES
def test_tensors_may_stand_in_for_the_parameters(module):
    """As in `torch.func`, in a replica of `nn.DataParallel` and in FSDP's flat parameters."""
    doubled = {name: (2 * value).detach().requires_grad_() for name, value in module.named_parameters()}
    x = torch.tensor([3, 1]) if isinstance(module, MPOEmbedding) else torch.from_numpy(gaussian(2, 24))
    weight = dense_by_einsum([doubled[f"core_{k}"] for k in range(3)])
    expected = weight[x] if isinstance(module, MPOEmbedding) else x @ weight.T + doubled["bias"]
    found = torch.func.functional_call(module, doubled, (x,))
    assert distance(found, expected) < 1e-13
    gradients = torch.autograd.grad(found.square().sum(), doubled.values())
    oracle = torch.autograd.grad(expected.square().sum(), doubled.values())
    for gradient, wanted in zip(gradients, oracle, strict=True):
        assert distance(gradient, wanted) < 1e-12


def test_description_gives_shape_sites_and_bonds():
    assert "24x24 as 2,3,4x4,3,2, bonds (1, 5, 6, 1)" in repr(linear())


def test_a_module_from_a_truncated_matrix_has_its_parameters():
    mpo = MPO.from_matrix(torch.from_numpy(gaussian(24, 24)), SITES, Truncation(max_bond=3))
    layer = MPOLinear.from_mpo(mpo)
    assert sum(core.numel() for core in layer.cores) == mpo.num_params == SITES.num_params((1, 3, 3, 1))
    assert math.prod(layer.shape) > mpo.num_params

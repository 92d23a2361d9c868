import copy
import functools
import io
import math
import pickle

import numpy as np
import pytest
import torch
from oracle import Recorder, dense_by_einsum, distance, gaussian, matrix_by_loops, random_cores, to_numpy
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mpocli.errors import InputError
from mpocli.mpo import MPO, SiteShape, site_shape
from mpocli.mpo.tables import published_shape
from mpocli.nn import experts as module
from mpocli.nn.dense_experts import DenseExperts
from mpocli.nn.dispatch import attach_router
from mpocli.nn.experts import MPOExperts
from mpocli.nn.experts_contract import Way, choose_way, expert_params, join_macs, sharing_ratio, way_macs
from mpocli.nn.router import Router, RouterOptions, Shared

WAYS = [Way(kind, near) for kind in ("rebuild", "chain") for near in ("left", "right")]
# Site shapes of the up-projection (24×12) with bonds; the down-projection has them mirrored.
SITES = {
    2: (SiteShape((4, 6), (4, 3)), (1, 5, 1)),
    3: (SiteShape((2, 4, 3), (3, 2, 2)), (1, 4, 3, 1)),
    4: (SiteShape((2, 3, 2, 2), (2, 2, 1, 3)), (1, 3, 4, 2, 1)),
    5: (SiteShape((2, 2, 3, 2, 1), (3, 1, 2, 1, 2)), (1, 4, 3, 5, 2, 1)),
}
WIDTH, INNER = 12, 24


class Net(nn.Module):
    """A feed-forward network as models write it, the layers of experts in the place of its linear ones."""

    def __init__(self, up, down, gate=None, dropout=0.0):
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        inner = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(self.dropout(inner))


def net_of(*layers, options=None, dropout=0.0, seed=0):
    """(up, down) or (up, down, gate) with one router, whose logits are of size 1."""
    features, experts, generator = layers[0].in_features, layers[0].experts, torch.Generator().manual_seed(seed)
    router = Router(features, experts, options or RouterOptions(), generator=generator)
    with torch.no_grad():
        router.weight.mul_(30)
    for layer in layers:
        attach_router(layer, router, own=layer is layers[0])
    return Net(*layers, dropout=dropout)


def mirrored(sites, bonds):
    return SiteShape(sites.in_dims[::-1], sites.out_dims[::-1]), bonds[::-1]


def layer_of(place, experts=4, share="central", sites=3, crop=0, bias=True, seed=0, dtype=torch.float64, **options):
    """A layer whose experts all differ."""
    shape, bonds = SITES[sites] if place == "in" else mirrored(*SITES[sites])
    rows, columns = shape.padded_shape
    size = rows - crop, columns - crop
    layer = MPOExperts(size, shape, bonds, experts=experts, place=place, share=share, bias=bias, dtype=dtype, **options)
    return randomize(layer, seed)


def dense_of(place, experts=4, bias=True, seed=0, dtype=torch.float64):
    shape = (INNER, WIDTH) if place == "in" else (WIDTH, INNER)
    return randomize(DenseExperts(shape, experts=experts, place=place, bias=bias, dtype=dtype), seed)


def randomize(layer, seed):
    with torch.no_grad():
        for k, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.from_numpy(gaussian(*parameter.shape, seed=100 * seed + k)) / 2)
    return layer


def matrix_of(layer, expert):
    """One expert's matrix by the definition, from what the layer stores."""
    if isinstance(layer, DenseExperts):
        return layer.weight[expert].detach().double().numpy()
    cores = [core if core.ndim == 4 else core[expert] for core in to_numpy(layer.cores)]
    return matrix_by_loops(cores)[: layer.shape[0], : layer.shape[1]]


def net_by_loops(net, x, routing):
    """Token by token and choice by choice."""
    matrix = functools.cache(matrix_of)

    def linear(layer, expert, value):
        bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
        return matrix(layer, expert) @ value + bias

    tokens = x.detach().double().reshape(-1, x.shape[-1]).numpy()
    result = np.zeros((len(tokens), net.down.out_features))
    for t, choice in np.ndindex(*routing.experts.shape):
        expert = int(routing.experts[t, choice])
        if not routing.kept[t, choice]:
            continue
        inner = linear(net.up, expert, tokens[t])
        if net.gate is None:
            inner = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in inner])
        else:
            gate = linear(net.gate, expert, tokens[t])
            inner = inner * gate / (1 + np.exp(-gate))
        result[t] += routing.gates[t, choice].item() * linear(net.down, expert, inner)
    return result.reshape(*x.shape[:-1], -1)


def layers_of(kind, gated=False, **options):
    """(up, down) or (up, down, gate) of `central`, `none` or `dense`."""
    places = ["in", "out", "in"][: 3 if gated else 2]
    if kind == "dense":
        return [dense_of(place, seed=s, **options) for s, place in enumerate(places)]
    return [layer_of(place, share=kind, seed=s, **options) for s, place in enumerate(places)]


def inputs(*leading, width=WIDTH, seed=9):
    return torch.from_numpy(gaussian(*leading, width, seed=seed))


def routing_of(net, x):
    routing = net.up.router(x)
    net.up.router.take()
    return routing


TOP_1 = RouterOptions("topk", 1)
TOP_2 = RouterOptions("topk", 2)
ROUTERS = [RouterOptions(), TOP_1, TOP_2, RouterOptions("topk", 3, capacity_factor=0.6)]


# --- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("kind", ["central", "none", "dense"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_network_of_different_experts_is_the_loop_over_tokens_and_choices(kind, gated, options):
    net = net_of(*layers_of(kind, gated), options=options)
    x = inputs(2, 9)
    y, routing = net(x), routing_of(net, x)
    assert routing.kept.all() == (options.capacity_factor is None) and len(routing.routed) > 2
    assert distance(y, net_by_loops(net, x, routing)) < 1e-12


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("share", ["central", "none"])
@pytest.mark.parametrize("sites", sorted(SITES))
@pytest.mark.parametrize("crop", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_gives_the_same_result(monkeypatch, way, share, sites, crop, bias):
    monkeypatch.setattr(module, "choose_way", lambda *_: way)
    layers = layers_of(share, sites=sites, crop=crop, bias=bias)
    net = net_of(*layers, options=TOP_2)
    x = inputs(11, width=WIDTH - crop)
    y, routing = net(x), routing_of(net, x)
    assert y.shape == x.shape
    assert distance(y, net_by_loops(net, x, routing)) < 1e-12


@pytest.mark.parametrize(("options", "k"), [(TOP_1, ()), (TOP_2, (2,))])
@pytest.mark.parametrize("leading", [(7,), (2, 3), (1, 2, 3), (0,), (2, 0)])
def test_shapes_between_the_layers(options, k, leading):
    for kind in ("central", "dense"):
        net = net_of(*layers_of(kind), options=options)
        inner = net.up(inputs(*leading))
        assert inner.shape == (*leading, *k, INNER)
        assert net.down(inner).shape == (*leading, WIDTH)


def test_a_dropped_token_gets_zero_output_and_zero_between():
    net = net_of(*layers_of("central"), options=RouterOptions(capacity_factor=0.5))
    x = inputs(16)
    inner = net.up(x)
    kept = net.up.router._routing.kept[:, 0]
    y = net.down(inner)
    assert 4 <= int(kept.sum()) < 16
    assert not inner[~kept].any() and not y[~kept].any()
    assert inner[kept].any(1).all() and y[kept].any(1).all()


def test_padding_is_computed_as_without_a_mask():
    net = net_of(*layers_of("central"), options=RouterOptions(capacity_factor=9.0))
    x = inputs(2, 6)
    plain = net(x)
    net.up.router.shared = Shared()
    net.up.router.shared.begin(torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]))
    assert torch.equal(net(x), plain)


# --- the exact start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [RouterOptions(), TOP_1, TOP_2, RouterOptions("topk", 4)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("share", ["central", "none", "dense"])
def test_equal_experts_are_the_dense_network(share, gated, options):
    dense = [nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 24)][: 3 if gated else 2]
    layers = []
    for linear, place in zip(dense, ["in", "out", "in"], strict=False):
        weight, bias = linear.weight.detach(), linear.bias.detach()
        if share == "dense":
            layers.append(DenseExperts.from_matrix(weight, bias, experts=4, place=place))
        else:
            mpo = MPO.from_matrix(weight, site_shape(*weight.shape, 3))
            layers.append(MPOExperts.from_mpo(mpo, bias, experts=4, place=place, share=share))
    x = inputs(3, 10).float()
    expected = Net(*dense)(x)
    for training in (True, False):
        y = net_of(*layers, options=options).train(training)(x)
        assert (y - expected).abs().max().item() <= 1e-6 * max(1.0, expected.abs().max().item())


def test_one_expert_a_token_starts_with_the_very_same_numbers_as_one_expert():
    mpo = MPO(tuple(random_cores((2, 4, 3), (3, 2, 2), (1, 4, 3, 1))), (24, 12))
    layers = [
        MPOExperts.from_mpo(mpo, experts=4, place="in", dtype=torch.float32),
        DenseExperts.from_matrix(torch.eye(24), experts=4, place="out"),
    ]
    net, x = net_of(*layers), inputs(20).float()
    weight = layers[0].weight_matrix(0)
    torch.testing.assert_close(net(x), F.gelu(F.linear(x, weight)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [RouterOptions(), TOP_2], ids=str)
def test_the_router_learns_from_different_experts_at_gates_of_one(options):
    net = net_of(*layers_of("central"), options=options)
    x, target = inputs(15), inputs(15, seed=10)
    (net(x) * target).sum().backward()
    grad = net.up.router.weight.grad
    assert grad.any(1).sum() >= 2
    # Of p/stopgrad(p): the gradient of Σ_t log p_t · ⟨y_t, target_t⟩.
    if options.top_k == 1:
        y, router = net(x).detach(), net.up.router
        log_p = F.linear(x.float(), router.weight, router.bias).log_softmax(-1).max(-1).values
        (expected,) = torch.autograd.grad((log_p * (y * target).sum(-1)).sum(), router.weight)
        assert distance(grad, expected) < 1e-5


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("options", [RouterOptions(), TOP_2], ids=str)
def test_gradient_of_the_shared_core_is_the_sum_over_unshared_ones(monkeypatch, way, options):
    monkeypatch.setattr(module, "choose_way", lambda *_: way)
    shared = layers_of("central", sites=5)
    apart = layers_of("none", sites=5)
    with torch.no_grad():
        for one, many in zip(shared, apart, strict=True):
            for a, b in zip(one.parameters(), many.parameters(), strict=True):
                b.copy_(a)  # the shared core to every expert
    x, target = inputs(17), inputs(17, seed=10)
    for layers in (shared, apart):
        (net_of(*layers, options=options)(x) * target).sum().backward()
    for one, many in zip(shared, apart, strict=True):
        for k, (a, b) in enumerate(zip(one.cores, many.cores, strict=True)):
            expected = b.grad.sum(0) if k == one.central else b.grad
            assert expected.any()
            assert distance(a.grad, expected) < 1e-11
        assert distance(one.bias.grad, many.bias.grad) < 1e-11


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_are_those_of_dense_experts(monkeypatch, way):
    monkeypatch.setattr(module, "choose_way", lambda *_: way)
    net = net_of(*layers_of("central"), options=TOP_2)
    dense = net_of(*(layer.to_dense_experts() for layer in (net.up, net.down)), options=TOP_2)
    x, target = inputs(13).requires_grad_(), inputs(13, seed=10)
    grads = [
        torch.autograd.grad((n(x) * target).sum(), [x, n.up.bias, n.down.bias, n.up.router.weight, *more])
        for n, more in ((net, []), (dense, [dense.up.weight, dense.down.weight]))
    ]
    for found, expected in zip(grads[0], grads[1], strict=False):
        assert distance(found, expected) < 1e-6 and expected.any()
    # The cores': ∂L/∂W_e through the matrix by einsum.
    (net(x) * target).sum().backward()
    for layer, wanted in ((net.up, grads[1][4]), (net.down, grads[1][5])):
        matrices = torch.stack([dense_by_einsum(layer.cores_of(expert)) for expert in range(4)])
        through = torch.autograd.grad((matrices * wanted).sum(), layer.cores)
        for core, expected in zip(layer.cores, through, strict=True):
            assert distance(core.grad, expected) < 1e-6


@pytest.mark.parametrize("kind", ["central", "none", "dense"])
def test_an_expert_that_is_not_routed_gets_a_zero_gradient(kind):
    net = net_of(*layers_of(kind))
    net.up.router.bias.data[2] = -1e9
    (net(inputs(20))).square().sum().backward()
    for layer in (net.up, net.down):
        for name, parameter in layer.named_parameters(recurse=False):
            if name != "bias" and parameter.shape[0] == 4 and parameter.ndim in (3, 5):
                assert not parameter.grad[2].any()
                assert all(parameter.grad[expert].any() for expert in (0, 1, 3))


# --- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("share", ["central", "none"])
@pytest.mark.parametrize("sites", sorted(SITES))
@pytest.mark.parametrize("unused", [(), (1, 3)])
def test_a_call_multiplies_as_often_as_the_cost_model_says_for_routed_experts_only(
    monkeypatch, way, share, sites, unused
):
    monkeypatch.setattr(module, "choose_way", lambda *_: way)
    net = net_of(*layers_of(share, sites=sites, bias=False))
    for expert in unused:
        net.up.router.bias.data[expert] = -1e9
    for layer in (net.up, net.down):
        x = inputs(30, width=layer.in_features)
        layer.router._input, layer.router._routing = x, routing_of(net, inputs(30))
        routed = len(layer.router._routing.routed)
        assert routed == 4 - len(unused)
        with Recorder() as run:
            layer(x)
        assert run.macs == way_macs(way, 30, routed, layer.sites, layer.bond_dims)


@pytest.mark.parametrize("unused", [(), (1, 3)])
def test_dense_experts_multiply_once_for_every_choice(unused):
    net = net_of(dense_of("in", bias=False), dense_of("out", bias=False), options=TOP_2)
    for expert in unused:
        net.up.router.bias.data[expert] = -1e9
    with Recorder() as run:
        net(inputs(30))
    assert run.macs == 30 * 2 * 2 * WIDTH * INNER


def test_the_cheapest_way_is_taken():
    seen = set()
    for sites, bonds in [*SITES.values(), (SiteShape((64, 1), (1, 64)), (1, 4, 1)), (SITES[5][0], (1, 1, 1, 1, 1, 1))]:
        for shape, inner in ((sites, bonds), mirrored(sites, bonds)):
            for rows in (1, 20, 10000):
                chosen = choose_way(rows, 4, shape, inner)
                costs = {way: way_macs(way, rows, 4, shape, inner) for way in WAYS}
                assert costs[chosen] == min(costs.values())
                seen.add(chosen)
    assert seen == set(WAYS)


def test_rebuilding_costs_what_the_papers_shape_takes_by_hand():
    # FFN up, 4,4,8,6,4x3,4,4,4,4: sides of 192 and 384, bonds 192 and 384.
    sites = SiteShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    bonds = sites.full_bond_dims
    joins = 12 * 12 * 16 * 192 + 384 * 24 * 16 * 16
    assert join_macs(sites, bonds) == joins
    products = 192 * 192 * 32 * 384 + 192 * 32 * 384 * 384
    assert way_macs(WAYS[0], 100, 8, sites, bonds) == 8 * (joins + products) + 100 * 768 * 3072


# --- size ----------------------------------------------------------------------------------------------------------

T5_BASE = 222_903_552  # elements of the dense model


@pytest.mark.parametrize(("experts", "millions", "routers"), [(8, 293.84, 0.15), (16, 364.77, 0.30)])
def test_t5_base_has_the_published_size(experts, millions, routers):
    matrices = [(3072, 768)] * 24 + [(768, 3072)] * 24
    total = T5_BASE
    for rows, columns in matrices:
        sites = site_shape(rows, columns, 5)
        assert sites == published_shape(rows, columns, 5)
        total += expert_params(sites, sites.full_bond_dims, experts) - rows * columns
    assert round(total / 1e6, 2) == millions
    added = 24 * sum(p.numel() for p in Router(768, experts, device="meta").parameters())
    assert f"{added / 1e6:.2f}" == f"{routers:.2f}"


def test_plain_experts_of_t5_base_have_the_published_size():
    each = [
        DenseExperts(shape, experts=8, place="in", bias=False, device="meta") for shape in [(3072, 768), (768, 3072)]
    ]
    total = T5_BASE + 24 * sum(layer.weight.numel() - 3072 * 768 for layer in each)
    assert round(total / 1e6, 1) == 1015.6


@pytest.mark.parametrize("experts", [1, 4, 8, 16])
@pytest.mark.parametrize("sites", [3, 5, 7, 9])
def test_sharing_saves_what_the_formula_says(experts, sites):
    shape = site_shape(3072, 768, sites)
    bonds = shape.full_bond_dims
    options = {"experts": experts, "place": "in", "bias": False, "device": "meta"}
    shared, apart = (MPOExperts((3072, 768), shape, bonds, share=share, **options) for share in ("central", "none"))
    found = [sum(p.numel() for p in layer.parameters()) for layer in (shared, apart)]
    assert found == [expert_params(shape, bonds, experts, shared=share) for share in (True, False)]
    sizes = shape.core_sizes(bonds)
    gamma = sizes[shape.central] / (sum(sizes) - sizes[shape.central])
    assert found[0] / found[1] == pytest.approx(sharing_ratio(experts, gamma), rel=1e-12)


# --- loading, roles, noise -----------------------------------------------------------------------------------------


def mpos_of(count, same_central):
    made = [random_cores((2, 4, 3), (3, 2, 2), (1, 4, 3, 1), seed) for seed in range(count)]
    if same_central:
        made = [[a, made[0][1], c] for a, _, c in made]
    return [MPO(tuple(cores), (23, 12)) for cores in made]


@pytest.mark.parametrize(("share", "shapes"), [("central", [(1, 2, 3, 4), (4, 4, 2, 3), (3, 3, 2, 1)]), ("none", None)])
def test_experts_keep_the_mpos_that_were_loaded(share, shapes):
    mpos = mpos_of(4, same_central=share == "central")
    sites, bonds = SITES[3]
    layer = MPOExperts((23, 12), sites, bonds, experts=4, place="in", share=share, dtype=torch.float64)
    layer.load_experts(mpos)
    if shapes:
        assert [tuple(core.shape) for core in layer.cores] == [(4, *shapes[0]), shapes[1], (4, *shapes[2])]
    assert [tuple(core.shape) for core in layer.cores] == layer.core_shapes()
    for expert, mpo in enumerate(mpos):
        assert all(torch.equal(a, b) for a, b in zip(layer.to_mpo(expert).cores, mpo.cores, strict=True))
        assert distance(layer.weight_matrix(expert), mpo.to_matrix()) < 1e-14
        assert distance(layer.dense_weight(expert), mpo.to_matrix()) < 1e-14
    assert layer.to_mpo(0).shape == (23, 12)


def test_a_conv1d_stores_its_dense_weights_transposed():
    layer = layer_of("in", kind="conv1d")
    assert layer.dense_weight(2).shape == (12, 24) and layer.dense_weight(2).is_contiguous()
    assert torch.equal(layer.dense_weight(2), layer.weight_matrix(2).T)


def test_what_cannot_be_loaded_is_an_error():
    sites, bonds = SITES[3]
    layer = MPOExperts((23, 12), sites, bonds, experts=4, place="in")
    with pytest.raises(InputError, match="experts 0 and 1 have different central cores"):
        layer.load_experts(mpos_of(4, same_central=False))
    with pytest.raises(InputError, match="3 MPOs for 4 experts"):
        layer.load_experts(mpos_of(3, same_central=True))
    with pytest.raises(InputError, match="expert 0: an MPO of"):
        layer.load_mpo(MPO(tuple(random_cores((2, 4, 3), (3, 2, 2), (1, 2, 3, 1))), (23, 12)))
    with pytest.raises(InputError, match="load_experts"):
        layer.replace_cores(mpos_of(1, same_central=True)[0])


@pytest.mark.parametrize("share", ["central", "none"])
def test_roles_of_the_cores_are_those_of_one_matrix(share):
    layer = layer_of("in", share=share, sites=5)
    assert [p is layer.core_2 for p in layer.central_parameters()] == [True]
    assert len(list(layer.auxiliary_parameters())) == 4
    layer.set_update("auxiliary")
    assert [core.requires_grad for core in layer.cores] == [True, True, False, True, True]
    layer.set_update("central")
    assert [core.requires_grad for core in layer.cores] == [False, False, True, False, False]


def test_noise_makes_experts_differ_and_leaves_the_central_core():
    mpo = mpos_of(1, same_central=True)[0]
    layer, twin, plain = (MPOExperts.from_mpo(mpo, experts=4, place="in") for _ in range(3))
    layer.perturb(0.0)
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, plain.cores, strict=True))
    layer.perturb(0.01, torch.Generator().manual_seed(3))
    twin.perturb(0.01, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, twin.cores, strict=True))
    assert torch.equal(layer.core_1, plain.core_1)
    matrices = [layer.weight_matrix(expert) for expert in range(4)]
    for expert in range(4):
        assert 1e-4 < distance(matrices[expert], plain.weight_matrix(0)) < 0.1
        assert distance(matrices[expert], matrices[expert - 1]) > 1e-4
    dense = DenseExperts.from_matrix(torch.ones(300, 200), experts=2, place="in")
    dense.perturb(0.1, torch.Generator().manual_seed(0))
    assert float((dense.weight.detach() - 1).std()) == pytest.approx(0.1, rel=0.02)


def test_merged_experts_compute_the_same():
    net = net_of(*layers_of("central", crop=1), options=TOP_2)
    dense = net_of(*(layer.to_dense_experts() for layer in (net.up, net.down)), options=TOP_2)
    x = inputs(14, width=11)
    assert distance(dense(x), net(x)) < 1e-13
    assert dense.up.weight.shape == (4, 23, 11) and dense.down.place == "out"


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["central", "dense"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("options", [RouterOptions(jitter=0.3, z_loss=0.1, capacity_factor=0.8), TOP_2], ids=str)
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(kind, gated, options):
    shared, results = Shared(), []
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    for checkpointed in (False, True):
        nets = [net_of(*layers_of(kind, gated), options=options, dropout=0.2, seed=s) for s in (0, 1)]
        for net in nets:
            net.up.router.shared = shared
        torch.manual_seed(0)
        shared.begin(mask)
        x = inputs(2, 9)
        for net in nets:
            x = x + (checkpoint(net, x, use_reentrant=False) if checkpointed else net(x))
        routers = shared.end()
        loss = x.square().mean() + 10 * routers
        loss.backward()
        assert shared.losses == []
        assert all(net.up.router.statistics.report()["tokens"] == 13 for net in nets)
        # An early stop of the recomputation leaves nothing behind either.
        assert all(net.up.router._routing is None and net.up.router._input is None for net in nets)
        results.append([loss.detach(), routers.detach(), *(p.grad for net in nets for p in net.parameters())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
        assert plain.any()


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_recomputing_the_weights_gives_the_same_gradients(monkeypatch, way):
    monkeypatch.setattr(module, "choose_way", lambda *_: way)
    grads = []
    for recompute in (False, True):
        net = net_of(*layers_of("central"))
        net.up.recompute = net.down.recompute = recompute
        x = inputs(12).requires_grad_()
        net(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["central", "none", "dense"])
@pytest.mark.parametrize("options", [RouterOptions(), TOP_2], ids=str)
@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]], ids=str)
def test_autocast_gives_the_dtype_of_a_dense_layer(monkeypatch, kind, options, way):
    monkeypatch.setattr(module, "choose_way", lambda *_: way)
    net = net_of(*layers_of(kind, gated=True, dtype=torch.float32), options=options)
    x = inputs(2, 7).float()
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert distance(y.float(), expected) < 0.05
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
    half = copy.deepcopy(net).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_the_router_is_stored_once_and_follows_copies():
    net = net_of(*layers_of("central", gated=True))
    assert [name for name in net.state_dict() if "router" in name] == ["up.router.weight", "up.router.bias"]
    net(inputs(3))
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert twin.down.router is twin.up.router is twin.gate.router and twin.up.router is not net.up.router
        assert torch.equal(twin(inputs(5)), net(inputs(5)))
    assert net.half().down.router.weight.dtype == torch.float16


def test_a_copy_can_be_made_between_the_layers():
    net = net_of(*layers_of("central"))
    inner = net.up(inputs(3))
    twin = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match="before its first one"):
        twin.down(inner)
    net.down(inner)


def test_a_gated_network_is_routed_once():
    net = net_of(*layers_of("central", gated=True), options=RouterOptions(jitter=0.4))
    net(inputs(10))
    assert net.up.router.statistics.report()["tokens"] == 10


def test_a_layer_without_its_router_is_an_error():
    with pytest.raises(RuntimeError, match="without a router"):
        layer_of("in")(inputs(2))

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from mpocli.errors import InputError
from mpocli.nn.router import Router, RouterOptions, Shared, balance_loss, within_capacity, z_loss


def router_of(features=4, experts=3, seed=0, shared=None, **options):
    """Logits of size 1, so that no two tokens are alike."""
    router = Router(features, experts, RouterOptions(**options), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        router.weight.mul_(50)
    router.shared = shared
    return router


def by_hand(logits, **options):
    """A router whose logits for the t-th unit vector are the t-th row, and these inputs."""
    logits = torch.tensor(logits)
    router = Router(len(logits), logits.shape[1], RouterOptions(**options))
    with torch.no_grad():
        router.weight.copy_(logits.T)
    return router, torch.eye(len(logits))


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def probabilities_of(router, x):
    logits = x.reshape(-1, x.shape[-1]).double().numpy() @ router.weight.detach().double().numpy().T
    powers = np.exp(logits + router.bias.detach().double().numpy())
    return powers / powers.sum(1, keepdims=True)


# --- who goes where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "k"), [("switch", 1), ("topk", 1), ("topk", 2), ("topk", 3)])
def test_every_token_goes_to_its_k_most_probable_experts(kind, k):
    router, x = router_of(kind=kind, top_k=k), gaussian(5, 7, 4)
    routing = router(x)
    expected = np.argsort(-probabilities_of(router, x), axis=1)[:, :k]
    assert np.array_equal(routing.experts.numpy(), expected)
    assert routing.kept.all() and routing.k == k


@pytest.mark.parametrize("k", [1, 2])
def test_slots_are_grouped_by_expert_in_the_order_of_the_tokens(k):
    routing = router_of(experts=5, kind="topk", top_k=k)(gaussian(30, 4))
    expected = [
        (slot // k, slot)
        for expert in routing.routed
        for slot in range(30 * k)
        if routing.experts[slot // k, slot % k] == expert
    ]
    assert list(zip(routing.tokens.tolist(), routing.order.tolist(), strict=True)) == expected
    assert routing.counts == [int((routing.experts == expert).sum()) for expert in routing.routed]
    assert min(routing.counts) > 0 and sum(routing.counts) == 30 * k


def test_an_expert_without_tokens_is_not_among_the_routed():
    router, x = by_hand([[0.0, 1, 0, 2], [0, 3, 0, 1]])
    routing = router(x)
    assert (routing.routed, routing.counts) == ([1, 3], [1, 1])


# --- gates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["switch", "topk"])
def test_the_gate_of_one_expert_is_exactly_one_and_has_the_gradient_of_log_p(kind):
    router, x = router_of(kind=kind), gaussian(6, 4)
    gates = router(x).gates
    assert torch.equal(gates, torch.ones(6, 1))
    weights = gaussian(6, 1, seed=1)
    (found,) = torch.autograd.grad((gates * weights).sum(), router.weight)
    probabilities = torch.softmax(x @ router.weight.T + router.bias, -1)
    (expected,) = torch.autograd.grad((probabilities.max(-1).values.log() * weights[:, 0]).sum(), router.weight)
    assert found.any()
    torch.testing.assert_close(found, expected)


def test_scale_by_prob_gives_the_probability_itself():
    router, x = router_of(scale_by_prob=True), gaussian(6, 4)
    assert np.allclose(router(x).gates[:, 0].detach().numpy(), probabilities_of(router, x).max(1), rtol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_several_gates_are_the_renormalised_probabilities(k):
    router, x = router_of(experts=4, kind="topk", top_k=k), gaussian(9, 4)
    gates = router(x).gates
    top = -np.sort(-probabilities_of(router, x), axis=1)[:, :k]
    assert np.allclose(gates.detach().numpy(), top / top.sum(1, keepdims=True), rtol=1e-6)
    assert np.allclose(gates.sum(1).detach().numpy(), 1, atol=1e-6)
    gates[:, 0].sum().backward()
    assert router.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_are_float32_in_half_precision_and_under_autocast(dtype):
    x = gaussian(20, 4).to(dtype)
    router = router_of(experts=4, kind="topk", top_k=2).to(dtype)
    expected = copy.deepcopy(router).float()(x.float())
    with torch.autocast("cpu", dtype):
        routing = router(x)
    assert routing.gates.dtype == torch.float32
    assert torch.equal(routing.experts, expected.experts) and torch.equal(routing.gates, expected.gates)


# --- capacity ------------------------------------------------------------------------------------------------------

# Six tokens, two experts; capacity ⌈1.0 · 1 · 6 / 2⌉ = 3. Tokens 0, 1, 3, 4 and 5 want expert 1.
LOGITS = [[0.0, 2], [0, 2], [2, 0], [0, 2], [0, 2], [0, 2]]


def test_the_latest_tokens_of_a_full_expert_are_dropped():
    router, x = by_hand(LOGITS, capacity_factor=1.0)
    routing = router(x)
    assert routing.kept[:, 0].tolist() == [True, True, True, True, False, False]
    assert routing.gates[:, 0].tolist() == [1, 1, 1, 1, 0, 0]
    assert routing.order.tolist() == [2, 0, 1, 3]
    assert (routing.routed, routing.counts) == ([0, 1], [1, 3])
    assert router.statistics.report()["dropped"] == 2 / 6


def test_padding_takes_no_place_and_is_not_dropped():
    router, x = by_hand(LOGITS, capacity_factor=1.0)
    # Real: 1, 3, 4, 5; capacity ⌈4 / 2⌉ = 2: tokens 1 and 3 stay.
    router.shared = Shared()
    router.shared.begin(torch.tensor([[0, 1, 0], [1, 1, 1]]))
    routing = router(x.reshape(2, 3, 6))
    assert routing.kept[:, 0].tolist() == [True, True, True, True, False, False]
    assert router.statistics.report() == {
        "tokens": 4,
        "load": [0.0, 1.0],
        "entropy_nats": pytest.approx(0.365334, rel=1e-5),
        "dropped": 0.5,
    }


def test_padding_is_computed_by_the_expert_that_it_chose():
    router, x = by_hand(LOGITS, capacity_factor=0.01)
    router.shared = Shared()
    router.shared.begin(torch.zeros(1, 6))
    routing = router(x[None])
    assert routing.kept.all() and routing.counts == [1, 5]


def test_first_choices_come_before_second_ones():
    # Capacity ⌈1.0 · 2 · 3 / 3⌉ = 2. Expert 0 is the first choice of tokens 1 and 2 and the second one of token 0;
    # expert 1 the first of token 0 and the second of tokens 1 and 2.
    router, x = by_hand([[1.0, 2, 0], [2, 1, 0], [2, 1, 0]], kind="topk", top_k=2, capacity_factor=1.0)
    routing = router(x)
    assert routing.experts.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert routing.kept.tolist() == [[True, False], [True, True], [True, False]]
    gate = 1 / (1 + math.exp(-1))
    expected = [gate, 0, gate, 1 - gate, gate, 0]
    assert routing.gates.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert routing.order.tolist() == [2, 4, 0, 3]


@pytest.mark.parametrize(
    ("tokens", "factor", "experts", "places"), [(10, 1.1, 1, 11), (10, 1.0, 4, 3), (8, 1.25, 8, 2), (1, 0.1, 8, 1)]
)
def test_capacity_is_the_factor_times_the_even_share_rounded_up(tokens, factor, experts, places):
    wanted = torch.zeros(tokens, 1, dtype=torch.long)
    kept = within_capacity(wanted, torch.ones(tokens, dtype=torch.bool), experts, factor)
    assert int(kept.sum()) == min(places, tokens)


# --- losses --------------------------------------------------------------------------------------------------------


def test_balance_loss_is_the_hand_computed_one():
    # p = [[.75, .25], [.6, .4], [.2, .8]]; f = [2/3, 1/3], P = [1.55/3, 1.45/3]; 2 Σ f P = 4.55 · 2 / 9
    p = torch.tensor([[0.75, 0.25], [0.6, 0.4], [0.2, 0.8]])
    choices, real = torch.tensor([2, 1]), torch.ones(3, dtype=torch.bool)
    assert float(balance_loss(p, choices, real)) == pytest.approx(9.1 / 9)
    # Without the second token: f = [1/2, 1/2], whatever P is: 1.
    assert float(balance_loss(p, torch.tensor([1, 1]), torch.tensor([True, False, True]))) == pytest.approx(1.0)


def test_balance_loss_is_n_where_all_go_to_one_expert_and_one_where_they_spread():
    real = torch.ones(4, dtype=torch.bool)
    assert float(balance_loss(torch.eye(4)[[2, 2, 2, 2]], torch.tensor([0, 0, 4, 0]), real)) == 4
    assert float(balance_loss(torch.eye(4), torch.tensor([1, 1, 1, 1]), real)) == 1


def test_z_loss_is_the_mean_square_of_the_log_of_the_sum():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [5.0, 5.0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert float(z_loss(logits, torch.tensor([True, True, False]))) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "k"), [("switch", 1), ("topk", 2)])
def test_the_training_loss_of_a_pass_is_the_weighted_sum_over_all_choices_of_real_tokens(kind, k):
    shared = Shared()
    routers = [router_of(kind=kind, top_k=k, balance_loss=0.5, z_loss=0.25, shared=shared, seed=s) for s in (1, 2)]
    x, mask = gaussian(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    shared.begin(mask)
    expected = 0.0
    for router in routers:
        routing = router(x)
        rows = [t for t in range(10) if mask.reshape(-1)[t]]
        p = probabilities_of(router, x)[rows]
        share = np.bincount(routing.experts.numpy()[rows].ravel(), minlength=3) / (len(rows) * k)
        logits = x.reshape(10, 4)[rows].double().numpy() @ router.weight.detach().double().numpy().T
        z = np.mean(np.log(np.exp(logits).sum(1)) ** 2)
        expected += 0.5 * 3 * float((share * p.mean(0)).sum()) + 0.25 * float(z)
    loss = shared.end()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(router.weight.grad.any() for router in routers)
    assert shared.losses == [] and shared.end() is None


@pytest.mark.parametrize("without", ["eval", "no_grad", "zero factors", "outside a pass"])
def test_there_is_no_loss(without):
    shared = Shared()
    router = router_of(shared=shared, balance_loss=0.0 if without == "zero factors" else 0.01)
    router.train(without != "eval")
    if without != "outside a pass":
        shared.begin()
    with torch.set_grad_enabled(without != "no_grad"):
        router(gaussian(3, 4))
    assert shared.losses == []


def test_a_batch_of_padding_has_a_finite_loss_and_no_statistics():
    shared = Shared()
    router = router_of(shared=shared, z_loss=1.0, capacity_factor=1.0)
    shared.begin(torch.zeros(1, 3, dtype=torch.bool))
    router(gaussian(1, 3, 4))
    assert float(shared.end()) == 0
    assert router.statistics.report() == {}


# --- jitter, statistics --------------------------------------------------------------------------------------------


def test_jitter_moves_the_probabilities_in_training_only():
    router, x = router_of(kind="topk", top_k=2, jitter=0.2), gaussian(50, 4)
    plain = router_of(kind="topk", top_k=2)(x).gates
    torch.manual_seed(0)
    noisy = router(x.clone()).gates
    torch.manual_seed(0)
    assert torch.equal(router(x.clone()).gates, noisy) and not torch.equal(noisy, plain)
    assert torch.equal(router.eval()(x.clone()).gates, plain)


def test_jitter_stays_within_its_bounds():
    router = Router(1, 2, RouterOptions(jitter=0.1, scale_by_prob=True))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [0.0]]))
    p = router(torch.ones(1000, 1)).gates
    logits = (p / (1 - p)).log()
    assert 0.9 - 1e-5 <= float(logits.min()) < 0.92 and 1.08 < float(logits.max()) <= 1.1 + 1e-5


def test_statistics_add_up_over_passes():
    router = router_of(experts=4, kind="topk", top_k=2)
    inputs = [gaussian(2, 5, 4), gaussian(3, 4, seed=1)]
    choices, entropy = np.zeros(4), 0.0
    for x in inputs:
        choices += np.bincount(router(x).experts.flatten().numpy(), minlength=4)
        p = probabilities_of(router, x)
        entropy -= (p * np.log(p)).sum()
    report = router.statistics.report()
    assert report["tokens"] == 13 and report["load"] == list(choices / 26) and report["dropped"] == 0
    assert report["entropy_nats"] == pytest.approx(entropy / 13, rel=1e-5)


# --- state ---------------------------------------------------------------------------------------------------------


def test_the_same_tensor_is_routed_once_and_handed_out_once():
    shared = Shared()
    router, x = router_of(jitter=0.3, shared=shared), gaussian(5, 4)
    shared.begin()
    first = router(x)
    assert router(x) is first and len(shared.losses) == 1
    assert router.take() is first
    with pytest.raises(RuntimeError, match="before its first one"):
        router.take()
    assert router(x) is not first  # another pass
    assert router(x.clone()) is not first


def test_nothing_of_a_pass_stays_on_the_router():
    router = router_of()
    state = set(router.__dict__)
    router(gaussian(3, 4))
    router.take()
    assert set(router.__dict__) == state
    assert not any(isinstance(value, torch.Tensor) for value in router.__dict__.values())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda router: pickle.loads(pickle.dumps(router))])
def test_a_router_can_be_copied_in_the_middle_of_a_pass(how):
    shared = Shared()
    router, x = router_of(shared=shared), gaussian(3, 4)
    shared.begin(torch.ones(1, 3))
    routing = router(x)
    twin = how(router)
    assert twin.shared is not shared and twin.shared.losses == [] and twin.shared.mask is None
    with pytest.raises(RuntimeError):
        twin.take()
    assert torch.equal(twin(x).experts, routing.experts)
    assert router.take() is routing


def test_a_mask_of_another_size_is_an_error():
    router = router_of(shared=Shared())
    router.shared.begin(torch.ones(2, 3))
    with pytest.raises(InputError, match=r"\(2, 3\) for a router's input of \(2, 2, 4\)"):
        router(gaussian(2, 2, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "random"},
        {"kind": "switch", "top_k": 2},
        {"kind": "topk", "top_k": 0},
        {"kind": "topk", "top_k": 2, "scale_by_prob": True},
        {"capacity_factor": 0.0},
        {"jitter": 1.0},
        {"balance_loss": -1.0},
    ],
)
def test_options_that_cannot_be_meant_are_refused(options):
    with pytest.raises(InputError):
        RouterOptions(**options)


def test_more_experts_a_token_than_there_are_is_an_error():
    with pytest.raises(InputError, match="4 experts a token of 3"):
        Router(4, 3, RouterOptions("topk", 4))

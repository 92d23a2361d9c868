"""The masked weight of sparse training: its gradients, its mask, and what the published code got wrong."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mpocli.config.scoring import Scoring
from mpocli.mpo import MPO, SiteShape
from mpocli.nn import MPOLinear
from mpocli.nn.masked import MaskedWeight, MaskGroup, fold_mask, holder, mask_weight
from mpocli.sparse import Pattern, zeros_in

ROWS, COLUMNS = 10, 12


def masked_linear(
    scoring: Scoring, sparsity: float = 0.5, *, seed: int = 0, pattern: str = "unstructured"
) -> tuple[nn.Linear, MaskedWeight]:
    """A float64 layer whose mask was learnt already: no parameter is at its start."""
    torch.manual_seed(seed)
    layer = nn.Linear(COLUMNS, ROWS)
    masked = mask_weight(layer, "weight", "matrix", scoring, Pattern.parse(pattern), seed=seed)
    layer.double()
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.normal_(std=0.3)
    masked.step(sparsity)
    return layer, masked


class Straight(torch.autograd.Function):
    """The comparison with the threshold, its gradient passed on as if it were not there."""

    @staticmethod
    def forward(ctx, scores: Tensor, zeros: int) -> Tensor:
        mask = torch.ones(scores.numel(), dtype=scores.dtype)
        mask[torch.argsort(scores.reshape(-1), stable=True)[:zeros]] = 0
        return mask.reshape(scores.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def naive(layer: nn.Linear, masked: MaskedWeight, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same output by a plain graph, the way the formulas are written, and its leaves."""
    scoring = masked.scoring
    leaves = {name: p.detach().clone().requires_grad_() for name, p in masked.named_parameters()}
    leaves["weight"] = holder(layer, "weight").original.detach().clone().requires_grad_()
    new = leaves["weight"]
    if "u" in leaves:
        new = new + scoring.beta * leaves["u"] @ leaves["v"]
    scores = torch.zeros_like(new)
    if scoring.magnitude:
        scores = scores + (new if scoring.attached else new.detach()).abs()
    if "a" in leaves:
        scores = scores + scoring.alpha1 * leaves["a"] @ leaves["b"]
    if "r" in leaves:
        scores = scores + scoring.alpha2 * (leaves["r"][:, None] + leaves["c"])
    if "full" in leaves:
        scores = scores + leaves["full"]
    mask = Straight.apply(scores, zeros_in(new.numel(), float(masked.sparsity)))
    return x @ (mask * new).T + layer.bias.detach(), leaves


CASES = {
    "pst": Scoring(rank=3, score_rank=2, beta=0.7, alpha1=1.3, alpha2=0.4),
    "detached": Scoring(rank=3, score_rank=2, attached=False),
    "no low rank": Scoring(rank=3, score_rank=0),
    "no structure": Scoring(rank=3, score_rank=2, structured=False),
    "no update": Scoring(rank=0, score_rank=2),
    "magnitude": Scoring.of("magnitude"),
    "movement": Scoring.of("movement"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_output_and_gradients_are_those_of_the_plain_graph(case: str, sparsity: float) -> None:
    layer, masked = masked_linear(CASES[case], sparsity)
    original = holder(layer, "weight").original.requires_grad_()
    x = torch.randn(7, COLUMNS, dtype=torch.float64, requires_grad=True)
    target = torch.randn(7, ROWS, dtype=torch.float64)
    expected, leaves = naive(layer, masked, x)
    grad_x = torch.autograd.grad((expected * target).sum(), x, retain_graph=True)[0]
    (expected * target).sum().backward()
    x.grad = None
    y = layer(x)
    (y * target).sum().backward()
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(x.grad, grad_x, atol=1e-12)
    found = {**dict(masked.named_parameters()), "weight": original}
    for name, leaf in leaves.items():
        assert torch.allclose(found[name].grad, leaf.grad, atol=1e-12), name


def test_gradients_follow_the_published_formulas() -> None:
    """PST §1.2: with G = ∂L/∂Ŵ, the scores get G ⊙ W′ and the weight G ⊙ (M + |W′|), the magnitude not detached."""
    scoring = CASES["pst"]
    layer, masked = masked_linear(scoring)
    x, target = torch.randn(7, COLUMNS).double(), torch.randn(7, ROWS).double()
    (layer(x) * target).sum().backward()
    with torch.no_grad():
        g = target.T @ x  # of a loss that is linear in y
        new = holder(layer, "weight").original + scoring.beta * masked.u @ masked.v
        mask = masked.mask(holder(layer, "weight").original).double()
        to_score, to_weight = g * new, g * (mask + new.abs())
        expected = {
            "a": scoring.alpha1 * to_score @ masked.b.T,
            "b": scoring.alpha1 * masked.a.T @ to_score,
            "r": scoring.alpha2 * to_score.sum(1),
            "c": scoring.alpha2 * to_score.sum(0),
            "u": scoring.beta * to_weight @ masked.v.T,
            "v": scoring.beta * masked.u.T @ to_weight,
        }
        for name, value in expected.items():
            assert torch.allclose(getattr(masked, name).grad, value, atol=1e-12), name
    assert holder(layer, "weight").original.grad is None and layer.bias.grad is not None


def test_at_the_start_it_is_magnitude_pruning_of_the_pretrained_weight() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS)
    before = layer.weight.detach().clone()
    masked = mask_weight(layer, "weight", "matrix", Scoring(), Pattern(), seed=0)
    masked.step(0.5)
    kept = layer.weight != 0
    assert before[kept].abs().min() > before[~kept].abs().max()
    assert torch.equal(layer.weight[kept], before[kept])
    assert {name: tuple(p.shape) for name, p in masked.named_parameters()} == {
        "u": (ROWS, 8),
        "v": (8, COLUMNS),
        "a": (ROWS, 8),
        "b": (8, COLUMNS),
        "r": (ROWS,),
        "c": (COLUMNS,),
    }


def test_trained_parameters_of_bert_base_are_the_published_share() -> None:
    """17 (in + out) a matrix: 2.82 M, 1.45 % of the dense model with a score of its size (movement pruning)."""
    config = tf.BertConfig(num_labels=2)
    with torch.device("meta"):
        model = tf.BertForSequenceClassification(config)
    dense = sum(parameter.numel() for parameter in model.parameters())
    trained = pruned = 0
    for name, module in model.bert.encoder.named_modules():
        if isinstance(module, nn.Linear):
            assert "dense" in name or "self" in name
            pruned += module.weight.numel()
            with torch.device("meta"):
                masked = MaskedWeight(module.weight, "matrix", Scoring(), Pattern())
            trained += sum(parameter.numel() for parameter in masked.parameters())
    assert pruned == 84_934_656 and trained == 2_820_096
    assert trained / (dense + pruned) == pytest.approx(0.0145, abs=5e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_mask_is_computed_once_a_step_and_never_in_evaluation(fused: bool) -> None:
    """Fault H18: the published layers sort every matrix in every forward pass."""
    layer, masked = masked_linear(CASES["pst"])
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.1, fused=fused)
    x = torch.randn(4, COLUMNS).double()
    start = masked.computed
    for step in range(1, 4):
        for _ in range(3):  # batches of one step
            layer(x).sum().backward()
        optimiser.step()
        masked.step(0.5)
        assert masked.computed == start + step
    layer.eval()
    for _ in range(5):
        layer(x)
    assert masked.computed == start + 4  # after the last step, once
    fresh = copy.deepcopy(masked)
    fresh._state = None
    original = holder(layer, "weight").original
    assert torch.equal(masked.mask(original), fresh.mask(original))


def test_masks_follow_what_training_changed() -> None:
    layer, masked = masked_linear(CASES["pst"])
    before = masked.mask(holder(layer, "weight").original).clone()
    optimiser = torch.optim.AdamW(masked.parameters(), lr=1.0)
    (layer(torch.randn(4, COLUMNS).double()) ** 2).sum().backward()
    optimiser.step()  # and nobody says so
    assert not torch.equal(masked.mask(holder(layer, "weight").original), before)


def test_sparsity_is_part_of_the_state() -> None:
    """Fault M7: as a plain attribute it is lost on resuming."""
    layer, _ = masked_linear(CASES["pst"], 0.7)
    assert float(layer.state_dict()["parametrizations.weight.0.sparsity"]) == 0.7
    other, _ = masked_linear(CASES["pst"], 0.0, seed=3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight) and int((other.weight == 0).sum()) == 84


def test_conv1d_is_pruned_as_the_matrix_it_stands_for() -> None:
    """Fault H1: a transposed weight was left dense."""
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS)
    conv = Conv1D(ROWS, COLUMNS)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    layouts = [(linear, "matrix"), (conv, "transposed")]
    masks = [mask_weight(layer, "weight", layout, Scoring(), Pattern(), seed=1) for layer, layout in layouts]
    x = torch.randn(3, COLUMNS)
    for masked in masks:
        masked.step(0.6)
    (linear(x) ** 2).sum().backward()
    (conv(x) ** 2).sum().backward()
    assert torch.equal(conv.weight.T, linear.weight) and int((conv.weight == 0).sum()) == 72
    for name, parameter in masks[0].named_parameters():
        assert torch.allclose(parameter.grad, dict(masks[1].named_parameters())[name].grad, atol=1e-6)
    folded = fold_mask(conv, "weight")
    assert folded.shape == (COLUMNS, ROWS) and int((folded == 0).sum()) == 72


def test_a_central_core_is_pruned_and_its_layer_computes_with_it() -> None:
    torch.manual_seed(0)
    layer = MPOLinear.from_mpo(MPO.from_matrix(torch.randn(12, 18), SiteShape((2, 3, 2), (3, 2, 3))))
    core = layer.core_1.detach().clone()
    masked = mask_weight(layer, "core_1", "core", Scoring(rank=2, score_rank=2), Pattern(), seed=0)
    masked.step(0.5)
    left, out, in_, right = core.shape
    assert masked.u.shape == (left * out, 2) and masked.v.shape == (2, in_ * right)
    sparse = layer.core_1
    assert int((sparse == 0).sum()) == core.numel() // 2
    assert torch.equal(sparse[sparse != 0], core[sparse != 0])
    x = torch.randn(5, 18)
    reference = MPOLinear.from_mpo(MPO((layer.core_0.detach(), sparse.detach(), layer.core_2.detach()), (12, 18)))
    assert torch.allclose(layer(x), reference(x), atol=1e-6)
    layer(x).sum().backward()
    assert masked.c.grad is not None and layer.core_0.grad is not None


@pytest.mark.parametrize(("sparsity", "per_group"), [(0.0, 0), (0.2, 0), (0.3, 1), (0.5, 2)])
def test_two_of_four_is_reached_in_steps(sparsity: float, per_group: int) -> None:
    layer, _ = masked_linear(CASES["pst"], sparsity, pattern="2:4")
    zeros = (layer.weight == 0).reshape(ROWS, COLUMNS // 4, 4).sum(-1)
    assert torch.equal(zeros, torch.full_like(zeros, per_group))


def test_scores_stay_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS)
    masked = mask_weight(layer, "weight", "matrix", Scoring(), Pattern(), seed=0)
    with torch.no_grad():
        masked.v.normal_()
    masked.step(0.5)
    expected = layer.weight.detach().clone()
    masked._state = None
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.weight
        y = layer(torch.randn(2, COLUMNS))
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert y.dtype == torch.bfloat16


def test_a_global_threshold_lets_matrices_share_unevenly() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(COLUMNS, ROWS), nn.Linear(COLUMNS, ROWS)]
    with torch.no_grad():
        layers[1].weight.mul_(3)
    weights = [layer.weight.detach().clone() for layer in layers]
    masks = [mask_weight(layer, "weight", "matrix", Scoring.of("magnitude"), Pattern()) for layer in layers]
    MaskGroup([(masked, holder(layer, "weight")) for masked, layer in zip(masks, layers, strict=True)])
    for masked in masks:
        masked.step(0.5)
    zeros = [int((layer.weight == 0).sum()) for layer in layers]
    assert sum(zeros) == 120 and zeros[0] > zeros[1]
    threshold = torch.cat([weight.abs().reshape(-1) for weight in weights]).sort().values[120]
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight != 0, weight.abs() >= threshold)
    assert sum(masked.computed for masked in masks) == 1


def test_a_constant_score_moves_no_matrix_under_a_global_threshold() -> None:
    """R + c and C + d change S by a constant: it must not decide between matrices."""
    torch.manual_seed(0)
    layers = [nn.Linear(COLUMNS, ROWS), nn.Linear(COLUMNS, ROWS)]
    masks = [mask_weight(layer, "weight", "matrix", Scoring(), Pattern(), seed=0) for layer in layers]
    MaskGroup([(masked, holder(layer, "weight")) for masked, layer in zip(masks, layers, strict=True)])
    for masked in masks:
        masked.step(0.5)
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        masks[0].r.add_(5.0)
        masks[1].c.sub_(3.0)
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(layers, before, strict=True))


def test_only_parameters_and_bits_are_kept_for_the_backward_pass() -> None:
    """Fault M19: W′, S, M and Ŵ used to be saved."""
    layer, masked = masked_linear(CASES["pst"])
    owned = {p.data_ptr() for p in layer.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weight = layer.weight
    assert weight.requires_grad
    extra = [tensor for tensor in saved if tensor.data_ptr() not in owned]
    assert sum(tensor.nbytes for tensor in extra) == ROWS * COLUMNS // 8
    assert masked.mask(holder(layer, "weight").original) is not None


def test_groups_with_more_zeros_than_the_pattern_keep_them() -> None:
    layer = nn.Linear(COLUMNS, ROWS)
    with torch.no_grad():
        layer.weight[:, 1:] = 0
    masked = mask_weight(layer, "weight", "matrix", Scoring(), Pattern.parse("2:4"), seed=0, keep_zeros=True)
    with torch.no_grad():
        masked.v.normal_()
    for sparsity in (0.0, 0.5):
        masked.step(sparsity)
        assert int((layer.weight != 0).sum()) == ROWS


@pytest.mark.parametrize("method", ["pst", "magnitude", "movement"])
@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 40), (0.2, 40), (0.5, 60)])
def test_zeros_that_were_there_before_stay(method: str, sparsity: float, zeros: int) -> None:
    """And count among those that are asked for."""
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS)
    with torch.no_grad():
        layer.weight.reshape(-1)[torch.randperm(120)[:40]] = 0
    before = layer.weight.detach() == 0
    scoring = Scoring.of(method)
    masked = mask_weight(layer, "weight", "matrix", scoring, Pattern(), seed=0, keep_zeros=True)
    masked.step(sparsity)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.normal_()
        if scoring.rank == 0:
            holder(layer, "weight").original.add_(0.1)
    assert int((layer.weight == 0).sum()) == zeros and bool((layer.weight == 0)[before].all())

"""Which layers of a model go through a sparse kernel. No test looks at a clock: the latencies are handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mpocli.hf import sparse_paths
from mpocli.hf.sparse_paths import choose_paths, restore_paths
from mpocli.nn.sparse_linear import SparseLinear

DENSE_SECONDS = 1.0


def latencies(monkeypatch: pytest.MonkeyPatch, sparse_seconds: float) -> list[int]:
    """Every dense call takes a second. Returns a list that will hold the number of calls of each measurement."""
    asked: list[int] = []

    def told(calls: Sequence[Callable[[], None]], repeats: int, seconds: float) -> list[float]:
        for call in calls:
            call()  # what would be measured works
        asked.append(len(calls))
        return [DENSE_SECONDS, sparse_seconds][: len(calls)]

    monkeypatch.setattr(sparse_paths, "_latencies", told)
    return asked


@torch.no_grad()
def thin(model: nn.Module, share: float = 0.8, only: str = "") -> Any:
    """Zeros at random places of every linear layer's weight whose name holds `only`."""
    generator = torch.Generator().manual_seed(3)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and only in name:
            places = torch.randperm(module.weight.numel(), generator=generator)
            module.weight.view(-1)[places[: round(share * len(places))]] = 0
    return model


def sparse_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


# --- which layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert_classifier", "gpt2", "t5", "llama"])
def test_a_model_computes_the_same_on_sparse_paths_and_is_itself_again_afterwards(family: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D stores the transpose; T5 has no biases and reads `wo.weight.dtype`; Llama is gated."""
    model = getattr(models, family)(tmp_path)
    tied = {"gpt2": "h.", "t5": "block"}.get(family, "")
    before, keys = models.logits(thin(model, only=tied)), [*model.state_dict()]
    classes = {name: type(module) for name, module in model.named_modules()}
    reports = choose_paths(model, 51, path="sparse")
    linear = {name for name, cls in classes.items() if cls in (nn.Linear, Conv1D)}
    assert sparse_names(model) == {name for name in linear if tied in name}
    assert {report.path for report in reports} == {"csr"} and sum(r.modules for r in reports) == len(
        sparse_names(model)
    )
    after = models.logits(model)
    assert not torch.equal(after, before) and (after - before).norm() <= 1e-5 * before.norm()
    assert [*model.state_dict()] == keys
    restore_paths(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert torch.equal(models.logits(model), before)


@pytest.mark.parametrize("family", ["gpt2", "bert_masked_lm", "t5"])
def test_a_layer_tied_to_an_embedding_is_left_alone(family: str, tmp_path: Path) -> None:
    model = thin(getattr(models, family)(tmp_path))
    choose_paths(model, 8, path="sparse")
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear and head.weight is model.get_input_embeddings().weight
    assert int((head.weight == 0).sum()) > 0.5 * head.weight.numel()
    assert sparse_names(model)


def test_a_layer_that_appears_twice_is_replaced_in_both_places() -> None:
    shared = nn.Linear(8, 8)
    model = thin(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.Linear(8, 8)}))
    (report,) = choose_paths(model, 4, path="sparse")
    assert report.modules == 2
    assert isinstance(model["b"], SparseLinear) and model["a"][0] is model["b"] and model["c"] is not model["b"]
    restore_paths(model)
    assert model["a"][0] is shared and model["b"] is shared


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_layers_that_are_more_than_a_product_are_left_alone() -> None:
    hooked, early = nn.Linear(8, 8), nn.Linear(8, 8)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    early.register_forward_pre_hook(lambda module, inputs: inputs)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    empty, nowhere = nn.Linear(0, 8), nn.Linear(8, 8, device="meta")
    model = thin(nn.ModuleList([Doubled(8, 8), hooked, early, nn.MultiheadAttention(8, 2).out_proj]))
    model.extend([parametrized, empty, nowhere])
    assert choose_paths(model, 4, path="sparse", least=0.0) == [] and not sparse_names(model)


@pytest.mark.parametrize(("share", "least", "taken"), [(0.5, 0.5, True), (0.49, 0.5, False), (0.25, 0.2, True)])
def test_a_layer_needs_a_share_of_zeros(share: float, least: float, taken: bool) -> None:
    model = thin(nn.Sequential(nn.Linear(10, 10)), share)
    assert len(choose_paths(model, 4, path="sparse", least=least)) == taken
    assert bool(sparse_names(model)) == taken


# --- which path ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "sparse_seconds", "taken"),
    [
        ("auto", 0.89, True),
        ("auto", 0.91, False),  # faster, by less than measurements can be trusted
        ("auto", 2.0, False),
        ("sparse", 2.0, True),
        ("dense", 0.1, False),
    ],
)
def test_auto_takes_what_is_clearly_faster(
    path: Any, sparse_seconds: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    latencies(monkeypatch, sparse_seconds)
    model = thin(nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10), nn.Linear(10, 20)))
    reports = choose_paths(model, 4, path=path)
    assert len(sparse_names(model)) == 3 * taken
    assert sorted((report.shape, report.modules) for report in reports) == [((10, 20), 1), ((20, 10), 2)]
    for report in reports:
        assert report.path == ("csr" if taken else "dense") and report.tokens == 4
        assert (report.dense_seconds, report.sparse_seconds) == (DENSE_SECONDS, sparse_seconds)
        assert report.sparsity == pytest.approx(0.8)


def test_every_kind_of_layer_is_chosen_for_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the narrow ones are slow, which only their measurement tells."""
    answers = iter([[1.0, 0.5], [1.0, 1.5]])
    monkeypatch.setattr(sparse_paths, "_latencies", lambda *_: next(answers))
    model = thin(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 40)))
    reports = choose_paths(model, 4)
    assert [(report.shape, report.path) for report in reports] == [((40, 5), "csr"), ((5, 4), "dense")]
    assert sparse_names(model) == {"1"}


def test_layers_are_measured_apart_by_bias_kind_and_sparsity_and_together_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = latencies(monkeypatch, 0.5)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10, bias=False), Conv1D(10, 10))
    model = thin(model).append(thin(nn.Sequential(nn.Linear(10, 10)), 0.9))
    assert sorted(report.modules for report in choose_paths(model, 4)) == [1, 1, 1, 2]
    assert asked == [2, 2, 2, 2]


def test_many_sparsities_are_rounded_more_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = latencies(monkeypatch, 0.5)
    model = nn.Sequential(*(thin(nn.Sequential(nn.Linear(10, 10)), share / 100) for share in range(60, 91)))
    reports = choose_paths(model, 4)
    assert len(asked) == len(reports) == 7 and sum(report.modules for report in reports) == 31
    assert min(report.sparsity for report in reports) == pytest.approx(0.61)  # of 0.60, 0.61 and 0.62


def test_choosing_again_begins_with_dense_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies(monkeypatch, 0.5)
    model = thin(nn.Sequential(nn.Linear(10, 10)))
    first = model[0]
    assert choose_paths(model, 4) == choose_paths(model, 4)
    assert isinstance(model[0], SparseLinear) and model[0].dense is first


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
@pytest.mark.parametrize("path", ["auto", "sparse"])
def test_in_half_precision_a_cpu_has_dense_kernels_only(
    path: Any, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    latencies(monkeypatch, 0.1)
    model = thin(nn.Sequential(nn.Linear(12, 10))).to(dtype)
    (report,) = choose_paths(model, 4, precision=precision, path=path)
    assert (report.path, report.sparse_seconds, report.dense_seconds) == ("dense", None, DENSE_SECONDS)
    assert not sparse_names(model)


# --- the measurement ----------------------------------------------------------------------------------------------


class Clock:
    """One that only calls advance."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def call(self, *seconds: float) -> Callable[[], None]:
        """A call that takes these seconds one after the other, the last ones for ever."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_a_latency_is_the_median_after_one_call_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(sparse_paths, "time", clock)
    calls = [clock.call(90.0, 3.0, 1.0, 2.0, 50.0), clock.call(7.0, 4.0, 6.0, 5.0, 0.0)]
    assert sparse_paths._latencies(calls, 3, 1000.0) == pytest.approx([2.0, 5.0])


def test_measuring_ends_when_the_time_is_over_and_not_before_there_is_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seconds, expected in ((0.0, 3.0), (13.5, 2.0)):
        clock = Clock()
        monkeypatch.setattr(sparse_paths, "time", clock)
        assert sparse_paths._latencies([clock.call(10.0, 3.0, 1.0, 8.0)], 9, seconds) == pytest.approx([expected])


def test_large_matrices_are_measured_on_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies(monkeypatch, 0.5)
    monkeypatch.setattr(sparse_paths, "_MOST_PRODUCTS", 20_000)
    for size, tokens, measured in ((10, 900, 200), (10, 7, 7), (100, 900, 64), (5, 900, 512)):
        (report,) = choose_paths(thin(nn.Sequential(nn.Linear(size, size))), tokens)
        assert report.tokens == measured


def test_the_random_state_is_left_alone() -> None:
    model = thin(nn.Sequential(nn.Linear(10, 10)))
    state = torch.get_rng_state()
    (report,) = choose_paths(model, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.dense_seconds > 0 and report.sparse_seconds is not None and report.sparse_seconds > 0

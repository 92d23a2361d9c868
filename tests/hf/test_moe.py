"""Experts in transformers models: they begin as the model they came from, and load and train as any model does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import VOCABULARY, logits, make
from safetensors.torch import load_file

import mpocli  # noqa: F401  (registers the loader)
from mpocli.config.expand_moe import ExpandConfig
from mpocli.config.routing import RoutingConfig
from mpocli.hf.routing import last_of, routers
from mpocli.methods.expand_moe import run as expand_moe
from mpocli.nn import MPOExperts, RouterOptions

FAMILIES = (
    "bert-classifier",
    "bert-masked-lm",
    "albert",
    "roberta",
    "distilbert",
    "gpt2",
    "llama",
    "phi3",  # its gate and what it gates are one matrix
    "t5",
    "bart",
    "opt",
)


def expanded(family: str, work: Path, **options: object) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    """The dense model, and its mixture of experts out of the files."""
    dense = make(family, work / "dense")
    options.setdefault("experts", 3)
    expand_moe.run(str(work / "dense"), ExpandConfig(**options), work / "moe", overwrite=True)
    return dense, type(dense).from_pretrained(work / "moe").eval()


def routing(**options: object) -> RoutingConfig:
    return RoutingConfig(RouterOptions(**options))


@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_it_computes_what_the_dense_model_does(family: str, tmp_path: Path) -> None:
    dense, moe = expanded(family, tmp_path)
    expected = logits(dense)
    assert any(isinstance(module, MPOExperts) for module in moe.modules())
    assert (logits(moe) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("share", ["central", "none", None])
@pytest.mark.parametrize(("kind", "k"), [("switch", 1), ("topk", 1), ("topk", 2)])
def test_the_start_is_exact_for_every_router_and_way_of_sharing(
    share: str | None, kind: str, k: int, tmp_path: Path
) -> None:
    dense, moe = expanded("gpt2", tmp_path, share=share, routing=routing(kind=kind, top_k=k, capacity_factor=9.0))
    expected = logits(dense)
    assert (logits(moe) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_gate_in_one_matrix_with_what_it_gates_is_chosen_for_by_each_of_several_experts(tmp_path: Path) -> None:
    dense, moe = expanded("phi3", tmp_path, routing=routing(kind="topk", top_k=2))
    assert (logits(moe) - logits(dense)).abs().max() <= 1e-5 * max(1.0, float(logits(dense).abs().max()))


@pytest.mark.parametrize(
    ("shapes", "last"),
    [
        ([(48, 32), (32, 48)], 1),
        ([(48, 32), (48, 32), (32, 48)], 2),
        ([(32, 32), (32, 32)], 1),
        ([(96, 32), (32, 48)], 1),
        ([(32, 48), (96, 32)], 0),
        ([(96, 32), (96, 32), (32, 48)], None),  # two first ones, and one that takes half of each
        ([(96, 32), (96, 32)], None),
        ([(144, 32), (32, 48)], None),
        ([(48, 32)], None),
    ],
)
def test_a_network_goes_back_by_one_matrix(shapes: list[tuple[int, int]], last: int | None) -> None:
    assert last_of(shapes) == last


def test_saved_again_it_is_bit_equal_and_its_core_is_stored_once(tmp_path: Path) -> None:
    _, moe = expanded("gpt2", tmp_path, noise=0.1)
    moe.save_pretrained(tmp_path / "again")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(moe))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    core = [tensor for key, tensor in first.items() if key.endswith("h.0.mlp.c_fc.core_2")]
    assert len(core) == 1 and core[0].dim() == 4
    assert first["transformer.h.0.mlp.c_fc.core_0"].shape[0] == 3
    assert [key for key in first if "router" in key and "h.0" in key] == [
        "transformer.h.0.mlp.c_fc.router.bias",
        "transformer.h.0.mlp.c_fc.router.weight",
    ]


def test_the_balance_loss_enters_in_a_plain_loop_and_in_training_alone(tmp_path: Path) -> None:
    _, moe = expanded("gpt2", tmp_path, routing=routing(balance_loss=0.5))
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    without = moe(ids, labels=ids).loss
    moe.train()
    for module in moe.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = moe(ids, labels=ids).loss
    assert len(routers(moe)) == 2
    # n Σ f P lies between n·min P and n·max P, and a fresh router's P is close to 1/n: each layer adds about 0.5.
    assert float((loss - without).detach()) == pytest.approx(0.5 * 2, abs=0.1)
    loss.backward()
    for router in routers(moe).values():
        assert router.weight.grad is not None and float(router.weight.grad.abs().max()) > 0


def test_padding_neither_counts_nor_moves_the_loss(tmp_path: Path) -> None:
    _, moe = expanded("bert-classifier", tmp_path)
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 4])
    for router in routers(moe).values():
        router.statistics = type(router.statistics)()
    moe(padded, attention_mask=mask)
    assert [router.statistics.report()["tokens"] for router in routers(moe).values()] == [6, 6]
    losses = []
    moe.train()
    for module in moe.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        losses.append(moe(**inputs, labels=torch.tensor([1])).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_copy_has_routers_of_its_own(tmp_path: Path) -> None:
    _, moe = expanded("bert-classifier", tmp_path)
    twin = copy.deepcopy(moe)
    ids = torch.randint(3, VOCABULARY, (2, 5))
    twin(ids, attention_mask=torch.ones_like(ids))
    assert all(router.statistics.report() == {} for router in routers(moe).values())
    assert all(router.statistics.report()["tokens"] == 10 for router in routers(twin).values())


def test_a_cached_generation_is_that_of_the_dense_model(tmp_path: Path) -> None:
    dense, moe = expanded("gpt2", tmp_path)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(moe.generate(ids, **options), dense.generate(ids, **options))


def test_experts_fit_the_formula(tmp_path: Path) -> None:
    """(n + γ)/(n (γ + 1)) of n MPOs that share nothing, γ = central / auxiliary parameters of one."""
    make("gpt2", tmp_path / "dense")
    sizes = {}
    for share in ("central", "none"):
        config = ExpandConfig(experts=8, share=share)
        report = expand_moe.run(str(tmp_path / "dense"), config, tmp_path / share)
        sizes[share] = report.modules
        assert report.totals.params == tf.AutoModelForCausalLM.from_pretrained(tmp_path / share).num_parameters()
    for shared, own in zip(sizes["central"], sizes["none"], strict=True):
        gamma = shared.shared_params / shared.own_params
        stored, unshared = (module.params - module.router_params for module in (shared, own))
        assert stored / unshared == pytest.approx((8 + gamma) / (8 * (gamma + 1)), rel=1e-12)

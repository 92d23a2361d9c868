"""The optimiser's state follows a cut bond: the next step is the one that theory gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from mpocli.config.decompose import DecomposeConfig
from mpocli.config.optimisation import Optimisation
from mpocli.hf.shrink import mpo_modules, set_mpo
from mpocli.methods.decompose import run as decompose
from mpocli.mpo import cut_bond
from mpocli.train.data.collate import collate
from mpocli.train.loop.optimizer_state import cut_moments, take_moments
from mpocli.train.loop.sampler import ByLength, Stretch
from mpocli.train.loop.schedule import Schedule, SegmentPlace
from mpocli.train.loop.segment import train_segment
from mpocli.train.loop.trainer import SegmentTrainer
from mpocli.train.loop.updates import set_update

NAME = "bert.encoder.layer.0.attention.self.query"
RATE, BETAS, EPSILON = 1e-2, (0.9, 0.999), 1e-8


class Gradients(tf.TrainerCallback):
    """Every parameter and its gradient right before the first step, and the parameters right after it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        held = {name: p for name, p in model.named_parameters() if p.grad is not None}
        self.before = {name: p.detach().clone() for name, p in held.items()}
        self.gradients = {name: p.grad.detach().clone() for name, p in held.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.after = {name: p.detach().clone() for name, p in model.named_parameters()}


def features() -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(5, 90, (16, 6), generator=generator).tolist()
    return [{"input_ids": ids, "attention_mask": [1] * 6, "labels": k % 2} for k, ids in enumerate(rows)]


def segment(model: Any, directory: Path, number: int, steps: int, **more: Any) -> SegmentTrainer:
    chosen = Optimisation(lr=RATE, batch_size=4, log_steps=1, clip=1e9)
    place = SegmentPlace(number, (number - 1) * steps)
    return SegmentTrainer(
        *(model, features(), lambda batch: collate(batch, 0), chosen, Schedule(100, 0), steps, directory),
        device=torch.device("cpu"),
        place=place,
        checkpoints=False,
        **more,
    )


@pytest.fixture
def model(tmp_path: Path) -> Any:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16, **still)
        tf.BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), DecomposeConfig(), tmp_path / "mpo")
    return tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "mpo")


@pytest.mark.parametrize("update", ["auxiliary", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_step_after_a_cut_is_adamw_with_the_mapped_moments(
    model: Any, tmp_path: Path, update: str, side: str
) -> None:
    set_update(model, update)
    first = segment(model, tmp_path / "1", 1, 4)
    train_segment(first)
    old = take_moments(model, first.optimizer)
    module = mpo_modules(model)[NAME]
    bond = module.central + (side == "right")
    after, cut = cut_bond(module.to_mpo(), bond, module.bond_dims[bond] - 3)
    set_mpo(model, NAME, after)
    moments = {name: dict(state) for name, state in old.items()}
    cut_moments(moments, NAME, cut)

    seen = Gradients()
    second = segment(model, tmp_path / "2", 2, 1, moments=moments, callbacks=[seen])
    train_segment(second)

    q, p = cut.right.float(), cut.left.float()
    a, b = f"{NAME}.core_{bond - 1}", f"{NAME}.core_{bond}"
    expected = {name: (state["exp_avg"], state["exp_avg_sq"]) for name, state in old.items()}
    if a in old:  # A' = A P: g Qᵀ on the right leg, v with the squares
        m, v = expected[a]
        expected[a] = torch.einsum("aoib,cb->aoic", m, q), torch.einsum("aoib,cb->aoic", v, q**2)
    if b in old:  # B' = Q B: Pᵀ g on the left leg
        m, v = expected[b]
        expected[b] = torch.einsum("bc,boia->coia", p, m), torch.einsum("bc,boia->coia", p**2, v)
    assert (a in old) + (b in old) == (2 if update == "all" else 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == expected.keys() == seen.gradients.keys()
    for name, (m, v) in expected.items():
        gradient, start = seen.gradients[name].double(), seen.before[name].double()
        assert start.shape == m.shape, name
        m = BETAS[0] * m.double() + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v.double() + (1 - BETAS[1]) * gradient**2
        m_hat, v_hat = m / (1 - BETAS[0] ** 5), v / (1 - BETAS[1] ** 5)  # the fifth step of its optimiser
        step = RATE * m_hat / (v_hat.sqrt() + EPSILON)
        assert float((seen.after[name].double() - (start - step)).abs().max()) <= 1e-6, name


def test_gradients_follow_a_lossless_cut_as_the_moments_do(model: Any) -> None:
    """The theory behind the map: with nothing cut off, g_A' = g_A Qᵀ and g_B' = Pᵀ g_B."""
    batch = collate(features()[:4], 0)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with torch.no_grad():  # a gauge that is not canonical
        mpo_modules(model)[NAME].cores[1].mul_(1.3).add_(0.01)
    before = gradients()
    module = mpo_modules(model)[NAME]
    bond = module.central
    after, cut = cut_bond(module.to_mpo(), bond, module.bond_dims[bond])
    set_mpo(model, NAME, after)
    found = gradients()
    a, b = f"{NAME}.core_{bond - 1}", f"{NAME}.core_{bond}"
    wanted = {
        a: torch.einsum("aoib,cb->aoic", before[a].double(), cut.right),
        b: torch.einsum("bc,boia->coia", cut.left, before[b].double()),
    }
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()), name


def test_a_stretch_goes_on_where_the_one_before_it_stopped() -> None:
    """Segments of one, two and five steps see, one after another, the batches of a single long one."""
    lengths = [3 + k % 7 for k in range(23)]

    def order(first: int, steps: int) -> list[int]:
        return list(Stretch(ByLength(lengths, 4, seed=9), 4, first, steps))

    whole = order(0, 16)
    for size in (1, 2, 4, 8):
        assert [k for first in range(0, 16, size) for k in order(first, size)] == whole
    per_epoch = 5 * 4  # 23 samples: five whole batches
    for epoch in range(3):
        seen = whole[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert len(set(seen)) == len(seen) == per_epoch
    assert whole[:per_epoch] != whole[per_epoch : 2 * per_epoch]
    few = list(Stretch(ByLength([1, 2, 3], None, seed=1), 4, 0, 2))
    assert len(few) == 8 and set(few) == {0, 1, 2}

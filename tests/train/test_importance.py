"""Scores of matrices: the loss with a matrix zeroed, and what gradients of ordinary steps say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from mpocli.config.optimisation import Optimisation
from mpocli.train.data.collate import collate
from mpocli.train.importance import GradientScores, mean_loss, zeroed_losses
from mpocli.train.loop.schedule import Schedule, SegmentPlace
from mpocli.train.loop.segment import train_segment
from mpocli.train.loop.trainer import SegmentTrainer

NAMES = [f"bert.encoder.layer.{k}.{part}.weight" for k in (0, 1) for part in ("attention.self.value", "output.dense")]


@pytest.fixture
def model() -> Any:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16, **still)
        return tf.BertForSequenceClassification(config)


def features() -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(5, 90, (16, 6), generator=generator).tolist()
    return [{"input_ids": ids, "attention_mask": [1] * 6, "labels": k % 2} for k, ids in enumerate(rows)]


def test_zeroed_losses_are_the_change_of_the_loss_and_leave_no_trace(model: Any) -> None:
    batches = [collate(features()[:8], 0), collate(features()[8:], 0)]
    weights = {name: model.get_parameter(name) for name in NAMES}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = zeroed_losses(lambda: mean_loss(model, batches), weights)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    model.eval()
    whole = sum(float(model(**batch).loss.detach()) for batch in batches) / 2
    for name in NAMES:
        state = {**before, name: torch.zeros_like(before[name])}
        losses = [float(torch.func.functional_call(model, state, kwargs=batch).loss) for batch in batches]
        assert abs(found[name] - abs(whole - sum(losses) / 2)) <= 1e-6
    assert max(found.values()) > 1e-4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_scores_add_up_inner_products_of_the_steps_that_are_taken(
    accumulation: int, model: Any, tmp_path: Path
) -> None:
    """Against gradients computed apart, and with not one pass more than training needs."""
    forwards = 0
    model.register_forward_hook(lambda *_: count())

    def count() -> None:
        nonlocal forwards
        forwards += 1

    wanted = dict.fromkeys(NAMES, 0.5)  # what an earlier segment had found
    seen: list[Any] = []

    class Watch(tf.TrainerCallback):
        def on_step_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    rows = features()
    chosen = Optimisation(lr=1e-2, batch_size=4, accumulation=accumulation, log_steps=1, clip=1e9)
    counted = GradientScores(NAMES, wanted)
    trainer = SegmentTrainer(
        *(model, rows, lambda batch: collate(batch, 0), chosen, Schedule(100, 0), 2, tmp_path),
        device=torch.device("cpu"),
        callbacks=[counted, Watch()],
        place=SegmentPlace(0, 0),
        checkpoints=False,
    )
    order = list(trainer.sampler)
    train_segment(trainer)
    assert forwards == 2 * accumulation
    together = 4 * accumulation
    for step, state in enumerate(seen):
        picked = [rows[k] for k in order[step * together : (step + 1) * together]]
        free = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
        torch.func.functional_call(model, free, kwargs=collate(picked, 0)).loss.backward()
        for name in NAMES:
            gradient = free[name].grad
            assert gradient is not None
            wanted[name] += abs(float((gradient.double() * state[name].double()).sum()))
    for name, score in counted.scores.items():
        assert abs(score - wanted[name]) <= 1e-5 * wanted[name], name

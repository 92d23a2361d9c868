"""The training loss is the mean over what is predicted, for every class, however a step is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import BERT, GPT2, LLAMA, T5, VOCABULARY
from torch import Tensor

from mpocli.config.optimisation import Optimisation
from mpocli.train.data.collate import IGNORE, collate
from mpocli.train.evaluate.predictions import shifts_labels
from mpocli.train.loop.schedule import Schedule
from mpocli.train.loop.segment import train_segment
from mpocli.train.loop.trainer import SegmentTrainer

CALM: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Whether each predicts the next token, and whether its own loss shifts the labels for that.
MODELS: dict[str, tuple[Callable[[], tf.PreTrainedModel], bool, bool]] = {
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, **CALM)), True, True),
    "openai-gpt": (
        lambda: tf.OpenAIGPTLMHeadModel(
            tf.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, **CALM)
        ),
        True,
        True,
    ),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), True, True),
    "bert-decoder": (lambda: tf.BertLMHeadModel(tf.BertConfig(**BERT, **STILL, is_decoder=True)), True, True),
    "xlnet": (
        lambda: tf.XLNetLMHeadModel(
            tf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=32, dropout=0.0)
        ),
        True,
        False,
    ),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT, **STILL)), False, False),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, dropout_rate=0.0)), False, False),
    "classifier": (
        lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2, **CALM, num_labels=3, pad_token_id=0)),
        False,
        False,
    ),
}


def rows(kind: str) -> list[dict[str, Any]]:
    """Of lengths that differ, with a part of them not to be predicted; one row asks for nothing but its first token."""
    made = []
    for index, length in enumerate((9, 3, 12, 1, 5, 7, 4, 11)):
        ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(index)).tolist()
        labels: Any = index % 3 if kind == "classifier" else [IGNORE] * (length // 4) + ids[length // 4 :]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


class FirstGradients(tf.TrainerCallback):
    """The gradients of the first step, before they are clipped."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "accumulation"), [("gpt2", 1), ("gpt2", 8), *((kind, 4) for kind in MODELS)])
def test_a_step_s_gradient_is_that_of_the_mean_over_all_that_it_predicts(
    kind: str, accumulation: int, tmp_path: Path
) -> None:
    build, next_token, _ = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    data = rows(kind)
    # By hand: log-probabilities of every label, one row at a time, without padding.
    model.eval()
    losses = []
    for row in data:
        labels = torch.tensor([row["labels"]])
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        if model.config.is_encoder_decoder:
            inputs["labels"] = labels
        logits = model(**inputs).logits.log_softmax(-1)
        if next_token:
            logits, labels = logits[:, :-1], labels[:, 1:]
        for place in (labels != IGNORE).nonzero():
            losses.append(-logits[tuple(place)][labels[tuple(place)]])
    expected = torch.stack(losses).mean()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    seen = FirstGradients()
    size = len(data) // accumulation
    chosen = Optimisation(lr=0.0, batch_size=size, accumulation=accumulation, clip=1e9, group_by_length=False)
    trainer = SegmentTrainer(
        model,
        data,
        lambda batch: collate(batch, 0),
        chosen,
        Schedule(1, 0),
        1,
        tmp_path,
        device=torch.device("cpu"),
        next_token=next_token,
        callbacks=[seen],
        checkpoints=False,
    )
    train_segment(trainer)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    most = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (seen.found[name] - gradient).abs().max() <= 1e-4 * most, name


@pytest.mark.parametrize("kind", [kind for kind, (_, next_token, _) in MODELS.items() if next_token])
def test_a_loss_is_asked_whether_it_shifts_labels(kind: str) -> None:
    build, _, shifts = MODELS[kind]
    model = build().train()
    assert shifts_labels(model) is shifts
    assert model.training

"""The demo models as they begin: sizes and initial weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
)

from mpocli.train.demo.settings import Settings


def new_bert(tokenizer: BertTokenizerFast, settings: Settings) -> BertForMaskedLM:
    """An untrained BERT, drawn from torch's generator."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        max_position_embeddings=settings.window,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,  # no run is long enough to learn its text by heart
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config)
    _look_at_neighbours(model)
    return model


@torch.no_grad()
def _look_at_neighbours(model: Any, size: int = 16) -> None:
    """Let the heads of BERT's first layer start with their eyes on the words next to each position.

    From a usual initialisation BERT spends thousands of steps on the frequencies of the words before it finds out
    that neighbours matter. Here the first `size` dimensions hold sinusoids of the position, words stay nearly out of
    them, and the queries and keys read them so that each head begins at one distance. All of it is trained on.
    """
    embeddings, attention = model.bert.embeddings, model.bert.encoder.layer[0].attention
    positions, words = embeddings.position_embeddings.weight, embeddings.word_embeddings.weight
    frequencies = torch.logspace(math.log10(3), -1, size // 2)  # radians per position
    angles = torch.arange(len(positions))[:, None] * frequencies
    positions.zero_()
    positions[:, :size] = 0.05 * torch.cat([angles.sin(), angles.cos()], dim=1)
    words[:, :size] *= 0.1
    embeddings.token_type_embeddings.weight.zero_()
    queries = attention.self.query.weight.chunk(model.config.num_attention_heads)
    keys = attention.self.key.weight.chunk(model.config.num_attention_heads)
    for head, (query, key) in enumerate(zip(queries, keys, strict=True)):
        distance = (head // 2 + 1) * (-1) ** (head + 1)
        sin, cos = (frequencies * distance).sin().diag(), (frequencies * distance).cos().diag()
        query[:size, :size] += 2.5 * torch.eye(size)
        key[:size, :size] += 2.5 * torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])
    for weight in (attention.self.value.weight, attention.output.dense.weight):
        weight.normal_(std=weight.shape[1] ** -0.5)  # keeps the size of what the heads bring


def new_gpt2(tokenizer: GPT2TokenizerFast, settings: Settings) -> GPT2LMHeadModel:
    """An untrained GPT-2, drawn from torch's generator."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_positions=settings.window,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in one kernel
        initializer_range=0.05,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)

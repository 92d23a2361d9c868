"""Tiny random models from configs and a fixed seed, saved as any user would save them.

Every function takes the directory to save to and returns the model, in `eval` mode. Keyword arguments go to the
model's config. Nothing here imports mpocli.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 211  # a prime, as awkward as 30522 or 50257
SEED = 1234

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 86,  # 2·43: must be padded
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries: k and v are 24×48
    "max_position_embeddings": 64,
}


def bert_classifier(directory: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> tf.PreTrainedModel:
    """Embedding, attention, feed-forward, pooler and head: every role."""
    made = tf.BertConfig(**{**BERT, "num_labels": 3, **config})
    return save(tf.BertForSequenceClassification, made, directory, dtype)


def bert_masked_lm(directory: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> tf.PreTrainedModel:
    """Its decoder is tied to the token embedding."""
    return save(tf.BertForMaskedLM, tf.BertConfig(**{**BERT, **config}), directory, dtype)


def gpt2(directory: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> tf.PreTrainedModel:
    """Conv1D layers, which store the transpose, and a tied head."""
    return save(tf.GPT2LMHeadModel, tf.GPT2Config(**{**GPT2, **config}), directory, dtype)


def t5(directory: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> tf.PreTrainedModel:
    """Encoder and decoder, cross-attention, a token table shared by three modules."""
    return save(tf.T5ForConditionalGeneration, tf.T5Config(**{**T5, **config}), directory, dtype)


def llama(directory: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> tf.PreTrainedModel:
    """Grouped-query attention, gated feed-forward, no biases, an untied head."""
    return save(tf.LlamaForCausalLM, tf.LlamaConfig(**{**LLAMA, **config}), directory, dtype)


def save(cls: Any, config: tf.PretrainedConfig, directory: Path, dtype: torch.dtype) -> tf.PreTrainedModel:
    """A random model of a class, saved."""
    return prepared(lambda: cls(config), directory, dtype)


def prepared(build: Callable[[], tf.PreTrainedModel], directory: Path, dtype: torch.dtype) -> tf.PreTrainedModel:
    """Build a model from the fixed seed and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # At the usual 0.02 the logits would be too small for a relative bound to mean anything.
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() > 1 else 0.05)
    model = model.to(dtype)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def logits(model: tf.PreTrainedModel) -> Tensor:
    """The first output on a fixed batch, one row of it padded."""
    ids = torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :9]
    output: Tensor = model(**inputs)[0]
    return output

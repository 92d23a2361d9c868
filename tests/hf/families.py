"""Tiny models of every family, from configs and a fixed seed, with an input to run each of them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from models import BERT, GPT2, LLAMA, T5, VOCABULARY, logits, prepared

__all__ = ["FAMILIES", "VOCABULARY", "logits", "make"]


def _switch() -> tf.PreTrainedModel:
    config = tf.SwitchTransformersConfig(
        **{k: v for k, v in T5.items() if k != "num_decoder_layers"},
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=3,
    )
    return tf.SwitchTransformersForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**BERT)),
    "bert-classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=3)),
    "bert-masked-lm": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
    "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**BERT, embedding_size=16)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**BERT)),
    "roberta-classifier": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**BERT)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=4, hidden_dim=96)
    ),
    "distilbert-masked-lm": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=4, hidden_dim=96)
    ),
    "electra": lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**BERT, embedding_size=16)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "t5-gated-untied": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "switch": _switch,
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_position_embeddings=64,
            scale_embedding=True,
        )
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLAMA, pad_token_id=0)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA, tie_word_embeddings=True)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**LLAMA, head_dim=12)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
        )
    ),
}


def make(family: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """Build a family's model and save it as any user would."""
    return prepared(FAMILIES[family], directory, dtype)

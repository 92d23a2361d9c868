"""Tiny models of every family, from configs and a fixed seed, with an input to run each of them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 211  # a prime, as awkward as 30522 or 50257

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 86,  # 2·43: must be padded
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _switch() -> tf.PreTrainedModel:
    config = tf.SwitchTransformersConfig(
        **{k: v for k, v in _T5.items() if k != "num_decoder_layers"},
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=3,
        decoder_start_token_id=0,
    )
    return tf.SwitchTransformersForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**_BERT)),
    "bert-classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT, num_labels=3)),
    "bert-masked-lm": lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
    "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**_BERT, embedding_size=16)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_BERT)),
    "roberta-classifier": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_BERT)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=4, hidden_dim=96)
    ),
    "distilbert-masked-lm": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=4, hidden_dim=96)
    ),
    "electra": lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**_BERT, embedding_size=16)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    ),
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
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5, decoder_start_token_id=0)),
    "t5-gated-untied": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
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
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_LLAMA, head_dim=12)),
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
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = FAMILIES[family]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # At their usual 0.02 the logits would be too small for a relative bound to mean anything.
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() > 1 else 0.05)
    model = model.to(dtype)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def logits(model: tf.PreTrainedModel) -> Tensor:
    """The first output on a fixed batch with padding."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (3, 17), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :9]
    output: Tensor = model(**inputs)[0]
    return output

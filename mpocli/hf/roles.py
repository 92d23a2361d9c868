"""Which part of a transformer a weight belongs to, told from its module's name."""

from __future__ import annotations

import re

# A component of a module's path that makes everything below it a head.
_HEAD = re.compile(
    r"lm_head|cls|classifier|score|qa_outputs|predictions|generator_predictions|generator_lm_head|vocab_transform|"
    r"vocab_projector|vocab_layer_norm|pre_classifier|seq_relationship|classification_head|embed_out|mlm_head|"
    r"sop_classifier|discriminator_predictions|logits_proj|sequence_summary|decoder_head|lm_loss|pred_layer|head"
)
_POOLER = re.compile(r"pooler")
_ATTENTION_PARENT = re.compile(
    r"attention|attn|self_attn|self_attention|selfattention|encdecattention|encoder_attn|cross_attn|crossattention|"
    r"multihead_attn|multi_head_attention|attentions|attention_layer|linear_attn|localselfattention|"
    r"transientglobalselfattention"
)
_ATTENTION_LEAF = re.compile(
    r"query|key|value|q|k|v|o|[qkvo]_proj|out_proj|[qkv]_lin|out_lin|c_attn|q_attn|query_key_value|qkv|qkv_proj|wqkv|"
    r"in_proj|query_proj|key_proj|value_proj|[qkv]_head|post_proj|w[qkv]|(query|key|value)_global|receptance|(q|kv)_[ab]_proj(_with_mqa)?|pos_(key|query)_proj"
)
# Leaves that are attention directly below an attention module, its gates among them.
_ATTENTION_CHILD = re.compile(
    r"\w+_(proj|query|key|value)|(linear|to)_(q|k|v|kv|query|key|value|out|pos)|query_key|output_gate|projection"
)
# Leaves that are attention beside an attention parent, feed-forward elsewhere.
_EITHER_LEAF = re.compile(r"dense|c_proj|wo|proj|fc_out|output")
# Leaves that are feed-forward only below such a parent.
_PLAIN_LEAF = re.compile(r"\d+|(linear|layer)_?\d|key|value|receptance")
# Leaves that are so directly below one, and not in an adapter within it.
_FFN_CHILD = re.compile(
    r"(dense|ffw_layer|linear_fc)_?\d|linear_(in|out)|proj_(in|out)|(input|output)_linear|(intermediate|output)_dense|w_out"
)
_FFN_LEAF = re.compile(
    r"intermediate|ffn|ffn_output|lin[12]|w[io]|wi_[01]|up_proj|gate_proj|down_proj|gate_up_proj|fc[12]|fc_in|fc_out|"
    r"c_fc|c_fc_?\d|dense_h_to_4h|dense_4h_to_h|w[123]|up|down|gate_up|dense_in|dense_out"
)
_FFN_PARENT = re.compile(
    r"intermediate|output|mlp|shared_mlp|ffn?\d?|feed_forward|densereludense|experts?|expert_\d+|bottleneck"
)
_STATE_SPACE = re.compile(r"mixer|mamba|ssm|conv")
# What a hybrid's attention has and its state space has not, where both are called the same.
_MIXED_ATTENTION_LEAF = re.compile(r"[qkvo]_proj")
_ROUTER_LEAF = re.compile(r"router|gate|shared_expert_gate|classifier_router")


def role_of(name: str, *, is_embedding: bool = False) -> str | None:
    """Role of a linear layer by its module path, or `embedding` for the token table; None for anything else.

    >>> role_of("bert.encoder.layer.0.attention.output.dense"), role_of("bert.encoder.layer.0.output.dense")
    ('attention', 'ffn')
    >>> role_of("transformer.h.0.mlp.c_proj"), role_of("embeddings.position_embeddings")
    ('ffn', None)
    """
    if is_embedding:
        return "embedding"
    parts = name.lower().split(".")
    leaf, parents = parts[-1], parts[:-1]
    if any(_HEAD.fullmatch(part) for part in parts if part != "router") or parts == ["decoder"]:
        return None if "router" in parts else "head"
    if any(_POOLER.fullmatch(part) for part in parts):
        return "pooler"
    if "router" in parts or _ROUTER_LEAF.fullmatch(leaf):
        return None
    in_attention = any(_ATTENTION_PARENT.fullmatch(part) for part in parents)
    if in_attention and (_ATTENTION_LEAF.fullmatch(leaf) or _EITHER_LEAF.fullmatch(leaf)):
        return "attention"
    if in_attention and "output" in parents:
        return "attention"
    holder = next((part for part in reversed(parents) if part != "self"), "")  # BERT's kind has attention.self.query
    if _ATTENTION_PARENT.fullmatch(holder) and _ATTENTION_CHILD.fullmatch(leaf):
        return "attention"
    if _FFN_LEAF.fullmatch(leaf):
        return "ffn"
    if any(_FFN_PARENT.fullmatch(part) for part in parents) and (
        _EITHER_LEAF.fullmatch(leaf) or _PLAIN_LEAF.fullmatch(leaf)
    ):
        return "ffn"
    if _FFN_PARENT.fullmatch(holder) and _FFN_CHILD.fullmatch(leaf):
        return "ffn"
    if any(_STATE_SPACE.fullmatch(part) for part in parents) and not _MIXED_ATTENTION_LEAF.fullmatch(leaf):
        return None
    if _ATTENTION_LEAF.fullmatch(leaf) and leaf not in ("q", "k", "v", "o", "in_proj"):
        return "attention"
    return None

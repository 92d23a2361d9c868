"""Roles of modules by the names that families give them."""

from __future__ import annotations

import pytest

from mpocli.hf.roles import role_of


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("bert.encoder.layer.0.attention.output.dense", "attention"),
        ("bert.encoder.layer.0.output.dense", "ffn"),
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.mlp.gate_proj", "ffn"),
        ("model.layers.0.mlp.gate", None),  # a router
        ("model.layers.0.self_attn.gate_proj", "attention"),  # AFMoE gates what attention puts out
        ("model.layers.0.self_attn.output_gate", "attention"),  # and so does MiniMax
        ("model.layers.0.self_attention.kv_proj", "attention"),  # JetMoe
        ("encoder.layers.0.self_attn.linear_q", "attention"),  # conformers
        ("vision_model.encoder.layers.0.self_attn.projection", "attention"),  # BLIP
        ("luke.encoder.layer.0.attention.self.w2e_query", "attention"),
        ("wav2vec2.encoder.layers.0.feed_forward.intermediate_dense", "ffn"),
        ("wav2vec2.encoder.layers.0.feed_forward.output_dense", "ffn"),
        ("encoder.layers.0.ffn2.output_dense", "ffn"),  # conformers have two
        ("model.layers.0.shared_mlp.input_linear", "ffn"),  # Granite's
        ("model.visual.blocks.0.mlp.linear_fc2", "ffn"),
        ("model.language_model.layers.0.mlp.ffw_layer_1", "ffn"),
        ("roberta.encoder.layer.0.output.adapter_modules.en_XX.dense1", None),  # X-MOD's adapter of a language
        ("proj_out", None),
        ("model.layers.0.conv.in_proj", None),  # LFM2's convolution
        ("model.layers.0.conv.out_proj", None),
        ("backbone.layers.0.mixer.out_proj", None),  # Mamba's state space
        ("backbone.layers.1.mixer.o_proj", "attention"),  # a layer of Nemotron-H that has none
        ("backbone.layers.2.mixer.up_proj", "ffn"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", None),
        ("bert.encoder.layer.0.attention.self.distance_embedding", None),
        ("bert.embeddings.position_embeddings", None),
    ],
)
def test_a_name_tells_the_role(name: str, role: str | None) -> None:
    assert role_of(name) == role

"""Plain transformers loads sparse checkpoints as the dense models with the same zeros, whatever the class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from families import VOCABULARY, make
from models import save
from safetensors.torch import load_file, save_file
from sparse_checkpoints import (
    BRAIN,
    HALF,
    WEIGHTS,
    assert_same,
    bits,
    dense_with_zeros,
    edit_json,
    pruning,
    stored,
    weights_size,
    zeroed,
)

from mpocli.config.decompose import DecomposeConfig
from mpocli.config.merge import MergeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.inspect import run as inspect
from mpocli.methods.sparsify import run as sparsify

CASES = [
    ("bert-classifier", torch.float32),
    ("bert-masked-lm", BRAIN),
    ("gpt2", torch.float32),
    ("gpt2", HALF),
    ("llama", BRAIN),
    ("t5", torch.float32),
    ("t5-gated-untied", HALF),  # transformers keeps some of its weights in float32
    ("albert", torch.float32),
    ("roberta", HALF),
    ("distilbert", torch.float32),
    ("bart", torch.float32),
    ("switch", BRAIN),
    ("electra", torch.float32),
    ("opt", HALF),
]


# --- the same model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_a_sparse_checkpoint_loads_as_the_dense_model_with_the_same_zeros(
    family: str, dtype: torch.dtype, case: Callable[..., SimpleNamespace]
) -> None:
    made = case(family, dtype)
    loaded, info = made.cls.from_pretrained(made.sparse, output_loading_info=True)
    expected = made.cls.from_pretrained(made.oracle)
    assert_same(loaded, expected)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {name: type(p) for name, p in loaded.named_parameters()} == {
        name: type(p) for name, p in expected.named_parameters()
    }
    assert all(p.requires_grad for p in loaded.parameters())
    assert weights_size(made.sparse) < weights_size(made.dense)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_save_pretrained_gives_the_same_bits_twice_and_stays_small(
    family: str, dtype: torch.dtype, case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case(family, dtype)
    model = expected = made.cls.from_pretrained(made.sparse)
    for place in ("first", "second"):
        model.save_pretrained(tmp_path / place)
        model = made.cls.from_pretrained(tmp_path / place)
        assert_same(model, expected)
    before, after = stored(made.sparse), stored(tmp_path / "second")
    packed = {name for name in before if name.endswith(("_bitmask", "_values"))}
    assert packed and packed == {name for name in after if name.endswith(("_bitmask", "_values"))}
    assert sum(t.nbytes for t in after.values()) <= sum(t.nbytes for t in before.values()) * (
        2 if family == "t5-gated-untied" else 1  # what transformers holds in float32 it stores so
    )
    assert "an_mpo_checkpoint.import_mpocli_before_from_pretrained" in after
    # And mpocli's own commands read what a user saved.
    assert (
        Checkpoint.open(str(tmp_path / "second")).totals().params == Checkpoint.open(str(made.sparse)).totals().params
    )


@pytest.mark.parametrize("family", ["bert-masked-lm", "gpt2", "switch"])
def test_loading_in_a_given_dtype_is_loading_the_dense_model_in_it(
    family: str, case: Callable[..., SimpleNamespace]
) -> None:
    made = case(family, BRAIN)
    for dtype in (torch.float32, HALF, torch.float64):
        assert_same(
            made.cls.from_pretrained(made.sparse, dtype=dtype), made.cls.from_pretrained(made.oracle, dtype=dtype)
        )


@pytest.mark.parametrize("most", [4_000, 30_000])
def test_shards_of_any_size_load_and_save_the_same_bits(
    most: int, case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    """At 4000 bytes the mask, the values and the tombstone of a matrix lie in different files."""
    made = case("gpt2")
    sparsify.run(str(made.dense), pruning(max_shard_bytes=most), tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    loaded = made.cls.from_pretrained(tmp_path / "sharded")
    assert_same(loaded, made.cls.from_pretrained(made.oracle))
    loaded.save_pretrained(tmp_path / "again", max_shard_size=most)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert_same(made.cls.from_pretrained(tmp_path / "again"), loaded)


def test_options_of_from_pretrained_change_no_bit(case: Callable[..., SimpleNamespace]) -> None:
    made = case()
    expected = made.cls.from_pretrained(made.oracle)
    for options in ({"device_map": "cpu"}, {"device_map": "auto"}, {"ignore_mismatched_sizes": True}):
        assert_same(made.cls.from_pretrained(made.sparse, **options), expected)


def test_a_model_of_all_zero_and_of_full_matrices_comes_back(tmp_path: Path) -> None:
    """Empty tensors of values share the address 0, and are not shared."""
    dense = make("bert-classifier", tmp_path / "dense")
    layers = dense.bert.encoder.layer
    with torch.no_grad():
        for name in ("attention.self.query", "intermediate.dense"):
            for layer in layers:
                layer.get_submodule(name).weight.zero_()
        layers[0].output.dense.weight.fill_(-0.0)
    dense.save_pretrained(tmp_path / "dense")
    sparsify.run(str(tmp_path / "dense"), pruning(1e-6), tmp_path / "sparse")  # ⌊n·s⌋ = 0: no matrix loses an entry
    loaded = type(dense).from_pretrained(tmp_path / "sparse")
    assert_same(loaded, dense)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(type(dense).from_pretrained(tmp_path / "again"), dense)
    sizes = {name: len(t) for name, t in stored(tmp_path / "again").items() if name.endswith("_values")}
    # Where nothing is zero any more there is no mask to keep; the zeros with a sign are kept as values.
    assert sorted(sizes.values()) == [0] * 4 + [48 * 96]
    merge.run(str(tmp_path / "again"), MergeConfig(), tmp_path / "merged")
    assert_same(type(dense).from_pretrained(tmp_path / "merged"), dense)


# --- other classes of the same weights ------------------------------------------------------------------------------


def test_a_classifier_loads_as_encoder_and_an_encoder_under_a_new_head(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    whole = made.cls.from_pretrained(made.oracle)
    encoder = tf.AutoModel.from_pretrained(made.sparse)
    assert_same(encoder, whole.bert)
    encoder.save_pretrained(tmp_path / "encoder")
    assert weights_size(tmp_path / "encoder") < 1.02 * weights_size(made.sparse)
    headed, info = made.cls.from_pretrained(tmp_path / "encoder", num_labels=3, output_loading_info=True)
    assert_same(headed.bert, whole.bert)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    headed.save_pretrained(tmp_path / "headed")
    assert_same(made.cls.from_pretrained(tmp_path / "headed"), headed)
    # The commands read a base model's files too.
    views = {view.name: view.sparsity for view in inspect.run(str(tmp_path / "encoder")).modules}
    assert views["encoder.layer.1.output.dense"] == pytest.approx(0.8, abs=1e-3)


def test_a_sparse_head_is_left_out_of_what_a_headless_class_saves(tmp_path: Path) -> None:
    make("llama", tmp_path / "dense")
    sparsify.run(str(tmp_path / "dense"), pruning(layers=("head", "ffn")), tmp_path / "sparse")
    whole = tf.LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    assert float((whole.lm_head.weight == 0).float().mean()) == pytest.approx(0.8, abs=1e-3)
    body = tf.AutoModel.from_pretrained(tmp_path / "sparse")
    assert_same(body, whole.model)
    body.save_pretrained(tmp_path / "body")
    said = json.loads((tmp_path / "body" / "config.json").read_text())["quantization_config"]["encodings"]
    assert len(said) == 6 and not any("lm_head" in name for name in said)
    assert_same(tf.AutoModel.from_pretrained(tmp_path / "body"), body)


def test_files_whose_names_lack_the_base_prefix_go_through_every_command(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    """As those of the GPT-2 on the hub, whose config says GPT2LMHeadModel."""
    made = case("gpt2")
    for place in ("dense", "oracle"):
        shutil.copytree(made.path / place, tmp_path / place)
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(made.path / place / WEIGHTS).items()}
        save_file(tensors, tmp_path / place / WEIGHTS, metadata={"format": "pt"})
    expected = made.cls.from_pretrained(made.oracle)
    sparsify.run(str(tmp_path / "dense"), pruning(), tmp_path / "sparse")
    assert "h.0.mlp.c_fc.weight_bitmask" in stored(tmp_path / "sparse")
    assert_same(made.cls.from_pretrained(tmp_path / "sparse"), expected)
    assert_same(tf.AutoModel.from_pretrained(tmp_path / "sparse"), expected.transformer)
    sparsify.run(str(tmp_path / "sparse"), pruning(), tmp_path / "anew")
    assert_same(made.cls.from_pretrained(tmp_path / "anew"), expected)
    assert_same(stored(tmp_path / "anew"), stored(tmp_path / "sparse"))
    merge.run(str(tmp_path / "anew"), MergeConfig(), tmp_path / "merged")
    assert_same(stored(tmp_path / "merged"), stored(tmp_path / "oracle"))
    decompose.run(str(tmp_path / "sparse"), DecomposeConfig(targets=("*.c_attn",)), tmp_path / "some")
    name = "transformer.h.1.mlp.c_fc.weight"
    some = made.cls.from_pretrained(tmp_path / "some")
    assert torch.equal(bits(some.get_parameter(name)), bits(expected.get_parameter(name)))
    assert inspect.run(str(tmp_path / "some"), verify=True).problems == ()


@pytest.mark.parametrize(
    ("base", "config", "headed"),
    [
        (
            tf.GPT2Model,
            tf.GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=1, n_head=2, n_positions=40),
            tf.GPT2LMHeadModel,
        ),
        (
            tf.BertModel,
            tf.BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=40,
            ),
            tf.BertForMaskedLM,
        ),
    ],
    ids=["gpt2", "bert"],
)
def test_a_sparse_table_of_a_base_model_is_tied_to_the_head_that_another_class_adds(
    base: Any, config: Any, headed: Any, tmp_path: Path
) -> None:
    save(base, config, tmp_path / "dense", torch.float32)
    dense_with_zeros(
        tmp_path / "dense", tmp_path / "oracle", lambda name, tensor: "word_embeddings" in name or "wte" in name
    )
    sparsify.run(str(tmp_path / "dense"), pruning(layers=("embedding",)), tmp_path / "sparse")
    loaded, info = headed.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    table, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    expected = base.from_pretrained(tmp_path / "oracle").get_input_embeddings().weight
    assert head is table and torch.equal(bits(table), bits(expected))
    assert not {name for name in info["missing_keys"] if name.endswith(("decoder.weight", "lm_head.weight"))}
    loaded.tie_weights()
    assert loaded.get_output_embeddings().weight is table
    loaded.save_pretrained(tmp_path / "again")
    assert sum(t.numel() >= expected.numel() for t in stored(tmp_path / "again").values()) == 0  # no dense copy
    again = headed.from_pretrained(tmp_path / "again")
    assert_same(again, loaded)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    found = Checkpoint.open(str(tmp_path / "again")).totals()
    assert found.params == found.dense_params == loaded.num_parameters()
    merge.run(str(tmp_path / "again"), MergeConfig(), tmp_path / "merged")
    assert_same(headed.from_pretrained(tmp_path / "merged"), loaded)


def test_a_head_that_is_stored_apart_from_a_sparse_table_stays_apart(tmp_path: Path) -> None:
    dense = make("llama", tmp_path / "dense")
    sparsify.run(str(tmp_path / "dense"), pruning(layers=("embedding",)), tmp_path / "sparse")
    edit_json(tmp_path / "sparse" / "config.json", lambda config: config.update(tie_word_embeddings=True))
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(loaded.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, zeroed(dense.model.embed_tokens.weight.detach(), 0.8))

"""What transformers' models do themselves with weights by their shapes works where these are cores or packed."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import make
from models import VOCABULARY, logits, prepared
from sparse_checkpoints import pruning

import mpocli  # noqa: F401
from mpocli.config.decompose import DecomposeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.methods.decompose import run as decompose
from mpocli.methods.sparsify import run as sparsify
from mpocli.nn import MPOModule

LAYERS = ("embedding", "attention", "ffn", "head")


def stored(directory: Path, form: str) -> Path:
    """`dense` beside what was made of it: cores, packed matrices, or packed cores."""
    source = directory / "dense"
    if form != "sparse":
        decompose.run(str(source), DecomposeConfig(layers=LAYERS), directory / "mpo")
        source = directory / "mpo"
    if form != "mpo":
        sparsify.run(str(source), pruning(0.5, layers=LAYERS), directory / form)
    return directory / form


@pytest.mark.parametrize("form", ["mpo", "sparse", "sparse-mpo"])
def test_a_class_that_initialises_by_the_shape_of_its_weights_loads(form: str, tmp_path: Path) -> None:
    config = tf.FunnelConfig(vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=48, n_head=4, d_head=12, d_inner=96)
    prepared(lambda: tf.FunnelForMaskedLM(config), tmp_path / "dense", torch.float32)
    loaded = tf.FunnelForMaskedLM.from_pretrained(stored(tmp_path, form)).eval()
    found = logits(loaded)
    if form == "mpo":
        expected = logits(tf.FunnelForMaskedLM.from_pretrained(tmp_path / "dense").eval())
    else:
        loaded.dequantize()
        loaded.save_pretrained(tmp_path / "again")
        assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
        expected = logits(tf.FunnelForMaskedLM.from_pretrained(tmp_path / "again").eval())
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def _trained(model: tf.PreTrainedModel) -> None:
    """Gradients of every parameter, as a step of training would have them."""
    ids = torch.arange(3, 12)[None]
    model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))[0].sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("form", ["mpo", "sparse"])
@pytest.mark.parametrize("family", ["llama", "t5", "bert-masked-lm", "gpt2"])
def test_the_vocabulary_of_a_loaded_model_can_be_resized_and_is_saved_so(
    family: str, form: str, tmp_path: Path
) -> None:
    make(family, tmp_path / "dense")
    directory = stored(tmp_path, form)
    cls: Any = getattr(tf, Checkpoint.open(str(directory)).architecture)
    model = cls.from_pretrained(directory).eval()
    before = logits(model)
    twin = copy.deepcopy(model)
    _trained(model)
    with pytest.warns(UserWarning, match="dense from now on") if form == "mpo" else contextlib.nullcontext():
        table = model.resize_token_embeddings(VOCABULARY + 8)
    _trained(model)
    after = logits(model)
    assert table is model.get_input_embeddings() and table.weight.shape[0] == after.shape[-1] == VOCABULARY + 8
    assert torch.allclose(after[..., :VOCABULARY], before, atol=1e-4)
    assert torch.equal(logits(twin), before)
    assert any(isinstance(module, MPOModule) for module in model.modules()) == (form == "mpo")
    model.save_pretrained(tmp_path / "again")
    again = cls.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), after)
    again.resize_token_embeddings(VOCABULARY)
    assert torch.allclose(logits(again), before, atol=1e-4)


def test_a_submodel_resizes_the_table_that_the_whole_model_has(tmp_path: Path) -> None:
    make("llama", tmp_path / "dense")
    model = tf.LlamaForCausalLM.from_pretrained(stored(tmp_path, "mpo"))
    with pytest.warns(UserWarning, match="model.embed_tokens: dense from now on"):
        model.model.resize_token_embeddings(VOCABULARY + 8)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 8
    assert isinstance(model.lm_head, MPOModule)


def test_resizing_to_the_present_size_leaves_the_cores(tmp_path: Path) -> None:
    make("llama", tmp_path / "dense")
    model = tf.LlamaForCausalLM.from_pretrained(stored(tmp_path, "mpo"))
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    assert isinstance(model.get_input_embeddings(), MPOModule)

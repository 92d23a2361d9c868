"""Training changes values: every tensor is stored in the dtype that it had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from models import BERT, LLAMA
from safetensors.torch import load_file, save_file
from torch import Tensor

import mpocli  # noqa: F401  (registers the loader)
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.sparsify import SparsifyConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.stored import round_to, rounded, stored_dtypes
from mpocli.hf.surroundings import write_trained
from mpocli.methods.decompose import run as decompose
from mpocli.methods.sparsify import run as sparsify


def mixed(directory: Path, model: tf.PreTrainedModel) -> Path:
    """A checkpoint in bfloat16 whose norms are float32, with values that bfloat16 does not have."""
    model.to(torch.bfloat16).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: t.float() + 1e-4 for name, t in tensors.items() if "norm" in name.lower() and t.dim() == 1}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32}
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def llama(directory: Path) -> Path:
    return mixed(directory, tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)))


def bart(directory: Path) -> Path:
    """It stores a buffer, and one table for three modules."""
    sides = {
        f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads", "ffn_dim")
    }
    return mixed(directory, tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=60, d_model=8, **sides)))


def encoder(directory: Path) -> Path:
    return mixed(directory, tf.BertModel(tf.BertConfig(**BERT)))


def mpo(directory: Path) -> Path:
    decompose.run(str(llama(directory / "dense")), DecomposeConfig(), directory / "mpo")
    return directory / "mpo"


def sparse(directory: Path) -> Path:
    sparsify.run(
        str(llama(directory / "dense")), SparsifyConfig(sparsity=0.5, method="magnitude"), directory / "sparse"
    )
    return directory / "sparse"


def trained(source: Path, cls: type, work: Path) -> tuple[tf.PreTrainedModel, dict[str, Tensor]]:
    checkpoint = Checkpoint.open(str(source))
    model = cls.from_pretrained(source, dtype=torch.float32)
    work.mkdir()
    write_trained(work, model, checkpoint, "finetune", {}, seed=0, metrics={})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model, load_file(work / "model.safetensors")


@pytest.mark.parametrize(
    ("build", "cls"),
    [
        (llama, tf.AutoModelForCausalLM),
        (bart, tf.AutoModelForSeq2SeqLM),
        (encoder, tf.AutoModel),
        (mpo, tf.AutoModelForCausalLM),
        (sparse, tf.AutoModelForCausalLM),
    ],
)
def test_what_did_not_move_is_stored_bit_by_bit(build, cls: type, tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    before = load_file(source / "model.safetensors")
    _, after = trained(source, cls, tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    kept = [json.loads((folder / "config.json").read_text())["dtype"] for folder in (source, tmp_path / "out")]
    assert kept == ["bfloat16", "bfloat16"]


def test_a_new_head_is_stored_as_most_of_the_body_is(tmp_path: Path) -> None:
    source = encoder(tmp_path / "source")
    before = load_file(source / "model.safetensors")
    _, after = trained(source, tf.AutoModelForSequenceClassification, tmp_path / "out")
    assert after["classifier.weight"].dtype == torch.bfloat16
    assert all(after[f"bert.{name}"].dtype == tensor.dtype for name, tensor in before.items())


def test_what_is_measured_is_what_would_be_stored_and_then_as_it_was(tmp_path: Path) -> None:
    source = bart(tmp_path / "source")
    checkpoint = Checkpoint.open(str(source))
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter))
    dtypes = stored_dtypes(model, checkpoint)
    moved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with rounded(model, dtypes):
        measured = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, moved[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "out").mkdir()
    write_trained(tmp_path / "out", model, checkpoint, "finetune", {}, seed=0, metrics={})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor.float(), measured[name]), name
    assert any(not torch.equal(measured[name], moved[name]) for name in stored)
    assert all(torch.equal(measured[name], moved[name]) for name in stored if "norm" in name)
    round_to(model, dtypes)
    assert all(torch.equal(tensor, measured[name]) for name, tensor in model.state_dict().items())

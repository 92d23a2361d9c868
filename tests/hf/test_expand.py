"""Over-parameterised modules compute what the dense ones did, and fold back into them, in every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from families import FAMILIES, logits, make

from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.expand import expand, overparam_shape
from mpocli.hf.replace import remove
from mpocli.methods.finetune.overparam import candidates
from mpocli.methods.training.student import roles_of
from mpocli.mpo.weighted import svd_shape
from mpocli.nn import MPOModule

CHOSEN = ["bert-classifier", "roberta-classifier", "albert", "t5", "t5-gated-untied", "bart", "gpt2", "llama"]


def groups_of(family: str, tmp_path: Path) -> tuple[tf.PreTrainedModel, dict[str, list[str]]]:
    make(family, tmp_path / "dense")
    checkpoint = Checkpoint.open(str(tmp_path / "dense"))
    model = getattr(tf, checkpoint.architecture).from_pretrained(tmp_path / "dense").eval()
    return model, candidates(model, roles_of(model, checkpoint), ("attention", "ffn"))


@pytest.mark.parametrize("family", CHOSEN)
def test_expanded_and_folded_logits_are_the_dense_ones(family: str, tmp_path: Path) -> None:
    """SVD, two sites, and 1×1 sites up to the papers' eleven, one after another over the matrices of a model."""
    assert family in FAMILIES
    model, groups = groups_of(family, tmp_path)
    before, names = logits(model), list(model.state_dict())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    every = [name for members in groups.values() for name in members]
    for number, name in enumerate(every):
        module = model.get_submodule(name)
        rows, columns = module.weight.shape if not hasattr(module, "nf") else reversed(module.weight.shape)
        sites = (
            svd_shape(rows, columns) if number % 5 == 0 else overparam_shape(rows, columns, (2, 5, 7, 11)[number % 4])
        )
        expand(model, name, sites)
    assert sum(isinstance(module, MPOModule) for module in model.modules()) == len(every)
    bound = 1e-5 * max(1.0, float(before.abs().max()))
    assert float((logits(model) - before).abs().max()) <= bound
    remove(model)
    assert float((logits(model) - before).abs().max()) <= bound
    after = model.state_dict()
    assert list(after) == names
    for name, tensor in weights.items():
        assert float((after[name] - tensor).abs().max()) <= 1e-5 * max(1.0, float(tensor.abs().max())), name
    model.save_pretrained(tmp_path / "folded")
    again = type(model).from_pretrained(tmp_path / "folded").eval()
    assert torch.equal(logits(again), logits(model))


KINDS = {
    "bert-classifier": {"attention.self.query": 2, "attention.output.dense": 2, "intermediate.dense": 2},
    "t5": {"EncDecAttention.q": 2, "SelfAttention.v": 2, "DenseReluDense.wo": 2},
    "bart": {"encoder_attn.k_proj": 2, "self_attn.out_proj": 2, "fc1": 2},
    "gpt2": {"attn.c_attn": 2, "mlp.c_proj": 2},
    "llama": {"self_attn.k_proj": 2, "mlp.gate_proj": 2},
    "albert": {"attention.query": 1, "ffn": 1},
}


@pytest.mark.parametrize("family", KINDS)
def test_groups_are_modules_of_one_kind_over_all_layers(family: str, tmp_path: Path) -> None:
    """Cross-attention is a kind of its own, an encoder's and a decoder's too; shared layers count once."""
    _, groups = groups_of(family, tmp_path)
    for ending, count in KINDS[family].items():
        found = [members for group, members in groups.items() if group.endswith(ending)]
        assert found and all(len(members) == count for members in found), groups
    assert not any("lm_head" in group or "embed" in group or "classifier" in group for group in groups)


def test_the_svd_shape_is_u_root_sigma_and_root_sigma_vt(tmp_path: Path) -> None:
    model, groups = groups_of("bert-classifier", tmp_path)
    name = next(iter(groups.values()))[0]
    matrix = model.get_submodule(name).weight.detach().numpy().astype(np.float64)
    u, sigma, vt = np.linalg.svd(matrix)
    first, second = expand(model, name, svd_shape(*matrix.shape)).cores
    left, right = first.numpy().reshape(len(matrix), -1), second.numpy().reshape(-1, matrix.shape[1])
    assert np.allclose(np.abs(left), np.abs(u * np.sqrt(sigma)), atol=1e-6)
    assert np.allclose(np.abs(right), np.abs(np.sqrt(sigma)[:, None] * vt), atol=1e-6)
    assert np.allclose(left @ right, matrix, atol=1e-10)


def test_sites_of_one_begin_as_identities_up_to_signs_and_each_adds_a_square(tmp_path: Path) -> None:
    model, groups = groups_of("bert-classifier", tmp_path)
    name = next(iter(groups.values()))[0]
    rows, columns = model.get_submodule(name).weight.shape
    two = overparam_shape(rows, columns, 2).num_params()
    mpo = expand(model, name, overparam_shape(rows, columns, 7))
    width = mpo.bond_dims[1]
    assert mpo.bond_dims[1:-1] == (width,) * 6
    assert mpo.num_params == two + 5 * width**2 > rows * columns
    for core in mpo.cores[1:-1]:
        assert torch.allclose(core.reshape(width, width).abs(), torch.eye(width, dtype=core.dtype), atol=1e-6)


def test_an_embedding_is_refused(tmp_path: Path) -> None:
    model, _ = groups_of("bert-classifier", tmp_path)
    with pytest.raises(InputError, match="Embedding"):
        expand(model, "bert.embeddings.word_embeddings", svd_shape(10, 10))

"""Loaded models in few bits: stored again bit by bit whatever was done to them, and rounded anew where they changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
import transformers as tf
from families import logits
from safetensors.torch import load_file
from sparse_checkpoints import WEIGHTS, assert_same, pruning, stored

import mpocli
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.merge import MergeConfig
from mpocli.config.quantize import QuantizeConfig
from mpocli.io.signpost import SIGNPOST
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.quantize import run as quantize
from mpocli.methods.sparsify import run as sparsify

ALL = ("embedding", "attention", "ffn", "pooler", "head")
SUFFIXES = ("_codes", "_scales", "_offsets", "_kept", "_levels", "_steps", "_starts")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """few/ in few bits and what it merges to, of a dense, sparse or decomposed model; nobody writes into them."""
    home = tmp_path_factory.mktemp("few")
    found: dict[str, SimpleNamespace] = {}

    def make(kind: str) -> SimpleNamespace:
        if kind in found:
            return found[kind]
        path = home / kind
        if kind == "bert":
            model = models.bert_masked_lm(path / "wide", num_hidden_layers=1)
        elif kind == "conv1d":
            model = models.gpt2(path / "wide", n_layer=1, dtype=torch.bfloat16)
        elif kind == "sparse":
            model = models.gpt2(path / "dense", n_layer=1)
            sparsify.run(str(path / "dense"), pruning(0.7), path / "wide")
        else:
            model = models.gpt2(path / "dense", n_layer=1)
            decompose.run(str(path / "dense"), DecomposeConfig(trunc=12, when_larger="decompose"), path / "wide")
        options = QuantizeConfig(bits=3, group=16, layers=ALL) if kind != "bert" else QuantizeConfig(bits=4, layers=ALL)
        quantize.run(str(path / "wide"), options, path / "few")
        merge.run(str(path / "few"), MergeConfig(), path / "merged")
        found[kind] = SimpleNamespace(cls=type(model), few=path / "few", merged=path / "merged", path=path)
        return found[kind]

    return make


def _parts(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored(directory).items() if name.endswith(SUFFIXES)}


def _but_for_the_signpost(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored(directory).items() if name != SIGNPOST}


KINDS = ["bert", "conv1d", "sparse", "cores"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_computes_what_the_merged_one_does_and_saves_the_same_files(
    kind: str, made: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    case = made(kind)
    loaded = case.cls.from_pretrained(case.few)
    merged = case.cls.from_pretrained(case.merged)
    tolerance = 1e-3 if kind == "cores" else 0.0
    assert torch.allclose(logits(loaded.eval()), logits(merged.eval()), atol=tolerance, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert len(_parts(tmp_path / "again")) >= 3
    assert_same(*(_but_for_the_signpost(directory) for directory in (tmp_path / "again", case.few)))
    again = case.cls.from_pretrained(tmp_path / "again")
    assert_same(again, loaded)


CHANGES: dict[str, Callable[[tf.PreTrainedModel], tf.PreTrainedModel]] = {
    "copied": copy.deepcopy,
    "converted": lambda model: model.to(torch.bfloat16),
    "there and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("kind", ["conv1d", "sparse"])
@pytest.mark.parametrize("change", CHANGES)
def test_codes_and_scales_are_the_same_after_copies_and_conversions(
    change: str, kind: str, made: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    case = made(kind)
    model = CHANGES[change](case.cls.from_pretrained(case.few, dtype=torch.float32))
    model.save_pretrained(tmp_path / "again")
    assert_same(_parts(tmp_path / "again"), _parts(case.few))
    again = case.cls.from_pretrained(tmp_path / "again", dtype=model.dtype)
    if change != "there and back":
        assert torch.equal(logits(again.eval()), logits(model.eval()))
        assert_same(again, model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_loaded_in_bfloat16_saves_the_same_codes_and_loads_the_same(
    kind: str, made: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    case = made(kind)
    model = case.cls.from_pretrained(case.few, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    assert_same(_parts(tmp_path / "again"), _parts(case.few))
    assert_same(case.cls.from_pretrained(tmp_path / "again", dtype=torch.bfloat16), model)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_changed_is_rounded_anew_and_what_was_not_keeps_its_codes(
    kind: str, made: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    case = made(kind)
    model = case.cls.from_pretrained(case.few, dtype=torch.float32)
    names = sorted(name for name in _parts(case.few) if name.endswith(("_codes", "_levels")))
    name = next(name for name in names if "embeddings" not in name and "wte" not in name).rpartition("_")[0]
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    changed = model.get_parameter(name).clone()
    model.save_pretrained(tmp_path / "again")
    before, after = _parts(case.few), _parts(tmp_path / "again")
    assert before.keys() == after.keys()
    others = {key: tensor for key, tensor in after.items() if not key.startswith(name)}
    assert_same(others, {key: tensor for key, tensor in before.items() if not key.startswith(name)})
    again = case.cls.from_pretrained(tmp_path / "again", dtype=torch.float32).get_parameter(name)
    assert 0 < float((again - changed).norm() / changed.norm()) < 0.1 or torch.allclose(again, changed, rtol=2e-3)
    assert not bool(again[changed == 0].any())
    scales = next(key for key in after if key.startswith(name) and key.endswith(("_scales", "_steps")))
    assert not torch.equal(after[scales], before[scales])


def test_a_table_that_was_resized_is_rounded_anew(made: Callable[[str], SimpleNamespace], tmp_path: Path) -> None:
    case = made("bert")
    model = case.cls.from_pretrained(case.few)
    model.resize_token_embeddings(models.VOCABULARY + 5)
    model.save_pretrained(tmp_path / "again")
    again = case.cls.from_pretrained(tmp_path / "again")
    wide, found = (one.get_input_embeddings().weight for one in (model, again))
    assert found.shape == wide.shape == (models.VOCABULARY + 5, 48)
    assert float((found - wide).norm() / wide.norm()) < 0.1
    assert found.data_ptr() == again.get_output_embeddings().weight.data_ptr()


def test_a_body_loads_and_saves_without_the_head(made: Callable[[str], SimpleNamespace], tmp_path: Path) -> None:
    for kind in ("bert", "sparse"):
        case = made(kind)
        body = tf.AutoModel.from_pretrained(case.few)
        whole = case.cls.from_pretrained(case.few)
        assert_same(
            {k: v for k, v in body.state_dict().items() if "pooler" not in k},
            {k: v for k, v in whole.base_model.state_dict().items() if "pooler" not in k},
        )
        body.save_pretrained(tmp_path / kind)
        again = tf.AutoModel.from_pretrained(tmp_path / kind)
        assert_same(again, body)
        found = _parts(tmp_path / kind)
        prefix = f"{whole.base_model_prefix}."
        expected = {k.removeprefix(prefix): v for k, v in _parts(case.few).items() if k.startswith(prefix)}
        assert found.keys() >= expected.keys() and found
        assert_same({k: found[k] for k in expected}, expected)


def test_a_state_dict_in_parts_is_loaded_and_its_codes_are_stored_again(
    made: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    """As HF's Trainer goes back to one of its checkpoints."""
    case = made("conv1d")
    model = case.cls.from_pretrained(case.few)
    other = case.cls.from_pretrained(case.few)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    other.save_pretrained(tmp_path / "other")
    state = load_file(tmp_path / "other" / WEIGHTS)
    model.load_state_dict({key: tensor for key, tensor in state.items() if key != SIGNPOST}, strict=False)
    model.save_pretrained(tmp_path / "again")
    assert_same(_parts(tmp_path / "again"), _parts(tmp_path / "other"))


def test_zeros_of_a_sparse_model_in_few_bits_stay_whoever_trains_it(
    made: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    case = made("sparse")
    model = case.cls.from_pretrained(case.few)
    name = "transformer.h.0.mlp.c_fc.weight"
    parameter = model.get_parameter(name).requires_grad_()
    zeros = parameter == 0
    before = parameter.detach().clone()
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not bool(parameter[zeros].any()) and not torch.equal(parameter, before)
    model.save_pretrained(tmp_path / "again")
    again = case.cls.from_pretrained(tmp_path / "again").get_parameter(name)
    assert not bool(again[zeros].any())
    mpocli.release_zeros(model)
    model.save_pretrained(tmp_path / "released")
    assert not _parts(tmp_path / "released")

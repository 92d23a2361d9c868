"""MPOs with a sparse central core are those with a dense one and the same zeros."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import logits, make
from safetensors.torch import load_file, save_file
from sparse_checkpoints import (
    BRAIN,
    FEW,
    HALF,
    WEIGHTS,
    assert_same,
    bits,
    edit_weights,
    prunes,
    pruning,
    stored,
    weights_size,
    zeroed,
)

import mpocli
from mpocli.config.merge import MergeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.sparsify import run as sparsify


@pytest.fixture(scope="module", params=[("bert-masked-lm", torch.float32), ("gpt2", BRAIN)], ids=lambda case: case[0])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """mpo/: table and attention decomposed; sparse/: its central cores and the dense feed-forward pruned; oracle/: mpo/
    with the same zeros."""
    family, dtype = request.param
    path = tmp_path_factory.mktemp("both")
    model = make(family, path / "dense", dtype=dtype)
    decompose.run(str(path / "dense"), FEW, path / "mpo")
    report = sparsify.run(str(path / "mpo"), pruning(layers=("embedding", "attention", "ffn")), path / "sparse")
    tensors = load_file(path / "mpo" / WEIGHTS)
    table = "wte" if family == "gpt2" else "word_embeddings"
    cores = {name for name in tensors if name.endswith(".core_2") and table not in name}  # the middle one of five
    matrices = {name for name, tensor in tensors.items() if prunes(name, tensor) and tensor.dim() == 2}
    for name in cores | matrices:
        tensors[name] = zeroed(tensors[name], 0.8, transposed=name in matrices and family == "gpt2")
    shutil.copytree(path / "mpo", path / "oracle")
    save_file(tensors, path / "oracle" / WEIGHTS, metadata={"format": "pt"})
    assert {tensor.name for tensor in report.tensors} == cores | matrices and len(cores) >= 4 and len(matrices) == 4
    assert [kept.reason.startswith("its weight is tied") for kept in report.kept] == [True]
    return SimpleNamespace(
        cls=type(model), path=path, mpo=path / "mpo", oracle=path / "oracle", sparse=path / "sparse", cores=cores
    )


def test_sparse_central_cores_load_save_and_copy_bit_for_bit(both: SimpleNamespace, tmp_path: Path) -> None:
    expected = both.cls.from_pretrained(both.oracle).eval()
    loaded = both.cls.from_pretrained(both.sparse).eval()
    assert_same(loaded, expected)
    assert torch.equal(bits(logits(loaded)), bits(logits(expected)))
    assert_same(copy.deepcopy(loaded), expected)
    model = loaded
    for place in ("first", "second"):
        model.save_pretrained(tmp_path / place)
        model = both.cls.from_pretrained(tmp_path / place)
        assert_same(model, expected)
    assert weights_size(tmp_path / "second") < 1.05 * weights_size(both.sparse) < weights_size(both.mpo)
    assert_same(both.cls.from_pretrained(both.sparse, device_map="cpu"), expected)
    assert_same(both.cls.from_pretrained(both.sparse, dtype=HALF), both.cls.from_pretrained(both.oracle, dtype=HALF))


def test_a_tied_table_keeps_its_cores_and_stays_tied_beside_sparse_ones(both: SimpleNamespace) -> None:
    before, after = stored(both.mpo), stored(both.sparse)
    pruned = {name.removesuffix("_bitmask") for name in after if name.endswith("_bitmask")}
    untouched = [name for name in before if ".core_" in name and name not in pruned]
    assert len(untouched) >= 5 and all(torch.equal(bits(before[name]), bits(after[name])) for name in untouched)
    loaded = both.cls.from_pretrained(both.sparse)
    table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert all(a is b for a, b in zip(table.cores, head.cores, strict=True))


def test_merge_of_sparse_cores_and_matrices_is_the_merge_of_dense_ones(both: SimpleNamespace, tmp_path: Path) -> None:
    merge.run(str(both.sparse), MergeConfig(), tmp_path / "merged")
    (both.oracle / "mpo.json").unlink(missing_ok=True)  # its weights have changed
    merge.run(str(both.oracle), MergeConfig(), tmp_path / "expected")
    assert_same(stored(tmp_path / "merged"), stored(tmp_path / "expected"))


def test_dequantize_of_sparse_cores_and_matrices_saves_an_ordinary_model(both: SimpleNamespace, tmp_path: Path) -> None:
    model = both.cls.from_pretrained(both.sparse)
    expected = logits(model.eval())
    model.dequantize()
    assert float((logits(model) - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    model.save_pretrained(tmp_path / "plain")
    plain = stored(tmp_path / "plain")
    assert not any(name.endswith(("_bitmask", "_values")) or ".core_" in name for name in plain)
    assert_same(both.cls.from_pretrained(tmp_path / "plain"), model)


def test_training_keeps_the_zeros_of_a_core(both: SimpleNamespace) -> None:
    model = both.cls.from_pretrained(both.sparse, dtype=torch.float32)
    before = {name: model.get_parameter(name).detach().clone() for name in both.cores}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.arange(5, 21)[None]
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, old in before.items():
        new = model.get_parameter(name).detach()
        assert torch.equal(new == 0, old == 0) and not (new == old)[old != 0].any(), name


def test_a_missing_part_of_a_sparse_core_is_an_error(both: SimpleNamespace, tmp_path: Path) -> None:
    name = sorted(both.cores)[0]
    for part in ("_bitmask", "_values"):
        directory = tmp_path / part
        shutil.copytree(both.sparse, directory)
        edit_weights(directory, lambda tensors, part=part: tensors.pop(name + part))
        for read in (both.cls.from_pretrained, lambda place: Checkpoint.open(str(place))):
            with pytest.raises(mpocli.InputError, match=re.escape(name)):
                read(directory)

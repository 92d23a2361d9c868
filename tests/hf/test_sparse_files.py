"""What the commands count and write of sparse checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import bert_classifier
from safetensors.torch import load_file
from sparse_checkpoints import BRAIN, NAME, WEIGHTS, assert_same, bits, prunes, pruning, stored, weights_size

from mpocli.config.decompose import DecomposeConfig
from mpocli.config.merge import MergeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.io.signpost import SIGNPOST
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.inspect import run as inspect
from mpocli.methods.sparsify import run as sparsify


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN])
def test_the_file_has_the_size_of_the_bitmask_formula_and_inspect_tells_it(dtype: torch.dtype, tmp_path: Path) -> None:
    bert_classifier(
        tmp_path / "dense", dtype=dtype, vocab_size=64, hidden_size=128, num_hidden_layers=4, intermediate_size=512
    )
    report = sparsify.run(str(tmp_path / "dense"), pruning(0.9), tmp_path / "sparse")
    dense, tensors = load_file(tmp_path / "dense" / WEIGHTS), stored(tmp_path / "sparse")
    size = dtype.itemsize
    expected = 0
    for name, tensor in dense.items():
        entries = tensor.numel()
        kept = entries - math.floor(entries * 0.9)
        expected += math.ceil(entries / 8) + kept * size if prunes(name, tensor) else entries * size
    assert weights_size(tmp_path / "sparse") == pytest.approx(expected, rel=0.05)
    assert report.bytes_expected == pytest.approx(expected, rel=0.05)
    assert report.totals.bytes == weights_size(tmp_path / "sparse")
    found = inspect.run(str(tmp_path / "sparse"), verify=True)
    assert found.problems == ()
    packed = {view.name: view for view in found.modules if view.sparsity is not None}
    assert {f"{name}.weight" for name in packed} == {name for name, tensor in dense.items() if prunes(name, tensor)}
    for name, view in packed.items():
        mask, values = (tensors[f"{name}.weight_{part}"] for part in ("bitmask", "values"))
        entries = dense[f"{name}.weight"].numel()
        assert view.bytes == mask.nbytes + values.nbytes
        assert view.zeros == math.floor(entries * 0.9) == entries - len(values)
        assert view.sparsity == view.zeros / entries
    assert {tensor.name: (tensor.bytes, tensor.zeros) for tensor in report.tensors} == {
        f"{name}.weight": (view.bytes, view.zeros) for name, view in packed.items()
    }
    assert found.zeros == report.zeros and found.sparsity == report.sparsity
    assert found.totals.params == found.totals.dense_params == sum(tensor.numel() for tensor in dense.values())


def test_decompose_of_some_matrices_leaves_the_others_packed_and_a_dry_run_foretells_the_bytes(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    config = DecomposeConfig(trunc=6, when_larger="decompose", targets=("*.attention.self.*",))
    foretold = decompose.run(str(made.sparse), config, tmp_path / "none", dry_run=True)
    assert not (tmp_path / "none").exists()
    decompose.run(str(made.sparse), config, tmp_path / "some")
    assert foretold.totals.bytes == weights_size(tmp_path / "some")
    before, after = stored(made.sparse), stored(tmp_path / "some")
    left = {name for name in before if ".attention.self." not in name and name != SIGNPOST}  # it seals the config
    assert sum(name.endswith("_bitmask") for name in left) == 6
    assert_same({name: after[name] for name in left}, {name: before[name] for name in left})
    gone = {name for name in before if name.endswith(("_bitmask", "_values"))} - left
    assert len(gone) == 12 and not gone & after.keys()
    loaded, oracle = made.cls.from_pretrained(tmp_path / "some"), made.cls.from_pretrained(made.oracle)
    assert torch.equal(bits(loaded.get_parameter(NAME)), bits(oracle.get_parameter(NAME)))
    assert inspect.run(str(tmp_path / "some"), verify=True).problems == ()


def test_pruning_anew_and_storing_dense_are_the_same_model(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    sparsify.run(str(made.dense), pruning(storage="dense"), tmp_path / "dense")
    assert_same(stored(tmp_path / "dense"), stored(made.oracle))
    # Zeros are the smallest entries: less sparsity than before keeps them all, in those that are not chosen too.
    again = sparsify.run(str(made.sparse), pruning(0.3, layers=("ffn",)), tmp_path / "again")
    assert again.bytes_expected == pytest.approx(weights_size(tmp_path / "again"), rel=0.01)
    assert_same(made.cls.from_pretrained(tmp_path / "again"), made.cls.from_pretrained(made.oracle))
    assert len(Checkpoint.open(str(tmp_path / "again")).encodings) == 12


def test_the_same_input_and_options_give_the_same_bytes(case: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    made = case("gpt2")
    for options in ({}, {"scope": "global"}, {"max_shard_bytes": 30_000}):
        place = tmp_path / str(len(options) and next(iter(options)))
        for out in ("one", "two"):
            sparsify.run(str(made.dense), pruning(**options), place / out)
            decompose.run(str(place / out), DecomposeConfig(trunc=6, targets=("*.c_attn",)), place / f"{out} mpo")
            merge.run(str(place / out), MergeConfig(), place / f"{out} merged")
        for end in ("", " mpo", " merged"):
            one, two = ({f.name: f.read_bytes() for f in (place / f"{out}{end}").iterdir()} for out in ("one", "two"))
            assert one.keys() == two.keys() and "mpo.json" in one
            assert [name for name in one if one[name] != two[name]] == []

"""Sparse checkpoints are never loaded wrong: without the import, or from files that contradict each other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from sparse_checkpoints import BRAIN, FEW, NAME, assert_same, edit_json, edit_weights, pruning, stored
from strangers import run_stranger
from torch import Tensor

import mpocli
from mpocli.config.merge import MergeConfig
from mpocli.config.quantize import QuantizeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.quantize import run as quantize
from mpocli.methods.sparsify import run as sparsify

_LOAD = """
import sys
import torch, transformers
for directory in sys.argv[1:]:
    try:
        model = transformers.AutoModelForMaskedLM.from_pretrained(directory)
    except Exception as error:
        print("error", type(error).__name__)
    else:
        assert "mpocli" not in sys.modules
        torch.save(model.state_dict(), directory + "/loaded.pt")
        print("loaded")
"""


def test_without_the_import_loading_is_an_error_and_merged_checkpoints_load_bit_for_bit(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case("bert-masked-lm", BRAIN)
    decompose.run(str(made.dense), FEW, tmp_path / "mpo")
    sparsify.run(str(tmp_path / "mpo"), pruning(targets=("*.query",)), tmp_path / "cores")
    for wide, name in ((made.dense, "few bits"), (made.sparse, "sparse in few bits")):
        quantize.run(str(wide), QuantizeConfig(), tmp_path / name)
    merge.run(str(made.sparse), MergeConfig(), tmp_path / "merged")
    merge.run(str(tmp_path / "cores"), MergeConfig(), tmp_path / "merged cores")
    merge.run(str(tmp_path / "few bits"), MergeConfig(), tmp_path / "merged few")
    encoded = [made.sparse, *(tmp_path / name for name in ("cores", "few bits", "sparse in few bits"))]
    merged = [tmp_path / name for name in ("merged", "merged cores", "merged few")]
    ended = run_stranger(_LOAD, *encoded, *merged, cwd=tmp_path)
    assert ended.out.split("\n")[:-1] == 4 * ["error RuntimeError"] + 3 * ["loaded"], ended.err
    assert "import_mpocli_before_from_pretrained" in ended.err
    few = made.cls.from_pretrained(tmp_path / "few bits")
    assert_same(torch.load(tmp_path / "merged few" / "loaded.pt"), few)
    loaded = torch.load(tmp_path / "merged" / "loaded.pt")
    assert_same(loaded, made.cls.from_pretrained(made.oracle))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert_same(stored(tmp_path / "merged"), stored(made.oracle))


def _encodings(directory: Path, change: Callable[[Any], object]) -> None:
    """In both files, as a hand that edits one edits the other."""
    edit_json(directory / "config.json", lambda config: change(config["quantization_config"]["encodings"]))
    edit_json(directory / "mpo.json", lambda manifest: change(manifest["encodings"]))


def _part(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        old = tensors.pop(name)
        if change is not None:
            tensors[name] = change(old).contiguous()

    return lambda directory: edit_weights(directory, edit)


@pytest.mark.parametrize(
    ("damage", "loading", "opening"),
    [
        (_part(f"{NAME}_bitmask", None), "lack its bitmask", "lack its bitmask"),
        (_part(f"{NAME}_values", None), "_values is not in the files", "lack its bitmask or values"),
        (_part(f"{NAME}_bitmask", lambda bits: bits[:-1]), "575 .* 576 bytes", "has 575 .* needs 576"),
        (_part(f"{NAME}_values", lambda v: v[:-1]), "keeps 922 entries, and 921 values", "keeps 922 .* 921 values"),
        (_part(f"{NAME}_values", lambda v: v[None]), "and 922 values|shape", r"values of shape \(1, 922\)"),
        (
            lambda d: _encodings(d, lambda e: e[NAME].update(shape=[96, 48])),
            r"\(48, 96\).*\(96, 48\)",
            "is 96x48, .* 48x96",
        ),
        (lambda d: _encodings(d, lambda e: e[NAME].update(shape=[48, 95])), r"\(48, 96\).*\(48, 95\)", "needs 570"),
        (lambda d: _encodings(d, lambda e: e[NAME].update(encoding="zipped")), "'zipped'", "'zipped'"),
        (lambda d: _encodings(d, lambda e: e.pop(NAME)), "no encoding for it", "no encoding for it"),
        (
            lambda d: edit_json(d / "config.json", lambda config: config["quantization_config"].pop("encodings")),
            "has no encoding for it",
            "mpo.json and config.json disagree",
        ),
    ],
    ids=[
        "no bitmask",
        "no values",
        "short bitmask",
        "short values",
        "values in two dimensions",
        "transposed shape",
        "smaller shape",
        "unknown encoding",
        "no entry",
        "only in mpo.json",
    ],
)
def test_files_that_contradict_the_encodings_are_an_error_that_names_the_tensor(
    damage: Callable[[Path], None], loading: str, opening: str, case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    directory = tmp_path / "damaged"
    shutil.copytree(made.sparse, directory)
    damage(directory)
    with pytest.raises(mpocli.InputError, match=loading) as error:
        made.cls.from_pretrained(directory)
    assert re.search(r"bert\.encoder\.layer\.\d\.[a-z.]*\.weight", str(error.value))
    with pytest.raises(mpocli.InputError, match=loading):
        tf.AutoModel.from_pretrained(directory, ignore_mismatched_sizes=True)
    with pytest.raises(mpocli.InputError, match=opening) as error:
        checkpoint = Checkpoint.open(str(directory))
        checkpoint.survey  # noqa: B018
        checkpoint.reader.read(NAME)
    assert re.search(r"bert\.encoder\.layer\.\d\.[a-z.]*\.weight", str(error.value))


def test_encodings_in_the_config_alone_load_and_a_manifest_that_lacks_them_is_refused(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    """Loading never looks at mpo.json; the commands do, and without it the config suffices."""
    made = case()
    shutil.copytree(made.sparse, tmp_path / "sparse")
    edit_json(tmp_path / "sparse" / "mpo.json", lambda manifest: manifest.update(encodings={}))
    assert_same(made.cls.from_pretrained(tmp_path / "sparse"), made.cls.from_pretrained(made.oracle))
    with pytest.raises(mpocli.InputError, match=r"disagree about how bert\.encoder.* is stored"):
        Checkpoint.open(str(tmp_path / "sparse"))
    (tmp_path / "sparse" / "mpo.json").unlink()
    assert len(Checkpoint.open(str(tmp_path / "sparse")).encodings) == 12

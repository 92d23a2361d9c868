"""What a successful run writes, in one file or in shards."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from math import prod
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file

from cli.matrices import dense_by_loops
from cli.shell import WEIGHTS, Cli, rewrite, succeeded, tree

# --- the directory ----------------------------------------------------------------------------------------------


def test_the_files_of_the_tokenizer_travel_along(cli: Cli, bert: Path, bert_mpo: Path, work: Path) -> None:
    succeeded(cli("merge", bert_mpo, "-o", "dense"))
    for directory in (bert_mpo, work / "dense"):
        assert tree(bert).items() - tree(directory).items() <= {
            (name, tree(bert)[name]) for name in ("config.json", WEIGHTS)
        }
    assert set(tree(bert_mpo)) == {*tree(bert), "mpo.json", "README.md"}


def test_files_of_the_manifest_are_exactly_the_directory_with_right_sizes_and_hashes(
    cli: Cli, bert: Path, bert_mpo: Path, work: Path
) -> None:
    succeeded(cli("decompose", bert, "--trunc", 8, "--max-shard-size", "20KB", "-o", "shards"))
    succeeded(cli("merge", bert_mpo, "-o", "dense"))
    for directory in (bert_mpo, work / "shards", work / "dense"):
        claims = json.loads((directory / "mpo.json").read_text())["files"]
        there = {path for path in directory.rglob("*") if path.is_file() and path.name != "mpo.json"}
        assert claims == {
            str(path.relative_to(directory)): {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in there
        }


def _strings(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [*map(str, data), *(text for value in data.values() for text in _strings(value))]
    if isinstance(data, list):
        return [text for value in data for text in _strings(value)]
    return [str(data)]


_CLOCK = re.compile(r"\b20\d\d-\d\d|\d\d:\d\d|^1[5-9]\d{8}(\.\d+)?$")


def test_no_path_host_or_clock_is_in_what_is_written(cli: Cli, dense: Path, tmp_path: Path, work: Path) -> None:
    succeeded(cli("decompose", dense.resolve(), "--trunc", 8, "-o", work / "secret-name"))
    succeeded(cli("merge", work / "secret-name", "-o", tmp_path / "merged"))
    for directory in (work / "secret-name", tmp_path / "merged"):
        for name in ("mpo.json", "config.json", "README.md"):
            text = (directory / name).read_text()
            for private in (str(tmp_path), str(Path.home()), "secret-name", "seconds"):
                assert private not in text
        for name in ("mpo.json", "config.json"):
            for value in _strings(json.loads((directory / name).read_text())):
                assert value != socket.gethostname()
                assert not value.startswith(("/", "~", "\\")) and not _CLOCK.search(value), value
    assert _CLOCK.search("2026-11-21T04:00:46") and _CLOCK.search("1795233646.5")


def test_the_base_model_is_a_bare_folder_name_however_it_was_spelt(cli: Cli, dense: Path, work: Path) -> None:
    (work / "link").symlink_to(dense)
    names = []
    for k, spelling in enumerate((dense, f"../{dense.name}/", f"{dense}/.", "link")):
        succeeded(cli("decompose", spelling, "--trunc", 8, "--layers", "pooler", "-o", f"out-{k}"))
        names.append(json.loads((work / f"out-{k}" / "mpo.json").read_text())["base_model"]["name"])
    assert names == ["dense"] * 4


def test_the_config_keeps_everything_else_it_said(bert: Path, bert_mpo: Path) -> None:
    before, after = (json.loads((path / "config.json").read_text()) for path in (bert, bert_mpo))
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["quant_method"] == "mpo" and quantization["schema_version"] == 1


def test_the_manifest_says_of_each_module_what_the_house_promises(bert_mpo: Path) -> None:
    manifest = json.loads((bert_mpo / "mpo.json").read_text())
    assert manifest["format"] == "mpocli" and manifest["schema_version"] == 1
    stored = load_file(bert_mpo / WEIGHTS)
    assert len(manifest["modules"]) == 14
    for module in manifest["modules"]:
        shapes = [stored[f"{module['name']}.core_{k}"].shape for k in range(5)]
        assert module["out_dims"] == [shape[1] for shape in shapes]
        assert module["in_dims"] == [shape[2] for shape in shapes]
        assert module["bond_dims"] == [shape[0] for shape in shapes] + [1]
        assert module["padded_shape"] == [prod(module["out_dims"]), prod(module["in_dims"])]
        assert module["params"] == sum(prod(shape) for shape in shapes)
        assert module["dense_params"] == prod(module["shape"])
        assert module["central"] == 2 and len(module["discarded_weight"]) == 4
        assert module["kind"] == ("embedding" if module["role"] == "embedding" else "linear")
        assert {entry["encoding"] for entry in module["tensors"].values()} == {"dense"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_relative_error_is_that_of_the_stored_cores(dtype: str, cli: Cli, bert: Path, gpt2: Path, work: Path) -> None:
    """Recomputed from the files by index loops, a Conv1D's transpose included."""
    for dense, glob, key in (
        (bert, "bert.pooler.dense", "bert.pooler.dense.weight"),
        (gpt2, "transformer.h.0.attn.c_proj", "transformer.h.0.attn.c_proj.weight"),
    ):
        out = f"{dense.name}-{dtype}"
        succeeded(cli("decompose", dense, "--target", glob, "--trunc", 7, "--dtype", dtype, "-o", out))
        (module,) = json.loads((work / out / "mpo.json").read_text())["modules"]
        stored, original = load_file(work / out / WEIGHTS), load_file(dense / WEIGHTS)[key].double().numpy()
        prefix = next(k for k in stored if k.endswith(".core_0")).removesuffix("core_0")
        cores = [stored[f"{prefix}core_{k}"].double().numpy() for k in range(5)]
        matrix = original.T if module["kind"] == "conv1d" else original
        difference = np.linalg.norm(dense_by_loops(cores, module["shape"]) - matrix)
        error = difference / np.linalg.norm(matrix)
        assert module["relative_error"] == pytest.approx(error, rel=1e-9)
        # What is stored in float32 differs from the float64 sweep by its rounding alone, in bfloat16 by more.
        swept = sum(module["discarded_weight"]) ** 0.5
        assert (abs(difference / swept - 1) < 1e-6) == (dtype == "float32")


def test_dtype_casts_every_floating_tensor_and_says_so(cli: Cli, bert: Path, work: Path) -> None:
    report = succeeded(cli("decompose", bert, "--trunc", 8, "--dtype", "bfloat16", "--json", "-o", "half")).json
    stored = load_file(work / "half" / WEIGHTS)
    signpost = [key for key in stored if "import_mpocli" in key]
    assert len(signpost) == 1
    assert {tensor.dtype for key, tensor in stored.items() if key not in signpost} == {torch.bfloat16}
    config = json.loads((work / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert report["totals"]["dense_bytes"] == 2 * report["totals"]["dense_params"]
    original = load_file(bert / WEIGHTS)
    kept = [key for key in original if key in stored and stored[key].shape == original[key].shape]
    assert len(kept) > 20
    assert all(torch.equal(stored[key], original[key].bfloat16()) for key in kept)
    loaded = tf.BertForSequenceClassification.from_pretrained(work / "half")
    assert loaded.dtype == torch.bfloat16


def test_without_dtype_a_half_precision_model_stays_so(cli: Cli, work: Path) -> None:
    models.llama(work / "model", dtype=torch.bfloat16)
    report = succeeded(cli("decompose", "model", "--trunc", 8, "--json", "-o", "out")).json
    stored = load_file(work / "out" / WEIGHTS)
    assert {tensor.dtype for key, tensor in stored.items() if "mpocli" not in key} == {torch.bfloat16}
    assert report["totals"]["dense_bytes"] == 2 * report["totals"]["dense_params"]
    assert json.loads((work / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merge_undoes_decompose_and_dtype_casts_the_result(cli: Cli, bert: Path, work: Path) -> None:
    succeeded(cli("decompose", bert, "-o", "mpo"))
    succeeded(cli("merge", "mpo", "-o", "dense"))
    succeeded(cli("merge", "mpo", "--dtype", "float16", "-o", "half"))
    original, merged = load_file(bert / WEIGHTS), load_file(work / "dense" / WEIGHTS)
    half = load_file(work / "half" / WEIGHTS)
    assert merged.keys() == original.keys() == half.keys()
    for key, tensor in original.items():
        # float32 cores of a five-site MPO: a few roundings of 6e-8 each
        error = torch.linalg.vector_norm(merged[key] - tensor) / torch.linalg.vector_norm(tensor)
        assert float(error) <= 1e-6
        assert half[key].dtype == torch.float16 and half[key].shape == tensor.shape


def test_the_tensors_a_checkpoint_had_beside_its_matrices_are_passed_on_bit_for_bit(
    cli: Cli, dense: Path, work: Path
) -> None:
    """Integers too, and whatever dtype each has."""

    def extend(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
        tensors["bert.pooler.dense.bias"] = tensors["bert.pooler.dense.bias"].bfloat16()
        tensors["classifier.weight"] = tensors["classifier.weight"].double()

    rewrite(dense, extend)
    succeeded(cli("decompose", dense, "--trunc", 8, "-o", "out"))
    succeeded(cli("decompose", dense, "--trunc", 8, "--dtype", "float16", "-o", "half"))
    original, stored, half = (load_file(path / WEIGHTS) for path in (dense, work / "out", work / "half"))
    for key in ("bert.embeddings.position_ids", "bert.pooler.dense.bias", "classifier.weight"):
        assert stored[key].dtype == original[key].dtype and torch.equal(stored[key], original[key])
    assert half["bert.embeddings.position_ids"].dtype == torch.int64
    assert half["classifier.weight"].dtype == torch.float16


# --- shards -----------------------------------------------------------------------------------------------------


def _indexed(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a sharded directory, each from the file that the index names, by the safetensors library."""
    index = json.loads((directory / f"{WEIGHTS}.index.json").read_text())
    assert index["metadata"]["total_size"] > 0
    tensors = {}
    for name, file in index["weight_map"].items():
        with safe_open(directory / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            tensors[name] = shard.get_tensor(name)
    held = [key for file in set(index["weight_map"].values()) for key in safe_open(directory / file, "pt").keys()]
    assert sorted(held) == sorted(tensors)  # every tensor once, none beside the index
    assert {file.name for file in directory.glob("*.safetensors")} == set(index["weight_map"].values())
    assert sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) == index["metadata"]["total_size"]
    return tensors


@pytest.mark.parametrize("verb", ["decompose", "merge"])
def test_shards_hold_the_same_tensors_as_one_file(verb: str, cli: Cli, bert: Path, bert_mpo: Path, work: Path) -> None:
    command = ["decompose", bert, "--trunc", 8] if verb == "decompose" else ["merge", bert_mpo]
    succeeded(cli(*command, "-o", "whole"))
    succeeded(cli(*command, "-o", "shards", "--max-shard-size", "50KB"))
    assert not (work / "shards" / WEIGHTS).exists()
    whole, shards = load_file(work / "whole" / WEIGHTS), _indexed(work / "shards")
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[key], shards[key]) and whole[key].dtype == shards[key].dtype for key in whole)
    logits = [
        models.logits(tf.BertForSequenceClassification.from_pretrained(work / name)) for name in ("whole", "shards")
    ]
    assert torch.equal(*logits)


def test_no_weight_file_is_larger_than_asked_unless_one_tensor_is(cli: Cli, bert: Path, work: Path) -> None:
    succeeded(cli("decompose", bert, "--layers", "pooler", "-o", "out", "--max-shard-size", "20KB"))
    files = sorted((work / "out").glob("*.safetensors"))
    assert len(files) > 5
    over = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            if file.stat().st_size > 20_000 and len(list(shard.keys())) > 1:
                over[file.name] = file.stat().st_size
    assert over == {}


def test_a_sharded_model_decomposes_and_merges_like_one_file(cli: Cli, bert: Path, work: Path) -> None:
    tf.BertForSequenceClassification.from_pretrained(bert).save_pretrained(work / "many", max_shard_size="60KB")
    assert len(list((work / "many").glob("*.safetensors"))) > 2
    succeeded(cli("decompose", bert, "--trunc", 8, "-o", "one-mpo"))
    succeeded(cli("decompose", "many", "--trunc", 8, "-o", "many-mpo"))
    one, many = (load_file(work / name / WEIGHTS) for name in ("one-mpo", "many-mpo"))
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)
    assert not (work / "many-mpo" / f"{WEIGHTS}.index.json").exists()
    succeeded(cli("decompose", "many-mpo", "--layers", "head", "--max-shard-size", "20KB", "-o", "shards"))
    succeeded(cli("merge", "shards", "-o", "dense"))
    assert load_file(work / "dense" / WEIGHTS).keys() == load_file(bert / WEIGHTS).keys()

"""What a successful run writes and prints."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
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

from cli.shell import WEIGHTS, Cli, Outcome, edited, succeeded, tree

ALL = ("bert", "masked_lm", "gpt2", "t5", "llama")
TOTALS = {"params", "dense_params", "ratio", "bytes", "dense_bytes"}
MODULE = {
    "name",
    "role",
    "action",
    "reason",
    "out_dims",
    "in_dims",
    "bond_dims",
    "params",
    "dense_params",
    "relative_error",
}


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


# --- what is printed --------------------------------------------------------------------------------------------


def test_decompose_json_has_the_documented_keys(cli: Cli, bert: Path, work: Path) -> None:
    report = succeeded(cli("decompose", bert, "--trunc", 8, "--json")).json
    assert next(iter(report)) == "schema" and report["schema"] == "mpocli.decompose/1"
    assert {"out", "seconds", "totals", "modules"} <= report.keys()
    assert report["totals"].keys() >= TOTALS
    assert report["out"] == "bert-mpo" and (work / report["out"]).is_dir()
    assert report["seconds"] > 0
    for module in report["modules"]:
        assert module.keys() >= MODULE
        assert module["action"] in ("mpo", "kept")
        assert (module["action"] == "mpo") == (module["bond_dims"] is not None) == (module["out_dims"] is not None)
        assert bool(module["reason"]) == (module["action"] == "kept")


def test_inspect_and_merge_json_have_the_documented_keys(cli: Cli, bert_mpo: Path, bert: Path, work: Path) -> None:
    inspected = succeeded(cli("inspect", bert_mpo, "--json")).json
    assert inspected["schema"] == "mpocli.inspect/1"
    assert inspected["totals"].keys() >= TOTALS
    assert all(module.keys() >= MODULE for module in inspected["modules"])
    dense = succeeded(cli("inspect", bert, "--json")).json
    assert {module["action"] for module in dense["modules"]} == {"kept"} and dense["totals"]["ratio"] == 1.0
    merged = succeeded(cli("merge", bert_mpo, "--json", "-o", "dense")).json
    assert merged["schema"] == "mpocli.merge/1"
    assert {"out", "seconds", "totals"} <= merged.keys() and merged["totals"].keys() >= TOTALS


def test_dry_run_json_has_the_keys_of_the_real_run(cli: Cli, bert: Path, work: Path) -> None:
    dry = succeeded(cli("decompose", bert, "--trunc", 8, "--dry-run", "--json")).json
    real = succeeded(cli("decompose", bert, "--trunc", 8, "--json")).json
    assert dry.keys() == real.keys()
    assert [module.keys() for module in dry["modules"]] == [module.keys() for module in real["modules"]]


@pytest.mark.parametrize("name", ALL)
def test_totals_are_counted_on_the_files_and_on_transformers_own_model(
    name: str, cli: Cli, work: Path, request: pytest.FixtureRequest
) -> None:
    dense = request.getfixturevalue(name)
    totals = succeeded(cli("decompose", dense, "--trunc", 8, "--json", "-o", "out")).json["totals"]
    stored = load_file(work / "out" / WEIGHTS)
    original = load_file(dense / WEIGHTS)
    tombstones = {key.rpartition(".")[0] + ".weight" for key in stored if ".core_" in key}
    real = {key for key in stored if "mpocli" not in key and stored[key].numel() != 1}
    assert tombstones and all(stored[key].numel() == 1 for key in tombstones & stored.keys())
    assert totals["params"] == sum(stored[key].numel() for key in real)
    assert totals["dense_params"] == sum(tensor.numel() for tensor in original.values())
    assert totals["dense_bytes"] == 4 * totals["dense_params"]
    assert totals["bytes"] == _weight_bytes(work / "out")
    assert totals["ratio"] == totals["params"] / totals["dense_params"] < 1
    assert json.loads((work / "out" / "mpo.json").read_text())["totals"] == totals
    assert succeeded(cli("inspect", "out", "--json")).json["totals"] == totals


def test_tables_go_to_stdout_and_talk_to_stderr(cli: Cli, bert: Path, work: Path) -> None:
    def check(outcome: Outcome, data: str, talk: str) -> None:
        succeeded(outcome)
        assert re.search(data, outcome.out) and not re.search(data, outcome.err)
        assert not talk or (re.search(talk, outcome.err) and not re.search(talk, outcome.out))

    check(cli("decompose", bert, "--trunc", 8, "-o", "a"), r"attention\s+8 of 8", r"written to a\b")
    check(cli("decompose", bert, "--trunc", 8, "--dry-run"), r"attention\s+8 of 8", r"dry run: nothing written")
    check(cli("decompose", bert, "--trunc", 20, "-o", "b"), r"attention\s+0 of 8", r"kept dense: 8 attention matrices")
    check(cli("inspect", "a"), r"attention\s+8 of 8", r"history: decompose")
    check(cli("inspect", "a", "--module", "*query"), r"layer\.0\.attention\.self\.query", "history")
    check(cli("inspect", bert, "--module", "*pooler*", "--spectrum"), r"entropy", "")
    check(cli("inspect", "a", "--verify"), r"no mismatch", "")
    check(cli("merge", "a", "-o", "c"), r"parameters\s+[\d,]+\s+[\d,]+", r"written to c\b")


def test_json_leaves_nothing_but_the_object_on_stdout_and_no_talk(cli: Cli, bert: Path, work: Path) -> None:
    for arguments in (
        ["decompose", bert, "--trunc", 8, "--json", "-o", "a"],
        ["inspect", "a", "--verify", "--json"],
        ["inspect", bert, "--spectrum", "--json"],
        ["merge", "a", "--json"],
    ):
        outcome = succeeded(cli(*arguments))
        assert outcome.json["schema"] == f"mpocli.{arguments[0]}/1"
        assert outcome.err == ""


@pytest.mark.parametrize("out", ["a[bold]", "a[/x]", "ünï cödé"])
def test_the_output_is_named_as_it_was_given(out: str, cli: Cli, bert: Path, work: Path) -> None:
    """Brackets are markup to rich."""
    (work / out).parent.mkdir(parents=True, exist_ok=True)
    assert f"written to {out} " in succeeded(cli("decompose", bert, "--trunc", 8, "-o", out)).err
    assert (work / out / WEIGHTS).is_file()
    assert f"written to {out}-merged " in succeeded(cli("merge", out, "-o", f"{out}-merged")).err


def test_the_default_output_is_named_after_the_model_and_printed(cli: Cli, dense: Path, work: Path) -> None:
    assert "written to dense-mpo " in succeeded(cli("decompose", dense, "--trunc", 8)).err
    assert "written to dense-mpo-merged " in succeeded(cli("merge", "dense-mpo/")).err
    assert set(tree(work)) >= {f"dense-mpo/{WEIGHTS}", f"dense-mpo-merged/{WEIGHTS}"}


@pytest.mark.parametrize("model", [".", "./", "../dense"])
def test_the_default_output_works_from_inside_the_models_directory(
    model: str, cli: Cli, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not lie in the input, and `mpocli decompose .` must not need an option."""
    monkeypatch.chdir(dense)
    succeeded(cli("decompose", model, "--trunc", 8))
    assert (tmp_path / "dense-mpo" / WEIGHTS).is_file()


def test_the_default_output_from_below_the_model_is_beside_the_model(
    cli: Cli, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dense / "1_Pooling").mkdir()
    monkeypatch.chdir(dense / "1_Pooling")
    assert "written to ../../dense-mpo " in succeeded(cli("decompose", "..", "--trunc", 8)).err
    assert (tmp_path / "dense-mpo" / WEIGHTS).is_file()


# --- dry runs ---------------------------------------------------------------------------------------------------

DRY = {
    "lossless": [],
    "trunc": ["--trunc", 8],
    "some kept": ["--trunc", 14],
    "tolerance": ["--rel-tol", 0.5],
    "tolerance and cap": ["--rel-tol", 0.4, "--trunc", 12, "--when-larger", "decompose"],
    "small shards": ["--trunc", 8, "--max-shard-size", "20KB"],
    "tolerance and small shards": ["--rel-tol", 0.55, "--max-shard-size", "20KB"],
    "half precision": ["--trunc", 8, "--dtype", "bfloat16"],
    "two sites": ["--sites", 2, "--ffn-trunc", 20],
    "with head": ["--layers", "embedding,attention,ffn,head", "--trunc", 8],
}


@pytest.mark.parametrize("options", DRY.values(), ids=DRY)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_dry_run_foretells_every_number_and_writes_nothing(
    name: str, options: list[object], cli: Cli, work: Path, request: pytest.FixtureRequest
) -> None:
    dense = request.getfixturevalue(name)
    dry = succeeded(cli("decompose", dense, *options, "--dry-run", "--json", "-o", "out")).json
    assert tree(work) == {}
    real = succeeded(cli("decompose", dense, *options, "--json", "-o", "out")).json
    assert dry["totals"] == real["totals"]
    assert real["totals"]["bytes"] == _weight_bytes(work / "out")
    for foretold, made in zip(dry["modules"], real["modules"], strict=True):
        if foretold["relative_error"] is None:
            foretold["relative_error"] = made["relative_error"]
        assert foretold == made
    assert dry["out"] is None and real["out"] == "out"


def test_a_dry_run_of_an_mpo_checkpoint_foretells_the_next_step(cli: Cli, work: Path, bert: Path) -> None:
    succeeded(cli("decompose", bert, "--layers", "ffn", "-o", "one"))
    options = ["one", "--layers", "attention", "--trunc", 8, "--json", "-o", "two"]
    dry = succeeded(cli("decompose", *options, "--dry-run")).json
    assert dry["totals"] == succeeded(cli("decompose", *options)).json["totals"]
    assert dry["totals"]["bytes"] == _weight_bytes(work / "two")


def test_a_dry_run_needs_no_free_output(cli: Cli, bert: Path, work: Path) -> None:
    (work / "bert-mpo").mkdir()
    (work / "bert-mpo" / "mine.txt").write_text("keep")
    before = tree(work)
    succeeded(cli("decompose", bert, "--trunc", 8, "--dry-run"))
    assert tree(work) == before


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


def _dense_by_loops(cores: list[np.ndarray], shape: list[int]) -> np.ndarray:
    """The matrix of an MPO, element by element: W[o, i] = product of one slice of each core."""
    out_dims, in_dims = ([core.shape[leg] for core in cores] for leg in (1, 2))
    matrix = np.zeros(shape)
    for row in range(shape[0]):
        row_digits = np.unravel_index(row, out_dims)
        for column in range(shape[1]):
            state = np.ones((1, 1))
            for core, o, i in zip(cores, row_digits, np.unravel_index(column, in_dims), strict=True):
                state = state @ core[:, o, i, :]
            matrix[row, column] = state[0, 0]
    return matrix


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
        difference = np.linalg.norm(_dense_by_loops(cores, module["shape"]) - matrix)
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


# --- inspect ----------------------------------------------------------------------------------------------------


def test_verify_passes_on_fresh_output_with_and_without_its_base(
    cli: Cli, bert: Path, gpt2: Path, t5: Path, work: Path
) -> None:
    for dense in (bert, gpt2, t5):
        for dtype in ("float32", "bfloat16"):
            out = f"{dense.name}-{dtype}"
            succeeded(cli("decompose", dense, "--trunc", 8, "--dtype", dtype, "-o", out))
            plain = succeeded(cli("inspect", out, "--verify", "--json")).json
            based = succeeded(cli("inspect", out, "--verify", "--base", dense, "--json")).json
            assert plain["problems"] == based["problems"] == []
            assert based["checks"] > plain["checks"] > len(json.loads((work / out / "mpo.json").read_text())["files"])


def _fails(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 3
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in outcome.err, (word, outcome.err)
    problems = outcome.json["problems"]
    assert problems


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_verify_notices_one_flipped_byte_anywhere_in_the_data(where: float, cli: Cli, mpo: Path) -> None:
    content = bytearray((mpo / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(where * (len(content) - 1 - start))] ^= 1
    (mpo / WEIGHTS).write_bytes(content)
    _fails(cli("inspect", mpo, "--verify", "--json"), WEIGHTS, "sha256")
    succeeded(cli("inspect", mpo))  # only asked is it read


@pytest.mark.parametrize("name", ["vocab.txt", "README.md", "tokenizer_config.json"])
def test_verify_notices_a_file_that_is_gone_or_changed(name: str, cli: Cli, mpo: Path) -> None:
    (mpo / name).write_text((mpo / name).read_text() + " ")
    _fails(cli("inspect", mpo, "--verify", "--json"), name)
    (mpo / name).unlink()
    _fails(cli("inspect", mpo, "--verify", "--json"), name, "not in the directory")


def _edit_core(directory: Path, core: int) -> None:
    """Scales an element in a core and makes the manifest's hash fit."""
    from cli.shell import rewrite

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"bert.pooler.dense.core_{core}"].view(-1)[0] += 0.5

    rewrite(directory, change)
    content = (directory / WEIGHTS).read_bytes()
    with edited(directory / "mpo.json") as manifest:
        manifest["files"][WEIGHTS] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest["totals"]["bytes"] = len(content)


def test_verify_with_the_base_notices_a_core_edited_together_with_its_hash(cli: Cli, mpo: Path, bert: Path) -> None:
    """The central core may be anything, so that only the claimed error gives it away."""
    _edit_core(mpo, core=2)
    succeeded(cli("inspect", mpo, "--verify"))
    _fails(cli("inspect", mpo, "--verify", "--base", bert, "--json"), "bert.pooler.dense", "relative error")


@pytest.mark.parametrize("core", [0, 1, 3, 4])
def test_verify_notices_a_core_that_is_no_longer_canonical(core: int, cli: Cli, mpo: Path) -> None:
    _edit_core(mpo, core)
    _fails(cli("inspect", mpo, "--verify", "--json"), "bert.pooler.dense", "canonical")


def test_verify_notices_totals_and_a_base_that_are_not_the_ones_recorded(
    cli: Cli, mpo: Path, bert: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(bert, tmp_path / "other"))
    models.bert_classifier(other, num_labels=4)
    _fails(cli("inspect", mpo, "--verify", "--base", other, "--json"), "base model")
    with edited(mpo / "mpo.json") as manifest:
        manifest["totals"]["params"] += 1
    _fails(cli("inspect", mpo, "--verify", "--json"), "totals")


def test_verify_prints_every_problem_and_still_shows_the_table(cli: Cli, mpo: Path) -> None:
    (mpo / "vocab.txt").unlink()
    (mpo / "README.md").unlink()
    outcome = cli("inspect", mpo, "--verify")
    assert outcome.code == 3 and "attention" in outcome.out
    assert "✗ vocab.txt" in outcome.err and "✗ README.md" in outcome.err and "2 of" in outcome.err


def _unfoldings(matrix: np.ndarray, out_dims: list[int], in_dims: list[int]) -> list[np.ndarray]:
    """Singular values of every (o_1 i_1 … o_k i_k) × rest unfolding, by numpy."""
    sites = len(out_dims)
    padded = np.zeros((prod(out_dims), prod(in_dims)))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    flat = padded.reshape(*out_dims, *in_dims).transpose(order).reshape(-1)
    sizes = [o * i for o, i in zip(out_dims, in_dims, strict=True)]
    return [np.linalg.svd(flat.reshape(prod(sizes[:k]), -1), compute_uv=False) for k in range(1, sites)]


def _check_spectrum(module: dict[str, Any], matrix: np.ndarray) -> None:
    expected = _unfoldings(matrix, module["out_dims"], module["in_dims"])
    assert len(module["singular_values"]) == len(module["entropy_nats"]) == len(expected)
    for found, entropy, exact in zip(module["singular_values"], module["entropy_nats"], expected, strict=True):
        assert found == sorted(found, reverse=True)
        length = max(len(found), len(exact))
        difference = np.pad(found, (0, length - len(found))) - np.pad(exact, (0, length - len(exact)))
        assert abs(difference).max() <= 1e-6 * exact[0]
        p = exact**2 / (exact**2).sum()
        assert entropy == pytest.approx(-sum(x * np.log(x) for x in p if x > 0), abs=1e-5)


@pytest.mark.parametrize("sites", [2, 3, 5])
def test_the_spectrum_of_a_dense_matrix_is_that_of_its_unfoldings(sites: int, cli: Cli, bert: Path, gpt2: Path) -> None:
    for dense, name in ((bert, "bert.pooler.dense"), (gpt2, "transformer.h.0.attn.c_attn")):
        options = ["--module", name, "--spectrum", "--sites", sites, "--json"]
        (module,) = succeeded(cli("inspect", dense, *options)).json["modules"]
        weight = load_file(dense / WEIGHTS)[f"{name}.weight"].double().numpy()
        assert len(module["out_dims"]) == sites
        _check_spectrum(module, weight.T if dense == gpt2 else weight)


def test_the_spectrum_of_an_mpo_is_that_of_its_matrix_after_the_cut(cli: Cli, bert_mpo: Path) -> None:
    report = succeeded(cli("inspect", bert_mpo, "--module", "*pooler*", "--spectrum", "--json")).json
    (module,) = report["modules"]
    stored = load_file(bert_mpo / WEIGHTS)
    cores = [stored[f"bert.pooler.dense.core_{k}"].double().numpy() for k in range(5)]
    assert [len(values) for values in module["singular_values"]] == module["bond_dims"][1:-1]
    _check_spectrum(module, _dense_by_loops(cores, module["shape"]))


def test_a_spectrum_without_a_module_covers_every_matrix_with_a_role(cli: Cli, bert: Path) -> None:
    modules = succeeded(cli("inspect", bert, "--spectrum", "--json")).json["modules"]
    assert all((module["singular_values"] is not None) == (module["role"] is not None) for module in modules)
    assert sum(module["singular_values"] is not None for module in modules) == 15


def test_inspect_module_shows_only_what_matches(cli: Cli, bert_mpo: Path) -> None:
    report = succeeded(cli("inspect", bert_mpo, "--module", "*query", "--module", "*pooler*", "--json")).json
    assert {module["name"] for module in report["modules"]} == {
        *(f"bert.encoder.layer.{layer}.attention.self.query" for layer in (0, 1)),
        "bert.pooler.dense",
    }


def test_the_tensors_a_checkpoint_had_beside_its_matrices_are_passed_on_bit_for_bit(
    cli: Cli, dense: Path, work: Path
) -> None:
    """Integers too, and whatever dtype each has."""
    from cli.shell import rewrite

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

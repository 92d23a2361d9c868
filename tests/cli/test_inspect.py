"""What `inspect` verifies, and the spectra that it shows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cli.matrices import dense_by_loops
from cli.shell import WEIGHTS, Cli, Outcome, edited, refused, rewrite, succeeded


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
    _flip(mpo / WEIGHTS, 8, where)
    _fails(cli("inspect", mpo, "--verify", "--json"), WEIGHTS, "sha256")
    succeeded(cli("inspect", mpo))  # only asked is it read


def _flip(file: Path, first: int, where: float) -> None:
    """A bit of a byte of the data, from `first` on: before 8 is the seal, which is the widest."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little") + first
    content[start + int(where * (len(content) - 1 - start))] ^= 1
    file.write_bytes(content)


def test_a_seal_that_is_not_that_of_the_config_is_refused_by_every_verb(cli: Cli, mpo: Path) -> None:
    _flip(mpo / WEIGHTS, 0, 0.0)
    for verb in (("inspect",), ("merge", "-o", "out"), ("decompose", "-o", "out")):
        refused(cli(verb[0], mpo, *verb[1:]), 3, "quantization_config", "seal")


@pytest.mark.parametrize("name", ["vocab.txt", "README.md", "tokenizer_config.json"])
def test_verify_notices_a_file_that_is_gone_or_changed(name: str, cli: Cli, mpo: Path) -> None:
    (mpo / name).write_text((mpo / name).read_text() + " ")
    _fails(cli("inspect", mpo, "--verify", "--json"), name)
    (mpo / name).unlink()
    _fails(cli("inspect", mpo, "--verify", "--json"), name, "not in the directory")


def _edit_core(directory: Path, core: int, edit: Callable[[torch.Tensor], object] | None = None) -> None:
    """Changes a core, an element of it if nothing else is said, and makes the manifest's hash fit."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[f"bert.pooler.dense.core_{core}"]
        if edit is not None:
            edit(tensor)
        else:
            tensor.view(-1)[0] += 0.5

    rewrite(directory, change)
    content = (directory / WEIGHTS).read_bytes()
    with edited(directory / "mpo.json") as manifest:
        manifest["files"][WEIGHTS] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest["totals"]["bytes"] = len(content)


def test_verify_with_the_base_notices_a_core_edited_together_with_its_hash(cli: Cli, mpo: Path, bert: Path) -> None:
    """Of the central core only the norm is known, so that the claimed error alone gives a sign away."""
    _edit_core(mpo, 2, torch.Tensor.neg_)
    succeeded(cli("inspect", mpo, "--verify"))
    _fails(cli("inspect", mpo, "--verify", "--base", bert, "--json"), "bert.pooler.dense", "relative error")


def test_verify_notices_a_central_core_whose_norm_is_not_what_the_cuts_left(cli: Cli, mpo: Path) -> None:
    _edit_core(mpo, 2)
    _fails(cli("inspect", mpo, "--verify", "--json"), "bert.pooler.dense", "discarded")


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
    _check_spectrum(module, dense_by_loops(cores, module["shape"]))


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


def _infinite(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"history": [{"seed": float("inf")}]}))


IN_ITS_PLACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is a pipe"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a directory"),
    "a dead link": (lambda path: (path.unlink(), path.symlink_to("gone")), "is a link to what does not exist"),
    "an infinity": (_infinite, "Infinity is no number of JSON"),
}


@pytest.mark.parametrize("what", IN_ITS_PLACE)
@pytest.mark.parametrize("words", [("inspect",), ("inspect", "--verify"), ("merge", "-o", "out")], ids=" ".join)
def test_what_is_no_manifest_is_not_taken_for_none(
    what: str, words: tuple[str, ...], cli: Cli, bert_mpo: Path, tmp_path: Path, work: Path
) -> None:
    spoil, told = IN_ITS_PLACE[what]
    directory = Path(shutil.copytree(bert_mpo, tmp_path / "mpo"))
    spoil(directory / "mpo.json")
    command, *options = words
    refused(cli(command, directory, *options), 3, told)

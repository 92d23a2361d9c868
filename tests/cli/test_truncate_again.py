"""Truncating the MPOs of a checkpoint once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cli.shell import WEIGHTS, Cli, refused, rewrite, succeeded, tree


def _modules(directory: Path) -> dict[str, Any]:
    return {module["name"]: module for module in json.loads((directory / "mpo.json").read_text())["modules"]}


def _matrix(directory: Path, name: str, module: dict[str, Any]) -> torch.Tensor:
    """W[o_1 o_2 …, i_1 i_2 …] from the stored cores by numpy, cropped."""
    stored = load_file(directory / WEIGHTS)
    sites = len(module["out_dims"])
    product = np.ones((1, 1, 1))
    for k in range(sites):
        core = stored[f"{name}.core_{k}"].double().numpy()
        product = np.einsum("xya,aoib->xoyib", product, core)
        product = product.reshape(product.shape[0] * product.shape[1], -1, product.shape[-1])
    rows, columns = module["shape"]
    return torch.from_numpy(product[:rows, :columns, 0])


@pytest.fixture
def moved(mpo: Path) -> Path:
    """Cores as training leaves them: out of any canonical form, and at random."""

    def move(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(1)
        for name in sorted(tensors):
            if ".core_" in name:
                tensors[name] += 0.2 * tensors[name].abs().mean() * torch.randn_like(tensors[name])

    rewrite(mpo, move)
    (mpo / "mpo.json").unlink()  # as a plain `save_pretrained` leaves it
    return mpo


@pytest.mark.parametrize("source", ["bert_mpo", "moved"])
@pytest.mark.parametrize("options", [["--trunc", 4], ["--rel-tol", 0.9], ["--ffn-trunc", 3, "--rel-tol", 0.4]])
def test_cores_are_truncated_again_and_the_error_is_that_of_what_is_stored(
    source: str, options: list[object], cli: Cli, work: Path, request: pytest.FixtureRequest
) -> None:
    before: Path = request.getfixturevalue(source)
    dry = succeeded(cli("decompose", before, *options, "--json", "--dry-run")).json
    report = succeeded(cli("decompose", before, *options, "--json", "-o", "out")).json
    assert dry["totals"] == report["totals"]
    assert report["totals"]["params"] < report["before"]["params"]
    assert report["totals"]["bytes"] == (work / "out" / WEIGHTS).stat().st_size
    found = _modules(work / "out")
    cut = [module for module in report["modules"] if module["cut_from"]]
    assert len(cut) >= 4
    for module in cut:
        claimed = found[module["name"]]
        was = {**claimed, "bond_dims": module["cut_from"]}
        a, b = _matrix(before, module["name"], was), _matrix(work / "out", module["name"], claimed)
        assert module["relative_error"] == claimed["relative_error"]
        assert module["relative_error"] == pytest.approx(float((a - b).norm() / a.norm()), abs=1e-6)
        assert all(now <= then for now, then in zip(module["bond_dims"], module["cut_from"], strict=True))
        if options[0] == "--trunc":
            assert max(module["bond_dims"]) <= 4
        if options[0] == "--rel-tol":
            assert module["relative_error"] <= 0.9 + 1e-6


def test_errors_verify_against_the_input_of_the_command_that_measured_them(
    cli: Cli, bert: Path, bert_mpo: Path, work: Path
) -> None:
    """What was truncated again against the MPO that came in, what was left against the dense model, and a false claim
    of either is found."""
    succeeded(cli("decompose", bert_mpo, "--layers", "ffn", "--trunc", 4, "-o", "out"))
    few, more, plain = (
        succeeded(cli("inspect", "out", "--verify", *base, "--json")).json["checks"]
        for base in (["--base", bert_mpo], ["--base", bert], [])
    )
    cut = sum(bool(module.get("measured_against")) for module in _modules(work / "out").values())
    assert cut and few >= plain + 1 + cut and more > plain + 1
    data = json.loads((work / "out" / "mpo.json").read_text())
    wrong = next(module for module in data["modules"] if module.get("measured_against"))
    wrong["relative_error"] *= 0.5
    wrong["discarded_weight"] = None  # or it would contradict the error without any base
    (work / "out" / "mpo.json").write_text(json.dumps(data))
    assert cli("inspect", "out", "--verify", "--base", bert).code == 0
    outcome = cli("inspect", "out", "--verify", "--base", bert_mpo)
    assert outcome.code == 3 and wrong["name"] in outcome.err and "relative error" in outcome.err


def test_it_says_of_every_mpo_what_happened_to_it(cli: Cli, bert_mpo: Path, work: Path) -> None:
    done = succeeded(cli("decompose", bert_mpo, "--ffn-trunc", 4, "-o", "out"))
    lines = [line for line in done.out.splitlines() if " → " in line and "layer" in line]
    assert len(lines) == 4 and all("ffn" in line for line in lines)
    assert "4 MPOs were truncated again; the error is relative to what each of them was" in done.out
    assert "left as it was: 8 attention matrices: is an MPO already" in done.err
    same = succeeded(cli("decompose", bert_mpo, "--trunc", 8, "-o", "same"))
    assert "with bonds of at most 8" in same.err and " → " not in same.out.replace("→ after", "").partition("weight")[0]
    within = succeeded(cli("decompose", bert_mpo, "--rel-tol", 1e-9, "-o", "within"))
    assert "no bond can be cut within --rel-tol" in within.err


def test_what_cannot_be_done_to_an_mpo_is_refused_in_one_line(cli: Cli, bert_mpo: Path, work: Path) -> None:
    for option, value in (("--ratio", "0.5"), ("--max-bytes", "20kB"), ("--max-error", "0.5")):
        refused(cli("decompose", bert_mpo, option, value), 3, "are MPOs, which no plan takes apart", "--trunc")
    for options in (["--sites", 3], ["--when-larger", "keep"], ["--shape", "*query=4,12x12,4"]):
        refused(cli("decompose", bert_mpo, *options), 2, str(options[0]), "nothing but MPOs")
    assert tree(work) == {}

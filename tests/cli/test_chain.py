"""Commands in a row: each reads what the one before it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from cli.shell import Cli, succeeded, tree
from mpocli.io.signpost import SIGNPOST

CLASSES = {"bert": tf.BertForSequenceClassification, "gpt2": tf.GPT2LMHeadModel, "t5": tf.T5ForConditionalGeneration}


def _history(directory: Path) -> list[str]:
    return [entry["command"] for entry in json.loads((directory / "mpo.json").read_text())["history"]]


def _decomposed(directory: Path) -> set[str]:
    return set(json.loads((directory / "config.json").read_text())["quantization_config"]["modules"])


@pytest.mark.parametrize("name", CLASSES)
def test_decompose_twice_then_merge_gives_the_original_logits(
    name: str, cli: Cli, work: Path, request: pytest.FixtureRequest
) -> None:
    dense = request.getfixturevalue(name)
    before = tree(dense)
    succeeded(cli("decompose", dense, "--layers", "ffn", "-o", "one"))
    one = _decomposed(work / "one")
    succeeded(cli("decompose", "one", "--layers", "attention", "-o", "two"))
    two = _decomposed(work / "two")
    assert one and one < two and not {name for name in one if "attn" in name.lower()}
    succeeded(cli("merge", "two", "-o", "three"))
    assert [_history(work / step) for step in ("one", "two", "three")] == [
        ["decompose"],
        ["decompose", "decompose"],
        ["decompose", "decompose", "merge"],
    ]
    assert "quantization_config" not in json.loads((work / "three" / "config.json").read_text())
    expected = models.logits(CLASSES[name].from_pretrained(dense).eval())
    bound = 1e-5 * max(1.0, float(expected.abs().max()))
    assert float(expected.std()) > 0.01
    for step in ("one", "two", "three"):
        found = models.logits(CLASSES[name].from_pretrained(work / step).eval())
        assert float((found - expected).abs().max()) <= bound
    merged, original = load_file(work / "three" / "model.safetensors"), load_file(dense / "model.safetensors")
    assert {key: tensor.shape for key, tensor in merged.items()} == {k: t.shape for k, t in original.items()}
    assert tree(dense) == before  # no command touches its input


def test_the_base_model_and_each_input_are_recorded_along_the_chain(cli: Cli, bert: Path, work: Path) -> None:
    succeeded(cli("decompose", bert, "--layers", "ffn", "--seed", 5, "-o", "one"))
    succeeded(cli("decompose", "one", "--layers", "attention", "--trunc", 4, "-o", "two"))
    first, second = (json.loads((work / step / "mpo.json").read_text()) for step in ("one", "two"))
    digests = tree(bert)["model.safetensors"], tree(work / "one")["model.safetensors"]
    assert first["base_model"] == second["base_model"]
    assert first["base_model"]["name"] == "bert" and first["base_model"]["weights_sha256"] == digests[0]
    assert [entry["input_sha256"] for entry in second["history"]] == list(digests)
    assert second["history"][0] == first["history"][0]
    assert [entry["seed"] for entry in second["history"]] == [5, 0]
    assert second["history"][1]["options"]["trunc"] == 4
    claimed = {module["name"]: module["relative_error"] for module in first["modules"]}
    assert claimed.items() <= {m["name"]: m["relative_error"] for m in second["modules"]}.items()


def test_decomposing_what_is_decomposed_leaves_its_cores_bit_for_bit(cli: Cli, bert_mpo: Path, work: Path) -> None:
    report = succeeded(cli("decompose", bert_mpo, "--layers", "ffn,head", "--json", "-o", "again")).json
    reasons = {module["reason"] for module in report["modules"] if module["role"] == "ffn"}
    assert reasons == {"is an MPO already"}
    before, after = load_file(bert_mpo / "model.safetensors"), load_file(work / "again" / "model.safetensors")
    assert before.keys() - after.keys() <= {"classifier.weight"}
    same = {key for key in before.keys() & after.keys() if "classifier" not in key and key != SIGNPOST}
    assert len(same) > 40 and all(torch.equal(before[key], after[key]) for key in same)


def test_merging_twice_is_refused(cli: Cli, bert_mpo: Path, work: Path) -> None:
    succeeded(cli("merge", bert_mpo, "-o", "dense"))
    assert cli("merge", "dense", "-o", "again").code == 3
    assert not (work / "again").exists()


# --- without mpo.json: a user's own save_pretrained writes none -------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_every_verb_accepts_what_save_pretrained_wrote(
    name: str, cli: Cli, work: Path, request: pytest.FixtureRequest
) -> None:
    dense = request.getfixturevalue(name)
    succeeded(cli("decompose", dense, "--layers", "attention,embedding", "-o", "ours"))
    CLASSES[name].from_pretrained(work / "ours").save_pretrained(work / "theirs")
    assert not (work / "theirs" / "mpo.json").exists()
    ours, theirs = (succeeded(cli("inspect", directory, "--json")).json for directory in ("ours", "theirs"))
    for key in ("name", "role", "action", "out_dims", "in_dims", "bond_dims", "params", "dense_params"):
        assert [module[key] for module in ours["modules"]] == [module[key] for module in theirs["modules"]]
    assert all(module["relative_error"] is None for module in theirs["modules"] if module["action"] == "mpo")
    assert {**ours["totals"], "bytes": 0} == {**theirs["totals"], "bytes": 0}
    assert succeeded(cli("inspect", "theirs", "--verify", "--json")).json["problems"] == []
    succeeded(cli("decompose", "theirs", "--layers", "ffn", "-o", "more"))
    succeeded(cli("inspect", "more"))  # an error that is not known has to be printed too
    succeeded(cli("merge", "more", "-o", "dense"))
    expected = models.logits(CLASSES[name].from_pretrained(dense).eval())
    found = models.logits(CLASSES[name].from_pretrained(work / "dense").eval())
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_merge_needs_no_manifest(cli: Cli, mpo: Path, work: Path) -> None:
    succeeded(cli("merge", mpo, "-o", "with"))
    (mpo / "mpo.json").unlink()
    succeeded(cli("merge", mpo, "-o", "without"))
    assert tree(work / "with")["model.safetensors"] == tree(work / "without")["model.safetensors"]


def test_recasting_a_decomposed_model_changes_its_claims_with_its_cores(cli: Cli, bert: Path, work: Path) -> None:
    """Cores rounded to half precision are no longer those whose error was measured."""
    succeeded(cli("decompose", bert, "--layers", "ffn", "-o", "single"))
    options = ["single", "--layers", "attention", "--dtype", "bfloat16"]
    foretold = succeeded(cli("decompose", *options, "--dry-run", "--json")).json["totals"]
    report = succeeded(cli("decompose", *options, "--json", "-o", "half")).json
    assert foretold == report["totals"]
    stored = load_file(work / "half" / "model.safetensors")
    assert {tensor.dtype for key, tensor in stored.items() if ".core_" in key} == {torch.bfloat16}
    modules = json.loads((work / "half" / "mpo.json").read_text())["modules"]
    assert {entry["dtype"] for module in modules for entry in module["tensors"].values()} == {"bfloat16"}
    assert succeeded(cli("inspect", "half", "--verify", "--base", bert, "--json")).json["problems"] == []

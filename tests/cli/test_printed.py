"""What a successful run prints, and that a dry run foretells it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cli.shell import WEIGHTS, Cli, Outcome, succeeded, tree

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


def test_json_leaves_nothing_but_the_object_on_stdout_and_the_talk_where_it_was(
    cli: Cli, bert: Path, work: Path
) -> None:
    for arguments in (
        ["decompose", bert, "--trunc", 8, "--json", "-o", "a"],
        ["inspect", "a", "--verify", "--json"],
        ["inspect", bert, "--spectrum", "--json"],
        ["merge", "a", "--json"],
    ):
        outcome = succeeded(cli(*arguments))
        assert outcome.json["schema"] == f"mpocli.{arguments[0]}/1"
        plain = succeeded(cli(*(word for word in arguments if word != "--json"), *again(arguments)))
        assert _without_times(plain.err) == _without_times(outcome.err)
        assert plain.out and ("history" in outcome.err or "written to" in outcome.err or "--spectrum" in arguments)


def again(arguments: list[object]) -> list[str]:
    return ["--overwrite"] if arguments[0] in ("decompose", "merge") else []


def _without_times(text: str) -> str:
    return re.sub(r"in [\d.]+ s", "", text)


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

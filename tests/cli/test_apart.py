"""Nothing that is read is overwritten, whatever option names it, and no file without `--overwrite`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.shell import WEIGHTS, Cli, refused, succeeded, tree
from mpocli.cli.group import COMMANDS, command
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.evaluate import EvalConfig
from mpocli.config.finetune import FinetuneConfig
from mpocli.config.option import declared

SST2 = ("--task", "sst2")


@pytest.fixture
def shop(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with everything that commands read, to work in."""
    here = tmp_path / "shop"
    here.mkdir()
    for name in ("body", "mpo"):
        shutil.copytree(lab / name, here / name)
        shutil.copytree(lab / name, here / f"other-{name}")
    shutil.copytree(lab / "body", here / "words")
    (here / "data").mkdir()
    for name in ("train.tsv", "dev.tsv", "train.txt"):
        shutil.copyfile(lab / name, here / "data" / name)
    monkeypatch.chdir(here)
    return here


EVAL = ("eval", "body", *SST2, "--eval", "data/dev.tsv")
TRAIN = ("body", *SST2, "--train", "data/train.tsv", "--steps", "1")
PLAN = ("body", "--ratio", "0.5", "--calibrate", "data/train.txt")
SQUEEZE = ("squeeze", "mpo", *SST2, "--train", "data/train.tsv", "--eval", "data/dev.tsv", "--rounds", "1")
OVERWRITES = {
    "predictions, weights": (*EVAL, "--overwrite", "--predictions", f"body/{WEIGHTS}"),
    "predictions, a new file in the model": (*EVAL, "--predictions", "body/predictions.jsonl"),
    "predictions, data": (*EVAL, "--overwrite", "--predictions", "data/dev.tsv"),
    "predictions, baseline": (
        *(*EVAL, "--baseline", "other-body", "--overwrite"),
        *("--predictions", "other-body/config.json"),
    ),
    "predictions, tokenizer": (*EVAL, "--tokenizer", "words", "--overwrite", "--predictions", "words/config.json"),
    "predictions, data by a link": (*EVAL, "--overwrite", "--predictions", "link.jsonl"),
    "predictions, data by a hard link": (*EVAL, "--overwrite", "--predictions", "hard.jsonl"),
    "plot, data": (*SQUEEZE, "--overwrite", "--plot", "data/dev.svg", "--eval", "data/dev.svg"),
    "plot, output": (*SQUEEZE, "-o", "new", "--plot", "new/rounds.svg"),
    "sensitivity, weights": ("plan", *PLAN, "--sensitivity", f"body/{WEIGHTS}"),
    "sensitivity, data": ("plan", *PLAN, "--sensitivity", "data/train.txt"),
    "sensitivity, output": ("decompose", *PLAN, "-o", "new", "--sensitivity", "new/known.json"),
    "out, calibrate": ("decompose", *PLAN, "-o", "data", "--overwrite"),
    "out, sparsify --calibrate": (
        *("sparsify", "body", "--method", "wanda", "--sparsity", "0.5", "--calibrate", "data/train.txt"),
        *("-o", "data", "--overwrite"),
    ),
    "out, train": ("finetune", *TRAIN, "-o", "data", "--overwrite"),
    "out, teacher": ("finetune", *TRAIN, "--teacher", "other-body", "-o", "other-body", "--overwrite"),
    "out, tokenizer": ("finetune", *TRAIN, "--tokenizer", "words", "-o", "words", "--overwrite"),
    "out, score-from": (
        *("finetune", *TRAIN, "--overparam", "static", "--top-n", "1", "--score-from", "other-body"),
        *("-o", "other-body", "--overwrite"),
    ),
    "out, test": ("finetune", *TRAIN, "--test", "data/dev.tsv", "-o", "data", "--overwrite"),
    "the training directory, the model": ("finetune", "run.training/body", *TRAIN[1:], "-o", "run", "--overwrite"),
    "the training directory, the teacher": (
        *("finetune", *TRAIN, "--teacher", "run.training/body", "-o", "run", "--overwrite"),
    ),
    "cache, out": ("demo", "--cache", "demo", "-o", "demo/made"),
}


@pytest.mark.parametrize("what", OVERWRITES)
def test_what_is_read_is_never_written(what: str, cli: Cli, shop: Path) -> None:
    (shop / "link.jsonl").symlink_to(shop / "data" / "dev.tsv")
    (shop / "hard.jsonl").hardlink_to(shop / "data" / "dev.tsv")
    if "training directory" in what:
        shutil.copytree(shop / "body", shop / "run.training" / "body")
    if what in ("plot, output", "sensitivity, output"):
        shutil.copytree(shop / "mpo", shop / "new")
    if what == "plot, data":
        shutil.copyfile(shop / "data" / "dev.tsv", shop / "data" / "dev.svg")
    before = tree(shop)
    said = refused(cli(*OVERWRITES[what]), 3)
    assert "would overwrite" in said or "inside each other" in said
    assert tree(shop) == before


def test_every_option_that_names_a_path_is_under_the_rule() -> None:
    """Its declaration says what it is: MODEL and DATA are read, FILE and DIR are written."""
    options = [option for name in COMMANDS for option in command(name).params if option.opts[0][:2] == "--"]
    read = {option.opts[0] for option in options if option.metavar in ("MODEL", "DATA")}
    written = {option.opts[0] for option in options if option.metavar in ("FILE", "DIR")}
    configs = (DecomposeConfig, EvalConfig, FinetuneConfig)
    named = {one.option.name for config in configs for one in declared(config) if one.option.reads}
    assert read == {*named, "--baseline", "--base"}  # `inspect --base` writes nothing
    assert written == {"--out", "--predictions", "--plot", "--sensitivity", "--cache"}


def test_predictions_replace_a_file_only_when_asked(cli: Cli, shop: Path, lab: Path) -> None:
    arguments = ("eval", "body", "--task", "sst2", "--eval", "data/dev.tsv", "--predictions", "mine.jsonl")
    (shop / "mine.jsonl").write_text("mine")
    refused(cli(*arguments), 3, "mine.jsonl", "--overwrite")
    assert (shop / "mine.jsonl").read_text() == "mine"
    refused(cli("eval", "body", "--overwrite"), 2, "--predictions")


def test_an_index_that_leads_out_of_its_directory_is_refused(cli: Cli, mpo: Path, tmp_path: Path) -> None:
    """Absolute, upwards, or a path of any kind: a shard is a file beside its index."""
    shutil.move(mpo / WEIGHTS, tmp_path / "elsewhere.safetensors")
    (mpo / "sub").mkdir()
    shutil.copyfile(tmp_path / "elsewhere.safetensors", mpo / "sub" / "a.safetensors")
    for name in (str(tmp_path / "elsewhere.safetensors"), "../elsewhere.safetensors", "sub/a.safetensors", "x" * 5000):
        index = {"metadata": {}, "weight_map": {"a": name}}
        (mpo / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        refused(cli("inspect", mpo), 3, "no file name")


def test_a_demos_result_is_replaced_by_the_next_and_nothing_else_is(
    cli: Cli, mpo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpocli.methods.demo import _is_demos

    succeeded(cli("merge", mpo, "-o", tmp_path / "merged"))
    assert _is_demos(mpo, "bert") and not _is_demos(tmp_path / "merged", "bert") and not _is_demos(mpo, "gpt2")

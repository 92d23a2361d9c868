"""`mpocli finetune` on experts: what moves and what is masked, the routers' losses and counts, kills, two processes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import tasks
from cli.moe import routing, weights
from cli.processes import Moment, Server
from cli.shell import Cli, refused, succeeded, tree
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.expand_moe import ExpandConfig
from mpocli.io.signpost import SIGNPOST
from mpocli.methods.decompose import run as decompose
from mpocli.methods.expand_moe import run as expand_moe

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def moe(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's BERT with three experts that are not equal."""
    out = tmp_path_factory.mktemp("moe") / "moe"
    expand_moe.run(str(lab / "body"), ExpandConfig(experts=3, noise=0.05), out)
    return out


def sst2(lab: Path, *more: object) -> list[object]:
    """One epoch: twelve steps of eight sentences."""
    files = ["--task", "sst2", "--train", lab / "train.tsv", "--eval", lab / "dev.tsv", "--max-length", 32]
    return [*files, "--batch-size", 8, "--lr", 1e-2, "--steps", 12, "--log-steps", 1, "--json", *more]


@pytest.fixture
def train(cli: Cli, lab: Path, moe: Path, work: Path) -> Run:
    def run(out: str, *more: object, model: Path | None = None) -> dict[str, Any]:
        return succeeded(cli("finetune", model or moe, *sst2(lab, *more), "-o", out)).json

    return run


def changed(before: Path, after: Path) -> dict[str, bool]:
    """By tensor of the model's body, whether training moved it."""
    old, new = weights(before), weights(after)
    return {name: not torch.equal(tensor, new[f"bert.{name}"]) for name, tensor in old.items() if name != SIGNPOST}


def test_finetune_trains_everything_and_reports_its_routers(train: Run, lab: Path, moe: Path, work: Path) -> None:
    report = train("out")
    assert report["update"] == "all" and report["trainable_params"] == report["totals"]["params"]
    assert min(report["trainable_by_role"].values()) > 0
    moved = changed(moe, work / "out")
    cores = {name for name in moved if "core_" in name or "router" in name}
    assert len(cores) == 2 * 5 + 2 and all(moved[name] for name in cores)
    (found,) = report["routers"].values()
    assert list(report["routers"]) == ["bert.encoder.layer.0.intermediate.dense"]
    # An epoch of training: every word, and [CLS] and [SEP], once. Neither padding nor what evaluation read.
    with (lab / "train.tsv").open() as file:
        words = sum(len(row["sentence"].split()) + 2 for row in csv.DictReader(file, delimiter="\t"))
    assert found["tokens"] == words
    assert len(found["load"]) == 3 and sum(found["load"]) == pytest.approx(1)
    assert 0 < found["entropy_nats"] <= math.log(3) + 1e-6 and found["dropped"] == 0
    history = json.loads((work / "out" / "mpo.json").read_text())["history"]
    assert [entry["command"] for entry in history] == ["expand-moe", "finetune"]
    assert history[-1]["routers"] == report["routers"]


def test_a_probability_of_one_freezes_the_shared_cores_and_zero_does_not(train: Run, moe: Path, work: Path) -> None:
    for out, more in (("frozen", ["--mask-prob", 1, "--clip", 0.1]), ("free", ["--mask-prob", 0])):
        train(out, *more, "--steps", 3, "--accumulation", 2, "--batch-size", 4, "--weight-decay", 0.1)
    frozen, free = changed(moe, work / "frozen"), changed(moe, work / "free")
    assert {name for name, moved in frozen.items() if "core_" in name and not moved} == {
        f"encoder.layer.0.{place}.dense.core_2" for place in ("intermediate", "output")
    }
    assert all(moved for name, moved in free.items() if "core_" in name)


@pytest.mark.parametrize("loss", ["balance", "z"])
def test_the_routers_losses_are_in_the_loss_times_their_factor(loss: str, train: Run, work: Path) -> None:
    """Of the first step, at which all runs have the same weights and dropout."""
    first = []
    for factor in (0, 2, 4):
        options = {"--balance-loss": 0, "--z-loss": 0} | {f"--{loss}-loss": factor}
        train(f"out-{factor}", "--steps", 1, *(part for pair in options.items() for part in pair))
        first.append(tasks.logged(work / f"out-{factor}")[0]["loss"])
    more = (first[1] - first[0]) / 2
    assert (first[2] - first[0]) / 4 == pytest.approx(more, rel=1e-4)
    # One router of three experts: Switch's loss lies about 1, the z-loss about (ln 3)².
    assert more == pytest.approx(1.0 if loss == "balance" else math.log(3) ** 2, abs=0.3)


def test_options_of_finetune_replace_those_of_the_checkpoint_and_are_stored(
    cli: Cli, train: Run, moe: Path, work: Path
) -> None:
    options = ["--mask-prob", 0.125, "--balance-loss", 0.25, "--z-loss", 0.5, "--capacity-factor", 0.5]
    report = train("out", *options, "--steps", 3)
    given = {"mask_prob": 0.125, "balance_loss": 0.25, "z_loss": 0.5, "capacity_factor": 0.5}
    assert routing(work / "out") == {**routing(moe), **given}
    assert all(found["dropped"] > 0 for found in report["routers"].values())
    options_of = json.loads((work / "out" / "mpo.json").read_text())["history"][-1]["options"]
    assert {name: options_of[name] for name in given} == given
    train("again", "--steps", 1, model=work / "out")
    assert routing(work / "again") == routing(work / "out")


def test_options_of_experts_are_refused_where_there_are_none(cli: Cli, lab: Path, moe: Path, work: Path) -> None:
    for option in ("--mask-prob", "--balance-loss", "--z-loss", "--capacity-factor"):
        refused(cli("finetune", lab / "body", *sst2(lab, option, 0.5), "-o", "out"), 2, option, "no experts")
    refused(cli("finetune", moe, *sst2(lab, "--mask-prob", 2), "-o", "out"), 2, "--mask-prob", "2")
    assert tree(work) == {}


@pytest.mark.parametrize("option", ["--capacity-factor", "--balance-loss", "--z-loss"])
def test_values_that_cannot_be_meant_are_refused_in_finetune_too(
    option: str, cli: Cli, lab: Path, moe: Path, work: Path
) -> None:
    outcome = cli("finetune", moe, *sst2(lab, option, -1), "-o", "out")
    refused(outcome, outcome.code, "-1")
    assert outcome.code in (2, 3) and tree(work) == {}


@pytest.mark.parametrize("select", ["last", "best"])
def test_kill_9_and_resume_gives_the_bytes_of_the_uninterrupted_run(
    select: str, lab: Path, moe: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    """Masks, and the routers' counts in report and manifest, too."""
    more = ["--save-steps", 5, *(["--select", "best", "--limit", 44, "--steps", 15] if select == "best" else [])]
    arguments = ["finetune", moe, *sst2(lab, *more), "-o"]
    whole = trainer.run(*arguments, "whole", cwd=work, log=tmp_path / "log")
    assert whole.code == 0, whole.err
    moment = Moment("open", r"metrics\.jsonl", number=11)
    killed = trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log", moment=moment)
    assert killed.code == -9 and not (work / "cut").exists()
    ended = trainer.run(*arguments, "cut", "--resume", cwd=work, log=tmp_path / "log")
    assert ended.code == 0, ended.err
    found, wanted = json.loads(ended.out), json.loads(whole.out)
    assert found["resumed_from"] == 5
    for key in ("metrics", "routers", "selected_step"):
        assert found[key] == wanted[key], key
    assert tree(work / "cut") == tree(work / "whole")


def test_recomputing_activations_or_weights_changes_no_result_and_counts_no_token_twice(train: Run, work: Path) -> None:
    """Routing is done again in the backward pass."""
    options = ["--steps", 3, "--lr", 1e-3, "--capacity-factor", 1.0]
    plain = train("plain", *options)
    for name in ("gradient-checkpointing", "recompute-weights"):
        report = train(name, *options, f"--{name}")
        losses = [[line["loss"] for line in tasks.logged(work / out)] for out in ("plain", name)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        (found,), (wanted,) = report["routers"].values(), plain["routers"].values()
        assert found["tokens"] == wanted["tokens"] and found["load"] == pytest.approx(wanted["load"], abs=0.01)
        one, other = weights(work / "plain"), weights(work / name)
        names = [key for key in one if not key.endswith("key.bias")]  # whose gradient is rounding
        assert max(float((one[key] - other[key]).abs().max()) for key in names) <= 1e-5


IN_EACH_PROCESS = """
import hashlib, os
from pathlib import Path
from mpocli.methods.finetune import run as finetune

def watched(model, look=finetune.router_report):
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    Path("rank-" + os.environ["RANK"]).write_text(digest.hexdigest())
    return look(model)

finetune.router_report = watched
"""


def test_two_processes_draw_equal_masks_and_end_with_equal_weights(
    cli: Cli, lab: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    """And they are those of one process with twice the batch, but for summation: the masks are the same ones."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tasks.save("bert", tmp_path / "dense", initializer_range=0.1, **still)
    expand_moe.run(str(tmp_path / "dense"), ExpandConfig(experts=3), tmp_path / "moe")
    options = ["--task", "sst2", "--train", lab / "train.tsv", "--max-length", 32, "--lr", 1e-3, "--steps", 6]
    options += ["--log-steps", 1, "--device", "cpu", "--balance-loss", 0, "--json"]
    command = ["finetune", tmp_path / "moe", *options, "--batch-size", 4, "-o", "two"]
    done = trainer.run(*command, cwd=work, log=tmp_path / "log", ranks=2, before=IN_EACH_PROCESS)
    assert done.code == 0, done.err
    assert (work / "rank-0").read_text() == (work / "rank-1").read_text()
    alone = succeeded(cli("finetune", tmp_path / "moe", *options, "--batch-size", 8, "-o", "one")).json
    (seen,) = json.loads((work / "two" / "mpo.json").read_text())["history"][-1]["routers"].values()
    (whole,) = alone["routers"].values()
    assert seen["tokens"] == whole["tokens"] and seen["load"] == pytest.approx(whole["load"], abs=0.02)
    one, two = weights(work / "one"), weights(work / "two")
    for name in one:
        if not name.endswith("key.bias"):  # whose gradient is rounding
            assert float((one[name] - two[name]).abs().max()) <= 1e-4, name


def test_experts_of_trained_cores_claim_no_error(cli: Cli, train: Run, lab: Path, work: Path) -> None:
    """What was decomposed and then trained has no dense matrix to be compared with."""
    decompose.run(str(lab / "body"), DecomposeConfig(layers=("ffn",)), work / "mpo")
    train("tuned", "--steps", 2, model=work / "mpo")
    report = succeeded(cli("expand-moe", "tuned", "--json", "-o", "out")).json
    assert [module["relative_error"] for module in report["modules"]] == [None, None]
    data = ["--task", "sst2", "--eval", lab / "dev.tsv", "--max-length", 32, "--json"]
    tuned, moe = (succeeded(cli("eval", where, *data)).json["metrics"] for where in ("tuned", "out"))
    assert moe == tuned

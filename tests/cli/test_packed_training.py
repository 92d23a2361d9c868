"""finetune and eval on weights of four bits: these stay packed and as they are, what is beside them is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cli.shell import WEIGHTS, Cli, refused, succeeded, tree
from mpocli.config.quantize import QuantizeConfig
from mpocli.errors import InputError
from mpocli.methods.quantize import run as quantize
from mpocli.methods.training import run as training
from mpocli.nn.packed import PackedTensor
from mpocli.train.loop.segment import SegmentTrainer

Train = Callable[..., dict[str, Any]]
PARTS = ("_codes", "_scales", "_offsets")


@pytest.fixture(scope="module")
def rounded(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`centres`: an MPO model with central cores of four bits, `cores`: with all of them so, `dense`: without cores."""
    made = tmp_path_factory.mktemp("rounded")
    quantize.run(str(lab / "mpo"), QuantizeConfig(cores="central", group=16), made / "centres")
    quantize.run(str(lab / "mpo"), QuantizeConfig(group=16), made / "cores")
    quantize.run(str(lab / "body"), QuantizeConfig(group=16, layers=("attention",)), made / "dense")
    return made


def options(lab: Path, *more: object) -> list[object]:
    files = ["--task", "sst2", "--train", lab / "train.tsv", "--max-length", 32]
    return [*files, "--batch-size", 8, "--lr", 1e-2, "--steps", 4, "--save-steps", 2, "--log-steps", 1, *more]


@pytest.fixture
def train(cli: Cli, lab: Path, rounded: Path, work: Path) -> Train:
    def run(model: str, out: str, *more: object) -> dict[str, Any]:
        return succeeded(cli("finetune", rounded / model, *options(lab, "--json", *more), "-o", out)).json

    return run


def weights(directory: Path) -> dict[str, Tensor]:
    """By name, without the prefix that a body has in a classifier."""
    return {name.removeprefix("bert."): tensor for name, tensor in load_file(directory / WEIGHTS).items()}


def check_codes(before: Path, after: Path) -> None:
    """Every part of what is packed is there, byte by byte."""
    old, new = weights(before), weights(after)
    parts = [name for name in old if name.endswith(PARTS)]
    assert len(parts) >= 3 * 4 and parts == [name for name in new if name.endswith(PARTS)]
    assert all(old[name].numpy().tobytes() == new[name].numpy().tobytes() for name in parts)


def test_a_run_leaves_the_codes_and_trains_the_rest_as_beside_their_values_and_goes_on_where_it_was_cut(
    cli: Cli, train: Train, lab: Path, rounded: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []
    run, step = SegmentTrainer.train, SegmentTrainer.training_step

    def watched(trainer: Any, *args: Any, **how: Any) -> Any:
        trainers.append(trainer)
        return run(trainer, *args, **how)

    def cut(trainer: Any, *args: Any, **how: Any) -> Any:
        if trainer.state.global_step == 3:
            raise InputError("cut")
        return step(trainer, *args, **how)

    monkeypatch.setattr(SegmentTrainer, "train", watched)
    report = train("centres", "out")
    assert report["update"] == "auxiliary" and report["trainable_by_role"]["central"] == 0
    check_codes(rounded / "centres", work / "out")
    before, after = weights(rounded / "centres"), weights(work / "out")
    moved = [name for name in before if "core_" in name and not name.endswith(PARTS)]
    assert moved and all(not torch.equal(before[name], after[name]) for name in moved)

    # In memory, while it trained: codes are an eighth of float32, their scales come on top; no state is kept for them.
    packed = [p for p in trainers[0].model.parameters() if isinstance(p, PackedTensor)]
    codes, wide = sum(p.parts[0].nbytes for p in packed), sum(4 * p.numel() for p in packed)
    assert len(packed) >= 7 and codes == wide // 8
    assert sum(p.packed_bytes for p in packed) <= (1 / 8 + 2 / 4 / 16) * wide + 2 * len(packed) * 16
    held = trainers[0].optimizer.state
    assert held and not any(isinstance(p, PackedTensor) for p in held)
    assert all(p.grad is None for p in packed)

    with monkeypatch.context() as patch:
        patch.setattr(training, "keep_packed", nullcontext)  # unpacked once, frozen
        train("centres", "fast")
    assert not any(isinstance(p, PackedTensor) for p in trainers[1].model.parameters())
    assert tree(work / "out") == tree(work / "fast")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentTrainer, "training_step", cut)
        assert cli("finetune", rounded / "centres", *options(lab), "-o", "cut").code == 3
    resumed = train("centres", "cut", "--resume")
    assert resumed["resumed_from"] == 2 and resumed["loss"] == report["loss"]
    assert tree(work / "cut") == tree(work / "out")


@pytest.mark.parametrize(
    ("model", "more", "update", "kept"),
    [
        ("centres", ["--update", "all"], "all", "core_2"),
        ("cores", [], "all", "core_0"),
        ("dense", [], "all", "query.weight"),
    ],
)
def test_what_would_be_trained_and_is_packed_is_told(
    cli: Cli, lab: Path, rounded: Path, work: Path, model: str, more: list[str], update: str, kept: str
) -> None:
    ended = succeeded(cli("finetune", rounded / model, *options(lab, "--json", *more), "--steps", 1, "-o", "out"))
    assert ended.json["update"] == update
    told = [line for line in ended.err.splitlines() if line.startswith("packed, and not trained: ")]
    assert len(told) == 1 and kept in told[0]
    check_codes(rounded / model, work / "out")


@pytest.mark.parametrize(("model", "update"), [("centres", "central"), ("cores", "central"), ("cores", "auxiliary")])
def test_training_nothing_but_codes_is_refused(
    cli: Cli, lab: Path, rounded: Path, work: Path, model: str, update: str
) -> None:
    ended = cli("finetune", rounded / model, *options(lab), "--update", update, "-o", "out")
    refused(ended, 3, f"--update {update}: all {update} cores are packed codes", "mpocli merge")
    assert tree(work) == {}


def test_sparse_training_of_codes_is_refused_and_of_what_is_beside_them_leaves_them(
    cli: Cli, lab: Path, rounded: Path, work: Path
) -> None:
    pruned = [*options(lab), "--sparsity", 0.5, "-o", "out"]
    refused(cli("sparsify", rounded / "dense", *pruned), 3, "is packed codes", "--ignore")
    assert tree(work) == {}
    for storage in ("bitmask", "dense"):
        succeeded(cli("sparsify", rounded / "dense", *pruned, "--layers", "ffn", "--storage", storage, "--overwrite"))
        check_codes(rounded / "dense", work / "out")


def test_a_rounded_teacher_the_best_epoch_and_eval_in_less_memory(
    cli: Cli, train: Train, lab: Path, rounded: Path, work: Path
) -> None:
    train("centres", "teacher", "--steps", 1)
    report = train("centres", "out", "--teacher", work / "teacher", "--select", "best", "--steps", 1)
    assert report["selected_step"] == 1
    check_codes(rounded / "centres", work / "out")
    how = ["--task", "sst2", "--eval", lab / "dev.tsv", "--max-length", 32]
    fast, lean = (
        succeeded(cli("eval", work / "out", *how, "--memory", memory, "--json")).json for memory in ("fast", "lean")
    )
    assert fast["metrics"] == lean["metrics"]
    assert lean["speed"]["weights_bytes"] < 0.8 * fast["speed"]["weights_bytes"]
    # As the files have it, but for what they hold around tensors.
    assert lean["speed"]["weights_bytes"] <= lean["totals"]["bytes"] + 8 * 48
    assert "weights in memory" in succeeded(cli("eval", work / "out", *how)).out

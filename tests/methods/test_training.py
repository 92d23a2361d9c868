"""A verb that trains is a configuration and what it does with a run: all around that is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import tasks
from safetensors.torch import load_file

from mpocli.config.data import DataOptions
from mpocli.config.optimisation import Optimisation
from mpocli.errors import InputError, NumericsError
from mpocli.io.claim import writes_output
from mpocli.methods.training.begin import begin
from mpocli.methods.training.fit import fit
from mpocli.methods.training.run import TrainingRun, Written, load
from mpocli.methods.training.schedule import warmed_up
from mpocli.train.loop.metrics_file import METRICS


@dataclass(frozen=True)
class BiasConfig:
    """Options of a verb that trains biases alone."""

    data: DataOptions
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(lr=1e-2, batch_size=4, log_steps=1))
    epochs: float = 1.0
    steps: int | None = 3
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False

    def recorded(self) -> dict[str, Any]:
        return {"task": self.data.task, "lr": self.optimisation.lr, "steps": self.steps}


def train_biases(run: TrainingRun) -> dict[str, float]:
    for name, parameter in run.student.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    with run.underway(METRICS):
        before = run.measure_before()
        fit(run, warmed_up(run.optimisation, run.steps))
        return before


@writes_output
def train_and_write(
    model: Path,
    config: BiasConfig,
    out: Path,
    *,
    resume: bool = False,
    train: Callable[[TrainingRun], dict[str, float]] = train_biases,
    told: list[Any] | None = None,
) -> tuple[dict[str, float], Written]:
    setup = begin(str(model), config, out, overwrite=False, resume=resume)
    told = [] if told is None else told
    run = load(setup, progress=lambda done, total, line: told.append((done, total, line)), warn=told.append)
    before = train(run)
    return before, run.write("biases", recorded={"what": "biases"})


@pytest.fixture
def config(tmp_path: Path) -> BiasConfig:
    train = tasks.sentiment(tmp_path / "train.tsv", 24, 0)
    dev = tasks.sentiment(tmp_path / "dev.tsv", 12, 1)
    return BiasConfig(DataOptions("sst2", train=str(train), eval=(str(dev),), max_length=16))


@pytest.fixture
def body(tmp_path: Path) -> Path:
    return tasks.save("bert", tmp_path / "body")


def test_what_a_verb_trains_is_measured_rounded_written_and_its_directory_cleared(
    body: Path, config: BiasConfig, tmp_path: Path
) -> None:
    told: list[Any] = []
    before, written = train_and_write(body, config, tmp_path / "out", told=told)
    assert told[0].startswith("new for task sst2") and told[1] == (0, 3, "evaluating")
    assert told[-1] == (3, 3, "evaluating")
    assert before.keys() == written.metrics.keys() == {"accuracy"} and written.is_writer
    was, now = load_file(body / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name, tensor in was.items() if not torch.equal(tensor, now[f"bert.{name}"])}
    assert moved and all(name.endswith("bias") for name in moved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["body", "dev.tsv", "out", "train.tsv"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert steps == [1, 2, 3]
    (entry,) = json.loads((tmp_path / "out" / "mpo.json").read_text())["history"]
    assert (entry["command"], entry["metrics"]) == ("biases", written.metrics)
    assert entry["options"] == {"task": "sst2", "lr": 1e-2, "steps": 3, "what": "biases"}
    assert written.totals.params == asdict(written.totals)["params"] == sum(tensor.numel() for tensor in now.values())


def test_a_verb_resumes_what_was_interrupted_and_nothing_else(body: Path, config: BiasConfig, tmp_path: Path) -> None:
    def interrupted(run: TrainingRun) -> dict[str, float]:
        with run.underway(METRICS):
            fit(run, warmed_up(run.optimisation, run.steps))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_write(body, config, tmp_path / "out", train=interrupted)
    assert (tmp_path / "out.training" / "checkpoint-3").is_dir() and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="left of an interrupted run"):
        train_and_write(body, config, tmp_path / "out")
    longer = BiasConfig(config.data, steps=4)
    with pytest.raises(InputError, match="had steps = 3, this one has 4"):
        train_and_write(body, longer, tmp_path / "out", resume=True)
    train_and_write(body, config, tmp_path / "out", resume=True, train=interrupted_no_more)
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out.training").exists()
    with pytest.raises(InputError, match="nothing to resume"):
        train_and_write(body, config, tmp_path / "out", resume=True)


def interrupted_no_more(run: TrainingRun) -> dict[str, float]:
    assert run.setup.goes_on and run.setup.resumed_from == 3
    with run.underway(METRICS):
        trainer = fit(run, warmed_up(run.optimisation, run.steps))
        assert trainer.state.global_step == 3
    return {}


def test_a_student_that_does_not_come_out_finite_is_not_written(body: Path, config: BiasConfig, tmp_path: Path) -> None:
    def breaks(run: TrainingRun) -> dict[str, float]:
        with run.underway(), torch.no_grad():
            next(run.student.parameters()).fill_(float("nan"))
        return {}

    with pytest.raises(NumericsError, match="not finite after training"):
        train_and_write(body, config, tmp_path / "out", train=breaks)
    assert not (tmp_path / "out").exists()

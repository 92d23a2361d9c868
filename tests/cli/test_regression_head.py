"""A new regression head begins at the mean of the training scores; one that was trained stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpocli.config.data import DataOptions
from mpocli.config.optimisation import Optimisation
from mpocli.hf.artifact import Checkpoint
from mpocli.methods.data.task import prepare
from mpocli.methods.finetune import run as finetune
from mpocli.methods.training.student import load_student


def test_a_new_head_starts_at_the_mean_and_a_trained_one_does_not(lab: Path, tmp_path: Path) -> None:
    data = DataOptions("stsb", train=str(lab / "sts-train.tsv"), max_length=32)
    scores = [float(line.rsplit("\t", 1)[1]) for line in (lab / "sts-train.tsv").read_text().splitlines()[1:]]
    mean = sum(scores) / len(scores)
    assert mean > 1
    fresh = Checkpoint.open(str(lab / "body"))
    model = load_student(fresh, prepare(fresh, data, needs_train=True), trust_remote_code=False, warn=lambda line: None)
    assert float(model.classifier.bias) == pytest.approx(mean, abs=1e-6)

    config = finetune.FinetuneConfig(data, Optimisation(lr=1e-2, batch_size=8), steps=3)
    finetune.run(str(lab / "body"), config, tmp_path / "tuned")
    trained = Checkpoint.open(str(tmp_path / "tuned"))
    again = load_student(trained, prepare(trained, data, needs_train=True), trust_remote_code=False)
    stored = trained.reader.read("classifier.bias")
    assert torch.equal(again.classifier.bias.detach(), stored) and float(stored) != pytest.approx(mean, abs=1e-6)

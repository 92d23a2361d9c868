"""Heads that come from another task: what makes way for a new one, and what is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf
from cli import tasks

from mpocli.config.tasks import task_named
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.train.models import load_model

TASK = task_named("classification")


def test_the_head_of_another_task_makes_way_and_the_body_does_not(tmp_path: Path) -> None:
    tasks.save("bert", tmp_path / "ner", cls=tf.BertForTokenClassification, num_labels=5)
    checkpoint = Checkpoint.open(str(tmp_path / "ner"))
    new: list[str] = []
    model = load_model(tmp_path / "ner", checkpoint.config, TASK, "encoder", ("a", "b"), on_new=new.extend)
    assert {"classifier.weight", "classifier.bias"} <= set(new)
    assert model.classifier.weight.shape == (2, 32)
    stored = checkpoint.reader.read("bert.encoder.layer.0.output.dense.weight")
    assert model.bert.encoder.layer[0].output.dense.weight.equal(stored)

    narrow = tf.AutoConfig.from_pretrained(tmp_path / "ner", intermediate_size=48)
    narrow.save_pretrained(tmp_path / "ner")
    with pytest.raises(InputError, match=r"tensor bert\.encoder.* is 64.*, config\.json implies 48"):
        load_model(tmp_path / "ner", narrow, TASK, "encoder", ("a", "b"), on_new=new.extend)


def test_a_classifier_of_other_classes_is_refused_with_both_numbers(tmp_path: Path) -> None:
    tasks.save("bert", tmp_path / "five", cls=tf.BertForSequenceClassification, num_labels=5)
    checkpoint = Checkpoint.open(str(tmp_path / "five"))
    with pytest.raises(InputError, match="head has 5 classes, task classification has 2"):
        load_model(tmp_path / "five", checkpoint.config, TASK, "encoder", ("a", "b"))

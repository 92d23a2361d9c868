"""Look at the experts in a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import mpocli  # noqa: F401 (its loader)
from cli.shell import WEIGHTS
from mpocli.nn import DenseExperts, MPOExperts


def load(directory: Path) -> tf.PreTrainedModel:
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(tf, name).from_pretrained(directory).eval()


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / WEIGHTS)


def routing(directory: Path) -> dict[str, Any]:
    """As stored, in both places."""
    stored: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]["routing"]
    assert json.loads((directory / "mpo.json").read_text())["routing"] == stored
    return stored


def apart(one: Path, other: Path) -> float:
    """The largest difference of logits, in units of max(1, the largest logit)."""
    first, second = models.logits(load(one)), models.logits(load(other))
    return float((first - second).abs().max()) / max(1.0, float(first.abs().max()))


def expert_layers(model: tf.PreTrainedModel) -> dict[str, MPOExperts | DenseExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MPOExperts | DenseExperts)}

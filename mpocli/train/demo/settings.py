"""All that decides what the demo models become."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hyperparameters:
    """How long to train, on how many windows a step, and at what peak learning rate."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Settings:
    """All that decides what the models become, apart from the installed Python; a change of any makes them anew."""

    version: int = 1
    seed: int = 2023
    vocabulary: int = 2048
    window: int = 64  # tokens, of training and of the position tables
    width: int = 128
    layers: int = 2
    heads: int = 4
    bert_mask: float = 0.4  # of a window's tokens, in training
    # At twice the rate BERT may learn no more than word frequencies.
    bert: Hyperparameters = Hyperparameters(1100, 8, 1.5e-3)
    gpt2: Hyperparameters = Hyperparameters(900, 8, 3e-3)

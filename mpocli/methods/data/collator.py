"""Batches of a task's data, for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mpocli.train.data.collate import collate
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.evaluate.predict import mask_tokens


class Collator:
    """Features to padded batches; for a `masked` language model with tokens hidden.

    Which ones is a function of seed, `epoch` and sample: a resumed run hides the same.
    """

    def __init__(self, vocabulary: Vocabulary, masked: bool, seed: int) -> None:
        self.vocabulary, self.masked, self.seed, self.epoch = vocabulary, masked, seed, 0

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(features, self.vocabulary.pad)
        if self.masked:
            first = (self.seed * 1_009 + self.epoch) * 1_000_003
            batch["labels"] = mask_tokens(batch, self.vocabulary, [first + feature["index"] for feature in features])
        return batch

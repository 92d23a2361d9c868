"""The order in which a segment sees its samples: a function of seed, epoch and step alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells sampler and collator the epoch: accelerate's wrappers, of a resumed run above all, do not."""

    def __init__(self, *listeners: Any, first: int = 0) -> None:
        self.listeners, self.first = listeners, first

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for listener in self.listeners:
            listener.epoch = self.first + int((state.epoch or 0.0) + 1e-6)


class ByLength(Sampler[int]):
    """All samples in a random order that keeps similar lengths together, or plainly random without `batch_size`.

    A function of seed and epoch alone, so that a resumed run sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int | None, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.batch_size is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class Stretch(Sampler[int]):
    """`steps` whole batches out of the endless row of a sampler's epochs, from batch `first` on.

    What does not fill a batch at an epoch's end is left out; it is other samples each time.
    """

    def __init__(self, epochs: ByLength, batch_size: int, first: int, steps: int) -> None:
        self.epochs, self.batch_size, self.first, self.steps = epochs, batch_size, first, steps
        self.epoch = 0

    def __len__(self) -> int:
        return self.batch_size * self.steps

    def __iter__(self) -> Iterator[int]:
        per_epoch = max(1, len(self.epochs) // self.batch_size)
        for step in range(self.first, self.first + self.steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == self.first:
                self.epochs.epoch = epoch
                order = list(self.epochs)
                order = order * math.ceil(self.batch_size / len(order))  # fewer samples than one batch has
            yield from order[batch * self.batch_size : (batch + 1) * self.batch_size]

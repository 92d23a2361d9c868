"""A weight matrix of a model whose tensors can be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpocli.hf.matrices import Matrix


@dataclass(frozen=True)
class Weight(Matrix[torch.dtype]):
    """A weight matrix of the model. `follower_keys` are the keys of the members after the first, which the files need
    not hold; `sources` those of the tensors that it is read from, more than one where loading puts it together."""

    follower_keys: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def oriented(self, matrix: Tensor) -> Tensor:
        """O×I from what its layer stores, or back: GPT-2's `Conv1D` holds the transpose."""
        return matrix.T if self.kind == "conv1d" else matrix

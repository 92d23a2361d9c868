"""Which vectors of a layer's input stand for tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def spread(mask: Tensor, leading: Sequence[int], *, length_first: bool = False) -> Tensor | None:
    """A mask of tokens (B, L), zero or False where one is padding, as booleans in the shape `leading` of a layer's
    vectors; None for a shape that does not say which vector is which token's.

    Most models have (B, L), OPT all tokens in one dimension, XLNet (L, B), which `length_first` tells where B = L.
    More than L in a row are those of a model that pads its input by itself, on the right (Longformer).

    >>> spread(torch.tensor([[1, 0]]), (1, 4))
    tensor([[ True, False, False, False]])
    """
    real, leading = mask != 0, tuple(leading)
    rows, length = mask.shape
    if leading == (rows, length) and not (length_first and rows == length):
        return real
    if leading == (length, rows):
        return real.T
    if leading == (math.prod(mask.shape),):
        return real.reshape(-1)
    if len(leading) == 2 and leading[0] == rows and leading[1] > length:
        return torch.nn.functional.pad(real, (0, leading[1] - length))
    return None

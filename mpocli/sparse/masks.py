"""Which entries of a matrix a mask keeps: an exact number of the largest, anywhere, per row or per group.

Masks are boolean, True = kept. Equal scores are pruned in the order of their position, so that the number of zeros
is exact and equal inputs give equal masks on every device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mpocli.errors import InputError, NumericsError


@dataclass(frozen=True)
class Pattern:
    """`unstructured`, or N:M: at most `keep` non-zeros in every `group` neighbours along the input dimension.

    >>> Pattern.parse("2:4"), Pattern.parse("2:4").sparsity
    (Pattern(keep=2, group=4), 0.5)
    """

    keep: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises `InputError` for anything but `unstructured` and N:M with 0 < N < M."""
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise InputError(f"pattern {text!r} is not known", hint="unstructured, or N:M such as 2:4 and 4:8")
        return cls(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float | None:
        """What the pattern alone says, None for `unstructured`."""
        return None if self.keep is None or self.group is None else 1 - self.keep / self.group

    def mask(self, scores: Tensor, zeros: int) -> Tensor:
        """The mask of an (O, I) matrix: without `zeros` entries anywhere, or N:M, which says itself how many."""
        if self.keep is None or self.group is None:
            return smallest_mask(scores, zeros)
        return n_of_m_mask(scores, self.keep, self.group)

    def __str__(self) -> str:
        return "unstructured" if self.keep is None else f"{self.keep}:{self.group}"


def zeros_in(numel: int, sparsity: float) -> int:
    """⌊numel · sparsity⌋, not spoiled by the rounding of the product.

    >>> zeros_in(100, 0.29), zeros_in(10, 0.75), zeros_in(7, 1.0)
    (29, 7, 7)
    """
    return min(numel, math.floor(numel * sparsity * (1 + 1e-12)))


def smallest_mask(scores: Tensor, zeros: int) -> Tensor:
    """The mask that prunes the `zeros` smallest entries, of equals the first ones.

    Scores of any shape and memory layout; the mask is contiguous. The threshold is found by selection, O(n), not by
    sorting (PST's published code sorts every matrix in every forward pass). Raises `NumericsError` for NaN.

    >>> smallest_mask(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 1)
    tensor([[ True, False],
            [ True,  True]])
    """
    flat = scores.reshape(-1)
    mask = torch.ones(flat.shape, dtype=torch.bool, device=scores.device)
    if zeros >= flat.numel():
        return ~mask.reshape(scores.shape)
    if zeros > 0:
        threshold = torch.kthvalue(flat, zeros).values
        mask = flat > threshold
        spare = flat.numel() - zeros - int(mask.sum())  # kept entries that equal the threshold
        if spare:
            if bool(torch.isnan(flat).any()):  # it compares as nothing, so that it is never counted above
                raise NumericsError("a score is NaN", hint="lower the learning rates")
            ties = torch.nonzero(flat == threshold).reshape(-1)
            mask[ties[len(ties) - spare :]] = True
    return mask.reshape(scores.shape)


def rowwise_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Prune the smallest entries of every row, ⌊n·s⌋ in the whole (O, I) matrix, spread as evenly as they can be."""
    rows, columns = scores.shape
    shares = [zeros_in(columns * row, sparsity) for row in range(rows + 1)]
    counts = torch.tensor([b - a for a, b in pairwise(shares)], device=scores.device)
    order = torch.argsort(scores, dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(columns, device=scores.device).expand_as(order))
    return ranks >= counts[:, None]


def n_of_m_mask(scores: Tensor, keep: int, group: int) -> Tensor:
    """Keep the `keep` largest of every `group` neighbours in a row of an (O, I) matrix, of equals the last ones.

    Raises `InputError` where I is no multiple of the group.
    """
    rows, columns = scores.shape
    if columns % group:
        raise InputError(f"{columns} input columns are no multiple of {group}", hint="choose another ‹pattern›")
    groups = scores.reshape(rows, columns // group, group)
    order = torch.argsort(groups, dim=-1, stable=True)
    places = torch.arange(group, device=scores.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, places)
    return (ranks >= group - keep).reshape(rows, columns)


def global_masks(scores: Sequence[Tensor], zeros: int) -> list[Tensor]:
    """One threshold over several matrices: prune the `zeros` smallest entries of all of them together."""
    together = smallest_mask(torch.cat([part.reshape(-1) for part in scores]), zeros)
    parts = together.split([part.numel() for part in scores])
    return [mask.reshape(part.shape) for mask, part in zip(parts, scores, strict=True)]


def most_in_group(matrix: Tensor, group: int) -> int:
    """The largest number of non-zeros in `group` neighbours of a row, the last group of a row being what is left."""
    rows = (matrix.reshape(-1, matrix.shape[-1]) != 0).int()
    return max(int(part.sum(1).max()) for part in rows.split(group, dim=1))

"""A weight in sparse training: what it is masked by, and when that is computed anew."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mpocli.config.scoring import Scoring
from mpocli.errors import InputError
from mpocli.nn.straight_through import MaskedUpdate, updated
from mpocli.sparse.masks import Pattern, global_masks, n_of_m_mask, smallest_mask, zeros_in

Layout = Literal["matrix", "transposed", "core"]


class MaskedWeight(nn.Module):
    """Parametrisation of one weight: what its module reads is the masked one.

    For linear layers (`matrix`), GPT-2's Conv1D (`transposed`: it stores Wᵀ) and cores (`core`: (left·out) ×
    (in·right)). The mask is computed when a parameter or the sparsity has changed since the last time, so once an
    optimiser step and never again in evaluation. Scores and masks are float32 whatever autocast says. `sparsity` is a
    buffer: it is in every state dict. With `keep_zeros` the zeros that the weight has are the first to be pruned, and
    stay so.
    """

    def __init__(
        self,
        weight: Tensor,
        layout: Layout,
        scoring: Scoring,
        pattern: Pattern,
        *,
        seed: int | None = None,
        keep_zeros: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.scoring, self.pattern = layout, scoring, pattern
        self.stored_shape = tuple(weight.shape)
        rows, columns = self.to_matrix(weight).shape
        if pattern.group is not None and columns % pattern.group:
            raise InputError(f"{columns} input columns are no multiple of {pattern.group}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(weight.device))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=weight.device))

        rank, score_rank = scoring.rank, scoring.score_rank
        self.u = normal(rows, rank) if rank else None
        self.v = zeros(rank, columns) if rank else None
        self.a = normal(rows, score_rank) if score_rank else None
        self.b = zeros(score_rank, columns) if score_rank else None
        self.r = zeros(rows) if scoring.structured else None
        self.c = zeros(columns) if scoring.structured else None
        self.full = zeros(rows, columns) if scoring.full else None
        self.sparsity: Tensor
        self.register_buffer("sparsity", torch.zeros((), dtype=torch.float64))
        zero = self.to_matrix(weight.detach()) == 0 if keep_zeros else None
        self.zero: Tensor | None
        self.register_buffer("zero", zero, persistent=False)
        self.group: MaskGroup | None = None
        self._mask: Tensor | None = None
        self._state: tuple[object, ...] | None = None
        self._steps = 0
        self.computed = 0  # how often a mask was

    def to_matrix(self, stored: Tensor) -> Tensor:
        """(O, I) from what the module stores."""
        if self.layout == "core":
            left, out, in_, right = stored.shape
            return stored.reshape(left * out, in_ * right)
        return stored.T if self.layout == "transposed" else stored

    def to_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.layout == "transposed" else matrix.reshape(self.stored_shape)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            mask = self.mask(weight)
            matrix = MaskedUpdate.apply(  # type: ignore[no-untyped-call]
                *(self.to_matrix(weight), self.u, self.v, self.a, self.b, self.r, self.c, self.full),
                mask,
                (self.scoring.beta, self.scoring.alpha1, self.scoring.alpha2),
                self.scoring.magnitude and self.scoring.attached,
            )
            return self.to_stored(cast(Tensor, matrix))

    @torch.no_grad()
    def mask(self, weight: Tensor) -> Tensor | None:
        """(O, I) booleans, None where nothing is pruned. Kept until a parameter or the sparsity changes."""
        if self.group is not None:
            return self.group.mask(self)
        state = self.state(weight)
        if state != self._state:
            self._mask = self._compute(weight)
            self._state = state
        return self._mask

    def state(self, weight: Tensor) -> tuple[object, ...]:
        """Equal as long as the mask is the same. In-place changes count up a tensor's version."""
        versions = (p._version for p in self.parameters())
        return (self._steps, self.sparsity._version, id(weight), weight._version, *versions)

    def step(self, sparsity: float) -> None:
        """An optimiser step was made, after which so much is to be sparse. Fused optimisers count no versions up."""
        self.sparsity.fill_(sparsity)
        self._steps += 1

    def _compute(self, weight: Tensor) -> Tensor | None:
        rows, columns = self.to_matrix(weight).shape
        sparsity = float(self.sparsity)
        if self.pattern.group is not None and self.pattern.keep is not None:
            pruned = min(zeros_in(self.pattern.group, sparsity), self.pattern.group - self.pattern.keep)
            if not pruned:
                return None if self.zero is None else ~self.zero
            self.computed += 1
            mask = n_of_m_mask(self.scores(weight), self.pattern.group - pruned, self.pattern.group)
            return mask if self.zero is None else mask & ~self.zero  # a group may have had more zeros
        zeros = max(zeros_in(rows * columns, sparsity), self.zeros())
        if not zeros:
            return None
        self.computed += 1
        return smallest_mask(self.scores(weight), zeros)

    def zeros(self) -> int:
        """How many entries are pruned whatever the schedule says."""
        return 0 if self.zero is None else int(self.zero.sum())

    @torch.no_grad()
    def scores(self, weight: Tensor, *, centred: bool = False) -> Tensor:
        """S (O, I), −∞ where a zero is to stay. `centred` takes the mean off what was learnt, so that matrices can be
        compared."""
        scores = self._scores(weight, centred=centred)
        return scores if self.zero is None else scores.masked_fill(self.zero, -math.inf)

    def _scores(self, weight: Tensor, *, centred: bool) -> Tensor:
        scoring, matrix = self.scoring, self.to_matrix(weight)
        learnt: Tensor | None = self.full
        if self.a is not None and self.b is not None:
            learnt = scoring.alpha1 * (self.a @ self.b)
        if self.r is not None and self.c is not None:
            structured = scoring.alpha2 * (self.r[:, None] + self.c)
            learnt = structured if learnt is None else learnt + structured
        if learnt is not None and centred:
            learnt = learnt - learnt.mean()
        if not scoring.magnitude:
            assert learnt is not None
            return learnt
        size = updated(matrix, self.u, self.v, scoring.beta).abs()
        return size if learnt is None else size + learnt

    def score_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.a, self.b, self.r, self.c, self.full) if p is not None]


class MaskGroup:
    """Several weights under one threshold: `sparsity` of all their entries are pruned, wherever they are.

    Learnt scores are compared after their mean is taken off each matrix: a constant there would move whole matrices
    and cannot be told from the threshold. Magnitudes are compared as they are.
    """

    def __init__(self, members: list[tuple[MaskedWeight, parametrize.ParametrizationList]]) -> None:
        """`members` are parametrisations with the list that holds their weight."""
        self.members = members
        self._masks: dict[int, Tensor | None] = {}
        self._state: tuple[object, ...] | None = None
        for masked, _ in members:
            masked.group = self

    @torch.no_grad()
    def mask(self, of: MaskedWeight) -> Tensor | None:
        pairs = [(masked, owner.original) for masked, owner in self.members]
        state = tuple(masked.state(weight) for masked, weight in pairs)
        if state != self._state:
            count = sum(weight.numel() for _, weight in pairs)
            zeros = max(zeros_in(count, float(of.sparsity)), sum(masked.zeros() for masked, _ in pairs))
            if zeros:
                masks = global_masks([masked.scores(weight, centred=True) for masked, weight in pairs], zeros)
                self._masks = {id(masked): mask for (masked, _), mask in zip(pairs, masks, strict=True)}
                of.computed += 1
            else:
                self._masks = {}
            self._state = state
        return self._masks.get(id(of))


def mask_weight(
    module: nn.Module,
    leaf: str,
    layout: Layout,
    scoring: Scoring,
    pattern: Pattern,
    *,
    seed: int | None = None,
    keep_zeros: bool = False,
) -> MaskedWeight:
    """Put a weight of a module under a mask. Optimisers must be built afterwards; the weight is frozen where the update
    is low-rank."""
    weight = cast(nn.Parameter, getattr(module, leaf))
    masked = MaskedWeight(weight, layout, scoring, pattern, seed=seed, keep_zeros=keep_zeros)
    weight.requires_grad_(scoring.rank == 0)
    parametrize.register_parametrization(module, leaf, masked, unsafe=True)
    return masked


def holder(module: nn.Module, leaf: str) -> parametrize.ParametrizationList:
    """What holds a masked weight and its parametrisation."""
    lists = cast(nn.ModuleDict, module.parametrizations)
    return cast(parametrize.ParametrizationList, lists[leaf])


@torch.no_grad()
def fold_mask(module: nn.Module, leaf: str) -> nn.Parameter:
    """Make the masked weight the weight itself, with its exact zeros, and take mask and scores away."""
    parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
    folded = cast(nn.Parameter, getattr(module, leaf))
    return folded

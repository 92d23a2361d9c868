"""Share one budget of parameters among matrices, so that the sum of their losses is least."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpocli.errors import UsageError


@dataclass(frozen=True)
class Curve:
    """What a matrix loses at a size: `params` strictly growing, `losses` falling with them."""

    params: tuple[int, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(cls, options: Sequence[tuple[int, float]]) -> Curve:
        """Of (parameters, loss) in any order, without options that cost more and lose no less."""
        params: list[int] = []
        losses: list[float] = []
        for size, loss in sorted(options):
            if losses and loss >= losses[-1]:
                continue
            if params and size == params[-1]:
                losses[-1] = loss
                continue
            params.append(size)
            losses.append(loss)
        return cls(tuple(params), tuple(losses))

    @property
    def options(self) -> list[tuple[int, float]]:
        """(parameters, loss), smallest first."""
        return list(zip(self.params, self.losses, strict=True))

    def loss_within(self, params: int) -> float:
        """The smallest loss of at most so many parameters, infinite where every option has more."""
        count = bisect.bisect_right(self.params, params)
        return self.losses[count - 1] if count else math.inf

    def hull(self) -> list[int]:
        """Positions of the lower convex hull, smallest first: between them no option pays."""
        corners: list[int] = []
        for k in range(len(self.params)):
            while len(corners) > 1 and self.gain(corners[-2], corners[-1]) <= self.gain(corners[-1], k):
                corners.pop()
            corners.append(k)
        return corners

    def gain(self, a: int, b: int) -> float:
        """Loss taken off for one parameter more, from option a to option b."""
        return (self.losses[a] - self.losses[b]) / (self.params[b] - self.params[a])


def allocate(curves: Sequence[Curve], budget: int) -> list[int]:
    """The option of every curve with the smallest sum of losses within `budget` parameters.

    Steps along the lower convex hulls in the order of what a parameter gains, the Lagrange solution: optimal for every
    budget at which it ends with a step. What is left then, less than the next step costs, goes to the options that
    gain most for a parameter among all that still fit, off the hull too.

    Raises `UsageError` where the smallest options take more than the budget.

    >>> allocate([Curve((1, 2, 4), (9.0, 4.0, 2.0)), Curve((1, 3), (5.0, 1.0))], 5)
    [1, 1]
    """
    chosen = [0] * len(curves)
    used = sum(curve.params[0] for curve in curves)
    if used > budget:
        raise UsageError(
            f"a budget of {budget:,} parameters: the smallest form of what is selected has {used:,}",
            hint="raise the budget, or choose fewer matrices",
        )
    hulls = [curve.hull() for curve in curves]
    corner = [0] * len(curves)
    heap: list[tuple[float, int]] = []

    def offer(k: int) -> None:
        if corner[k] + 1 < len(hulls[k]):
            heapq.heappush(heap, (-curves[k].gain(hulls[k][corner[k]], hulls[k][corner[k] + 1]), k))

    for k in range(len(curves)):
        offer(k)
    while heap:
        _, k = heapq.heappop(heap)
        step = hulls[k][corner[k] + 1]
        cost = curves[k].params[step] - curves[k].params[chosen[k]]
        if used + cost > budget:
            continue  # smaller steps of others may still fit
        used += cost
        corner[k] += 1
        chosen[k] = step
        offer(k)
    return _filled(curves, chosen, budget - used)


def _filled(curves: Sequence[Curve], chosen: list[int], left: int) -> list[int]:
    chosen = list(chosen)
    while True:
        best: tuple[float, int, int] | None = None
        for k, curve in enumerate(curves):
            now = chosen[k]
            last = bisect.bisect_right(curve.params, curve.params[now] + left) - 1
            for option in range(now + 1, last + 1):
                gain = curve.gain(now, option)
                if best is None or gain > best[0]:
                    best = gain, k, option
        if best is None:
            return chosen
        _, k, option = best
        left -= curves[k].params[option] - curves[k].params[chosen[k]]
        chosen[k] = option

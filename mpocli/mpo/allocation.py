"""Share one budget, of parameters or of bytes, among matrices, so that the sum of their losses is least."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpocli.errors import UsageError


@dataclass(frozen=True)
class Curve:
    """What a matrix loses at a size in parameters or bytes: `sizes` strictly growing, `losses` falling with them."""

    sizes: tuple[int, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(cls, options: Sequence[tuple[int, float]]) -> Curve:
        """From (size, loss) in any order, without options that cost more and lose no less."""
        sizes: list[int] = []
        losses: list[float] = []
        for size, loss in sorted(options):
            if losses and loss >= losses[-1]:
                continue
            if sizes and size == sizes[-1]:
                losses[-1] = loss
                continue
            sizes.append(size)
            losses.append(loss)
        return cls(tuple(sizes), tuple(losses))

    @property
    def options(self) -> list[tuple[int, float]]:
        """(size, loss), smallest first."""
        return list(zip(self.sizes, self.losses, strict=True))

    def loss_within(self, size: int) -> float:
        """The smallest loss at this size or below, infinite where every option takes more."""
        count = bisect.bisect_right(self.sizes, size)
        return self.losses[count - 1] if count else math.inf

    def hull(self) -> list[int]:
        """Positions of the lower convex hull, smallest first: between them no option pays."""
        corners: list[int] = []
        for k in range(len(self.sizes)):
            while len(corners) > 1 and self.gain(corners[-2], corners[-1]) <= self.gain(corners[-1], k):
                corners.pop()
            corners.append(k)
        return corners

    def gain(self, a: int, b: int) -> float:
        """Loss taken off by one parameter or byte more, from option a to option b."""
        return (self.losses[a] - self.losses[b]) / (self.sizes[b] - self.sizes[a])


def allocate(curves: Sequence[Curve], budget: int, unit: str) -> list[int]:
    """The option of every curve with the smallest sum of losses within `budget`, whose `unit` is what
    messages call it: parameters or bytes.

    Steps along the lower convex hulls in the order of what one of them gains, the Lagrange solution: optimal for every
    budget at which it ends with a step. What is left then, less than the next step costs, goes to the options that
    gain most for one more among all that still fit, off the hull too.

    Raises `UsageError` where the smallest options take more than the budget.

    >>> allocate([Curve((1, 2, 4), (9.0, 4.0, 2.0)), Curve((1, 3), (5.0, 1.0))], 5, "parameters")
    [1, 1]
    """
    chosen = [0] * len(curves)
    used = sum(curve.sizes[0] for curve in curves)
    if used > budget:
        raise UsageError(
            f"a budget of {budget:,} {unit}: the smallest form of what is selected takes {used:,}",
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
        cost = curves[k].sizes[step] - curves[k].sizes[chosen[k]]
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
            last = bisect.bisect_right(curve.sizes, curve.sizes[now] + left) - 1
            for option in range(now + 1, last + 1):
                gain = curve.gain(now, option)
                if best is None or gain > best[0]:
                    best = gain, k, option
        if best is None:
            return chosen
        _, k, option = best
        left -= curves[k].sizes[option] - curves[k].sizes[chosen[k]]
        chosen[k] = option

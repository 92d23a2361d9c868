"""The learning rate over a run's steps, and where in it a segment stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` steps, then linearly to zero at `total`; `first` steps are behind this segment.

    >>> [round(Schedule(10, 2).factor(step), 2) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    total: int
    warmup: int
    first: int = 0

    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by at a step of this segment."""
        step += self.first
        if step < self.warmup:
            return step / self.warmup
        return max(0.0, (self.total - step) / max(1, self.total - self.warmup))


@dataclass(frozen=True)
class SegmentPlace:
    """The place of a segment of known length in a chain of segments.

    `number` seeds dropout and masks; the examples of the `first_step` steps before it are not seen again.
    """

    number: int
    first_step: int

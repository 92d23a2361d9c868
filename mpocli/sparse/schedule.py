"""How sparsity rises during training."""

from __future__ import annotations

from dataclasses import dataclass

from mpocli.errors import UsageError


@dataclass(frozen=True)
class CubicSchedule:
    """Cubic rise from `initial` to `final` sparsity over `total` steps (PST, IJCAI 2022; Zhu and Gupta, 2017).

    With w_i, w_f the shares of steps before and after the rise, at step t:
    s = s_f + (s_i − s_f) (1 − (t − w_i T)/(T − (w_i + w_f) T))³ between them. Raises `UsageError` for shares that
    leave no room and sparsities outside [0, 1).

    >>> schedule = CubicSchedule(100, 0.9, 0.0, 0.1, 0.3)
    >>> [round(schedule.at(step), 4) for step in (10, 11, 25, 40, 55, 69, 70, 100)]
    [0.0, 0.0443, 0.5203, 0.7875, 0.8859, 0.9, 0.9, 0.9]
    """

    total: int
    final: float = 0.9
    initial: float = 0.0
    initial_warmup: float = 0.1
    final_warmup: float = 0.3

    def __post_init__(self) -> None:
        for option, share in (("initial-warmup", self.initial_warmup), ("final-warmup", self.final_warmup)):
            if not 0 <= share < 1:
                raise UsageError(f"--{option} {share}: must be at least 0 and below 1", hint="it is a share of steps")
        if self.initial_warmup + self.final_warmup >= 1:
            raise UsageError(
                f"‹initial_warmup› {self.initial_warmup} and ‹final_warmup› {self.final_warmup}: together "
                f"{self.initial_warmup + self.final_warmup:g}, must be below 1",
                hint="sparsity rises in what is left between them",
            )
        if not 0 <= self.initial <= self.final < 1:
            raise UsageError(
                f"‹initial_sparsity› {self.initial}, ‹sparsity› {self.final}: 0 ≤ initial ≤ final < 1 was expected",
                hint="write 90 % as 0.9",
            )

    def at(self, step: int) -> float:
        """Sparsity after `step` optimiser steps."""
        before, after = self.initial_warmup * self.total, self.final_warmup * self.total
        if step > self.total - after or step >= self.total:
            return self.final
        if step <= before:
            return self.initial
        progress = (step - before) / (self.total - before - after)
        return self.final + (self.initial - self.final) * (1 - progress) ** 3

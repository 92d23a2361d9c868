"""How many steps a run takes, and the learning rate over them."""

from __future__ import annotations

import math
from typing import Protocol

from mpocli.config.optimisation import Optimisation
from mpocli.train.loop.schedule import Schedule


class Counted(Protocol):
    """The options that say how long a command trains."""

    @property
    def optimisation(self) -> Optimisation: ...
    @property
    def epochs(self) -> float: ...
    @property
    def steps(self) -> int | None: ...


def steps_of(config: Counted, samples: int, processes: int) -> int:
    """`steps`, or as many as `epochs` take."""
    chosen = config.optimisation
    per_epoch = math.ceil(samples / (chosen.batch_size * processes * chosen.accumulation))
    return config.steps or max(1, math.ceil(config.epochs * per_epoch))


def warmed_up(optimisation: Optimisation, total: int, first: int = 0) -> Schedule:
    """A schedule of `total` steps whose first share warms up; `first` of them are behind it."""
    return Schedule(total, math.ceil(optimisation.warmup * total), first)

"""One segment of a run's training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mpocli.methods.training.run import TrainingRun
from mpocli.train.loop.checkpoints import last_checkpoint
from mpocli.train.loop.metrics_file import METRICS, MetricsFile
from mpocli.train.loop.schedule import Schedule
from mpocli.train.loop.segment import train_segment
from mpocli.train.loop.steps import Steps
from mpocli.train.loop.trainer import SegmentTrainer


def fit(
    run: TrainingRun,
    schedule: Schedule,
    *,
    steps: int | None = None,
    model: Any = None,
    segment: str = "",
    callbacks: Sequence[Any] = (),
    is_logged: bool = True,
    shown: int | None = None,
    **how: Any,
) -> SegmentTrainer:
    """Train the run's student (or another `model`) to the schedule's end, or for so many `steps` of it.

    A `segment` keeps its checkpoints in a directory of its own; where there is one, it goes on from the newest. Logged
    is to `metrics.jsonl`, and progress told of all the `shown` steps that the segment's are part of. `how` is for
    `SegmentTrainer`, which is returned.
    """
    directory = run.directory / segment
    own: list[Any] = [MetricsFile(run.directory / METRICS, schedule.first)] if is_logged else []
    own += [Steps(run.progress, schedule.first, shown or schedule.total)] if run.progress else []
    began = time.perf_counter()
    trainer = SegmentTrainer(
        run.student if model is None else model,
        run.data.train,
        run.data.collator(run.optimisation.seed),
        run.optimisation,
        schedule,
        schedule.total - schedule.first if steps is None else steps,
        directory,
        device=run.device,
        callbacks=[*callbacks, *own],  # one may add to what is logged
        next_token=run.data.family == "causal",
        **how,
    )
    train_segment(trainer, last_checkpoint(directory))
    run.step_seconds += time.perf_counter() - began
    return trainer

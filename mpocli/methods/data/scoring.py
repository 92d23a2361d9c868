"""A model's metrics on a task's data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpocli.config.data import DataOptions
from mpocli.methods.data.reader import EvalSet
from mpocli.methods.data.task import TaskData
from mpocli.progress import StepProgress
from mpocli.train.evaluate.predict import Run, run_examples, run_generation, run_windows, score


def run_set(
    model: Any,
    data: TaskData,
    found: EvalSet,
    options: DataOptions,
    *,
    progress: StepProgress | None = None,
) -> Run:
    """A model over one evaluation set."""
    shared: dict[str, Any] = {
        "batch_size": options.eval_batch_size,
        "precision": options.precision,
        "progress": progress,
    }
    if found.windows is not None:
        return run_windows(model, data.vocabulary, found.windows, data.family, **shared)
    if data.task.kind == "text2text":
        return run_generation(
            model,
            data.vocabulary,
            found.features,
            family=data.family,
            max_new_tokens=options.max_new_tokens,
            **shared,
        )
    return run_examples(model, data.vocabulary, found.features, data.task, **shared)


def evaluate(model: Any, data: TaskData, options: DataOptions, *, split: str = "eval") -> dict[str, float]:
    """The task's metrics on a split of the data; `{}` where there is none."""
    metrics: dict[str, float] = {}
    for found in getattr(data, split):
        run = run_set(model, data, found, options)
        metrics |= score_set(data, found, run)
    return metrics


def score_set(data: TaskData, found: EvalSet, run: Run) -> dict[str, float]:
    """The metrics of a run over one set; those that MNLI's second set gives are marked `_mm`."""
    task = replace(data.task, metrics=tuple(m for m in data.task.metrics if not m.endswith("_mm")))
    return score(task, data.family, run, found.labels, suffix=found.suffix)

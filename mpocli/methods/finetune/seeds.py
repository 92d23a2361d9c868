"""Runs of `finetune` that differ by their seed alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mpocli.config.finetune import FinetuneConfig
from mpocli.errors import InputError
from mpocli.io.files import OutputFile
from mpocli.io.output import check_output
from mpocli.io.totals import Totals
from mpocli.methods.finetune.overparam import OverparamReport
from mpocli.methods.finetune.run import FinetuneReport, run
from mpocli.methods.training.directory import training_directory
from mpocli.progress import Progress


@dataclass(frozen=True)
class SeedsReport:
    """Several runs that differ by their seed alone; `metrics` are means over them, `metrics_std` their spread."""

    out: str
    seeds: tuple[int, ...]
    metrics: dict[str, float]
    metrics_std: dict[str, float]
    metrics_before: dict[str, float]
    trainable_params: int
    totals: Totals
    runs: tuple[FinetuneReport, ...]


def summary(out: str, seeds: tuple[int, ...], reports: Sequence[FinetuneReport]) -> SeedsReport:
    """Mean and sample standard deviation of every metric over the seeds."""
    names = reports[0].metrics
    values = {name: [report.metrics[name] for report in reports] for name in names}
    before = [report.metrics_before for report in reports]
    return SeedsReport(
        out=out,
        seeds=seeds,
        metrics={name: statistics.mean(found) for name, found in values.items()},
        metrics_std={name: statistics.stdev(found) if len(found) > 1 else 0.0 for name, found in values.items()},
        metrics_before={name: statistics.mean(found[name] for found in before) for name in before[0]},
        trainable_params=reports[0].trainable_params,
        totals=reports[0].totals,
        runs=tuple(reports),
    )


def run_seeds(
    model: str,
    config: FinetuneConfig,
    out: Path,
    seeds: tuple[int, ...],
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> tuple[FinetuneReport, ...]:
    """One run a seed, in `out/seed-<k>`. Finished ones are not run again by `resume`."""
    places = {seed: out / f"seed-{seed}" for seed in seeds}
    finished = {seed: place.with_name(f"{place.name}.report.json") for seed, place in places.items()}
    if not resume:
        for seed, place in places.items():  # before hours of training, not after
            check_output(place, None, overwrite=overwrite)
            if finished[seed].exists() and not overwrite:
                raise InputError(f"{finished[seed]}: exists", hint="--resume goes on, --overwrite begins anew")
    elif not any(finished[seed].is_file() or training_directory(places[seed]).is_dir() for seed in seeds):
        raise InputError(f"{out}: no interrupted runs to resume", hint="run without --resume")
    reports = []
    for seed, place in places.items():
        if resume and finished[seed].is_file() and place.is_dir():
            reports.append(_read_report(finished[seed]))
            continue
        one = replace(config, optimisation=replace(config.optimisation, seed=seed))
        begun = training_directory(place).exists()
        reports.append(
            run(model, one, place, overwrite=overwrite, resume=resume and begun, progress=progress, warn=warn)
        )
        if reports[-1].is_writer:
            record = OutputFile("--seeds", finished[seed], overwrite=True)
            record.write_text(json.dumps(asdict(reports[-1])))
    if reports[-1].is_writer:
        for path in finished.values():
            path.unlink(missing_ok=True)
    return tuple(reports)


def _read_report(path: Path) -> FinetuneReport:
    values = json.loads(path.read_text())
    found = values["overparam"]
    values["totals"] = Totals(**values["totals"])
    values["overparam"] = found and OverparamReport.from_dict(found)
    return FinetuneReport(**values)

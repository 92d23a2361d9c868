"""decompose: turn chosen weight matrices of a checkpoint into MPOs, one matrix in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpocli.config.decompose import DecomposeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.io.apart import check_apart
from mpocli.io.claim import writes_output
from mpocli.io.encodings.known import Encodings, widened
from mpocli.io.output import check_output, output_directory
from mpocli.io.scratch import scratch_directory
from mpocli.io.totals import Totals
from mpocli.methods.decompose.cores import Decomposer
from mpocli.methods.decompose.decide import decide
from mpocli.methods.decompose.plan import WeightPlan, plan
from mpocli.methods.decompose.report import ModuleReport, module_reports
from mpocli.methods.inputs import paths_read
from mpocli.methods.planner.compare import Compared
from mpocli.methods.rewrite import Rewriting
from mpocli.progress import Progress


@dataclass(frozen=True)
class DecomposeReport:
    out: str | None
    seconds: float
    dry_run: bool
    totals: Totals
    before: Totals
    modules: tuple[ModuleReport, ...]
    filled: int = 0  # sparse matrices whose zeros are gone, since they became MPOs
    widened: int = 0  # tensors in few bits that became, or were cut to, cores that are not
    base_model: dict[str, Any] = field(default_factory=dict)
    architecture: str = "AutoModel"
    warnings: tuple[str, ...] = ()
    compared: tuple[Compared, ...] = ()


@writes_output
def run(
    model: str,
    config: DecomposeConfig,
    out: Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> DecomposeReport:
    """Decompose a checkpoint into a new directory `out` (or, with `dry_run`, only say what it would hold).

    `progress(done, total, name)` is called after each matrix. Raises `UsageError` for options that contradict
    one another, `InputError` for a model, shape or glob that cannot be used, `NumericsError` where a matrix
    cannot be stored in the asked dtype. Nothing is written in any of these cases.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint.open(model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    reads = paths_read(checkpoint.source.directory, config)
    measured = {"--sensitivity": config.budget.sensitivity if config.budget else None}
    check_apart(measured, reads)
    if not dry_run:
        check_output(out, reads, overwrite=overwrite, writes=measured)
    plans = plan(checkpoint, config)
    warnings: list[str] = []
    compared: tuple[Compared, ...] = ()
    with scratch_directory(None if dry_run else out) as folder:
        if config.budget is not None:

            def size_of(plans: Sequence[WeightPlan]) -> int:
                worker = Decomposer(checkpoint, config, plans, reads=False)
                return _rewriting(worker).dry_run(config.max_shard_bytes)[1].bytes

            decision = decide(checkpoint, config, plans, folder, size_of, progress=progress, warn=warnings.append)
            plans, compared = decision.plans, decision.compared
        # Without a tolerance all sizes follow from the shapes, and a dry run needs no data.
        worker = Decomposer(checkpoint, config, plans, reads=not dry_run or bool(config.rel_tol))
        rewriting, most = _rewriting(worker, progress), config.max_shard_bytes
        if dry_run:
            manifest, totals = rewriting.dry_run(most)
        else:
            with output_directory(out) as work:
                manifest, totals = rewriting.write(work, "decompose", config.recorded(), config.seed, most)
    return DecomposeReport(
        out=None if dry_run else str(out),
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        totals=totals,
        before=checkpoint.totals(),
        modules=module_reports(plans, manifest, worker.kept, config.dtype, checkpoint.reader),
        filled=_with_zeros(checkpoint.encodings) - _with_zeros(manifest.encodings),
        widened=widened(checkpoint.encodings, manifest.encodings),
        base_model={} if dry_run else checkpoint.base_model(),
        architecture=checkpoint.architecture,
        warnings=tuple(warnings),
        compared=compared,
    )


def _rewriting(worker: Decomposer, progress: Progress | None = None) -> Rewriting:
    """The way through the files on which the worker is asked for every weight that its plans change."""
    return Rewriting(
        worker.checkpoint,
        [plan.weight for plan in worker.plans.values()],
        worker.stored,
        dtype=worker.config.dtype,
        checks=True,
        reads=worker.reads,
        progress=progress,
    )


def _with_zeros(encodings: Encodings) -> int:
    return sum(encoding.holds_zeros for encoding in encodings.values())

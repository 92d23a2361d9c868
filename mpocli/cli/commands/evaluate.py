"""`mpocli eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mpocli.cli import options
from mpocli.config.common import Json, Model
from mpocli.config.evaluate import EvalConfig
from mpocli.config.tasks import task_named
from mpocli.errors import TargetNotMetError, UsageError

if TYPE_CHECKING:
    from mpocli.hf.sparse_paths import PathReport
    from mpocli.methods.evaluate.harness import HarnessReport
    from mpocli.methods.evaluate.run import EvalReport


def command(
    model: Model,
    config: EvalConfig,
    json: Json = False,
) -> None:
    """Measure a checkpoint: the task's metrics, parameters, bytes, memory, latency.

    Perplexity is over non-overlapping windows of --max-length tokens, the last
    partial one counted; words are whitespace tokens plus one per line.

    [bold]Examples[/bold]

      mpocli eval mpo --task sst2 --eval dev.tsv --max-drop accuracy=0.01 \\
      --baseline dense

      mpocli eval gpt2-mpo --task lm --eval wiki.test.txt --max-length 1024
    """
    if config.lm_eval is not None:
        _run_harness(model, config, json=json)
        return
    data = config.data_options()
    if data is not None:
        options.check_sources(data)
        data = replace(data, precision=options.precision_of(data.precision, config.device))
        _check_names(data.task, config)

    from mpocli.cli import bars, console
    from mpocli.hf import quiet
    from mpocli.methods.evaluate import run as method

    with quiet.transformers(), bars.progress_bar("eval") as progress:
        report = method.run(
            model,
            data,
            baseline=config.baseline,
            predictions=config.predictions,
            overwrite=config.overwrite,
            device=config.device,
            path=config.path,
            memory=config.memory,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            progress=progress,
        )
    console.report("eval", report, lambda: _show(report), json=json)
    _check_gates(report, config)


def _check_names(task: str, config: EvalConfig) -> None:
    """Before an evaluation, not after it."""
    known = task_named(task).metrics
    for name, _ in (*config.fail_below, *config.max_drop):
        if name not in known:
            raise UsageError(f"no metric {name!r} is measured for --task {task}", hint=f"there are {', '.join(known)}")


def _check_gates(report: EvalReport | HarnessReport, config: EvalConfig) -> None:
    from mpocli.methods.evaluate.gates import check_gates

    missed = check_gates(report, config.fail_below, config.max_drop)
    if missed:
        raise TargetNotMetError("; ".join(missed), hint="compress less, or fine-tune longer")


def _run_harness(model: str, config: EvalConfig, *, json: bool) -> None:
    from mpocli.cli import console
    from mpocli.methods.evaluate import harness as method

    assert config.lm_eval is not None
    harness = method.HarnessOptions(
        tasks=config.lm_eval,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=config.batch_size,
        max_length=config.max_length,
        precision=config.precision,
        device=config.device,
        tokenizer=config.tokenizer,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    report = method.run(model, harness, baseline=config.baseline)
    console.report("eval", report, lambda: _show_harness(report), json=json)
    _check_gates(report, config)


def _show_harness(report: HarnessReport) -> None:
    from mpocli.cli import console, tables, wording

    other = report.baseline
    table = tables.table("", "model", *(("baseline",) if other else ()))
    for name, value in report.metrics.items():
        theirs = other.metrics.get(name) if other else None
        table.add_row(
            name, wording.metric(value), *(("" if theirs is None else wording.metric(theirs),) if other else ())
        )
    table.add_section()
    for name in ("params", "bytes"):
        shown = wording.size if name == "bytes" else wording.count
        cells = (shown(getattr(arm.totals, name)) for arm in (report, other) if arm)
        table.add_row({"params": "parameters"}.get(name, name), *cells)
    tables.show(table)
    console.out.print(f"{report.samples:,} samples of {', '.join(report.tasks)}", style="dim")


def _show(report: EvalReport) -> None:
    from mpocli.cli import console, tables, wording

    other = report.baseline
    table = tables.table("", "model", *(("baseline",) if other else ()))

    def row(name: str, mine: str, theirs: str | None) -> None:
        table.add_row(name, mine, *((theirs or "",) if other else ()))

    for name, value in report.metrics.items():
        row(name, f"{value:.4f}", f"{other.metrics[name]:.4f}" if other else None)
    if report.metrics:
        table.add_section()
    row("parameters", wording.count(report.totals.params), wording.count(other.totals.params) if other else None)
    row("bytes", wording.size(report.totals.bytes), wording.size(other.totals.bytes) if other else None)
    speeds = report.speed, other.speed if other else None
    if speeds[0]:
        pairs = [speed or None for speed in speeds]
        row("p50 per batch", *[f"{s.batch_seconds_p50 * 1e3:.1f} ms" if s else "" for s in pairs])
        row("tokens / s", *[f"{s.tokens_per_second:,.0f}" if s else "" for s in pairs])
        row("weights in memory", *[wording.size(s.weights_bytes) if s else "" for s in pairs])
        row("peak of the process", *[wording.size(s.peak_memory_bytes) if s else "" for s in pairs])
    tables.show(table)
    if report.metrics:
        console.out.print(f"{report.samples:,} {'windows' if report.task == 'lm' else 'samples'}", style="dim")
    if report.agreement:
        words = {"labels": "equal labels", "tokens": "equal likeliest tokens", "equal_texts": "equal texts"}
        said = [f"{words.get(name, name)} {value:.4f}" for name, value in report.agreement.items()]
        console.out.print("agreement with the baseline: " + ", ".join(said))
    _show_paths(report.paths, "sparse layers")
    _show_paths(other.paths if other else (), "the baseline's")
    if report.truncated:
        console.err.print(f"{report.truncated:,} examples were cut to --max-length", style="yellow")


def _show_paths(paths: Sequence[PathReport], title: str) -> None:
    """Nothing where no layer is sparse."""
    from mpocli.cli import tables, wording

    if not paths:
        return
    table = tables.table(title, "zeros", "modules", "tokens", "dense ms", "sparse ms", "<path")
    for found in paths:
        sparse = "none" if found.sparse_seconds is None else f"{found.sparse_seconds * 1e3:.3f}"
        shape = f"{found.shape[0]}x{found.shape[1]}"
        numbers = f"{found.sparsity:.1%}", wording.count(found.modules), wording.count(found.tokens)
        table.add_row(shape, *numbers, f"{found.dense_seconds * 1e3:.3f}", sparse, found.path)
    tables.show(table)

"""`mpocli eval`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mpocli.cli import options
from mpocli.cli import task_options as task_
from mpocli.errors import TargetNotMetError, UsageError
from mpocli.modes import ALWAYS, excludes, needs

if TYPE_CHECKING:
    from mpocli.hf.sparse_paths import PathChoice, PathReport
    from mpocli.methods.evaluate import EvalReport
    from mpocli.methods.harness import HarnessOptions, HarnessReport

GATES = "Gates for CI (exit 5)"
HARNESS = "EleutherAI's harness"
TASKED = needs("--task")
HARNESSED = needs("--lm-eval")
DATA_OR_HARNESS = needs("--task", "--lm-eval", why="nothing is measured")


def command(
    model: options.Model,
    task: Annotated[task_.TaskName, excludes("--lm-eval", why="the harness has tasks of its own")] = None,
    evaluate: Annotated[task_.Eval, TASKED] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Measure this one too, side by side."), ALWAYS
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", metavar="FILE", help="Write one JSON line per sample."),
        TASKED,
        excludes("--task lm", why="a language model makes none"),
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-below",
            metavar="METRIC=X",
            help="Worst value that will do: the least, of perplexity the largest.",
            rich_help_panel=GATES,
        ),
        DATA_OR_HARNESS,
    ] = None,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            "--max-drop", metavar="METRIC=X", help="Most that it may be worse than --baseline.", rich_help_panel=GATES
        ),
        needs("--baseline"),
        DATA_OR_HARNESS,
    ] = None,
    text_column: Annotated[task_.TextColumn, TASKED] = None,
    label_column: Annotated[task_.LabelColumn, TASKED] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            metavar="N",
            help="Tokens per example, or per window. Default: 128; of --lm-eval the model's.",
            rich_help_panel=task_.DATA,
        ),
        DATA_OR_HARNESS,
    ] = None,
    tokenizer: Annotated[task_.Tokenizer, DATA_OR_HARNESS] = None,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", metavar="N", help="Examples or windows per batch.", rich_help_panel=task_.DATA),
        DATA_OR_HARNESS,
    ] = 32,
    max_new_tokens: Annotated[task_.NewTokens, TASKED] = 96,
    precision: Annotated[task_.Precision, DATA_OR_HARNESS] = "auto",
    device: Annotated[task_.Device, DATA_OR_HARNESS] = "auto",
    path: Annotated[
        str,
        typer.Option(
            "--path",
            metavar="NAME",
            help="Layers that are mostly zeros: dense or sparse kernels, or auto: the faster, by a short measurement.",
        ),
        TASKED,
    ] = "auto",
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASK,…",
            help="Tasks of EleutherAI's harness instead, where that is installed.",
            rich_help_panel=HARNESS,
        ),
        ALWAYS,
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", metavar="N", help="Examples in a prompt.", rich_help_panel=HARNESS),
        HARNESSED,
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", help="Samples of each task.", rich_help_panel=HARNESS),
        HARNESSED,
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the file of --predictions if it exists."),
        needs("--predictions"),
    ] = False,
    json: options.Json = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure a checkpoint: the task's metrics, parameters, bytes, memory, latency.

    Perplexity is over non-overlapping windows of --max-length tokens, the last
    partial one counted; words are whitespace tokens plus one per line.

    [bold]Examples[/bold]

      mpocli eval mpo --task sst2 --eval dev.tsv --max-drop accuracy=0.01 \\
      --baseline dense

      mpocli eval gpt2-mpo --task lm --eval wiki.test.txt --max-length 1024
    """
    gates = _gates("--fail-below", fail_below), _gates("--max-drop", max_drop)
    options.one_of("--path", path, ("auto", "dense", "sparse"))
    if lm_eval is not None:
        options.at_least("--num-fewshot", num_fewshot, 0)
        for option, number in (("--limit", limit), ("--batch-size", batch_size), ("--max-length", max_length)):
            options.at_least(option, number, 1)
        options.one_of("--precision", precision, ("auto", "fp32", "bf16"))
        tasks = tuple(name.strip() for name in lm_eval.split(",") if name.strip())
        if not tasks:
            raise UsageError(f"--lm-eval {lm_eval!r} names no task", hint="--lm-eval hellaswag, for example")
        from mpocli.methods.harness import HarnessOptions

        harness = HarnessOptions(
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            max_length=max_length,
            precision=precision,
            device=device,
            tokenizer=tokenizer,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        _run_harness(model, harness, baseline, gates, json=json)
        return
    if task is not None and not evaluate:
        raise UsageError("--eval is missing", hint="name the file to evaluate on")
    data = None
    if task is not None:
        data = task_.data_options(
            task,
            evaluate=evaluate,
            text_column=text_column,
            label_column=label_column,
            max_length=128 if max_length is None else max_length,
            eval_batch_size=batch_size,
            batch_option="--batch-size",
            precision=task_.precision_of(precision, device),
            max_new_tokens=max_new_tokens,
            tokenizer=tokenizer,
        )
        _check_names(data.task, gates)

    from mpocli.cli import render
    from mpocli.hf import quiet
    from mpocli.methods import evaluate as method

    with quiet.transformers(), render.progress_bar("eval") as progress:
        report = method.run(
            model,
            data,
            baseline=baseline,
            predictions=predictions,
            overwrite=overwrite,
            device=device,
            path=cast("PathChoice", path),
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    render.report("eval", report, lambda: _show(report), json=json)
    missed = method.check_gates(report, *gates)
    if missed:
        raise TargetNotMetError("; ".join(missed), hint="compress less, or fine-tune longer")


def _gates(option: str, texts: list[str] | None) -> list[tuple[str, float]]:
    found = []
    for text in texts or []:
        name, _, number = text.partition("=")
        try:
            found.append((name.strip(), _value(name, number, option)))
            if not math.isfinite(found[-1][1]):
                raise ValueError
        except (ValueError, UsageError):
            raise UsageError(f"{option} {text!r} cannot be read", hint=f"write it as {option} accuracy=0.85") from None
    return found


def _value(name: str, number: str, option: str) -> float:
    """A metric's bound; metrics from 0 to 1 may be written as a share, as 85%."""
    return float(number) if "perplexity" in name or name.strip() == "bleu" else options.share(number, option)


def _check_names(task: str, gates: tuple[list[tuple[str, float]], ...]) -> None:
    """Before an evaluation, not after it."""
    from mpocli.train.tasks import task_named

    known = task_named(task).metrics
    for name, _ in (gate for found in gates for gate in found):
        if name not in known:
            raise UsageError(f"no metric {name!r} is measured for --task {task}", hint=f"there are {', '.join(known)}")


def _run_harness(
    model: str, harness: HarnessOptions, baseline: str | None, gates: tuple[list[tuple[str, float]], ...], *, json: bool
) -> None:
    from mpocli.cli import render
    from mpocli.methods import evaluate
    from mpocli.methods import harness as method

    report = method.run(model, harness, baseline=baseline)
    render.report("eval", report, lambda: _show_harness(report), json=json)
    missed = evaluate.check_gates(report, *gates)
    if missed:
        raise TargetNotMetError("; ".join(missed), hint="compress less, or fine-tune longer")


def _show_harness(report: HarnessReport) -> None:
    from mpocli.cli import render

    other = report.baseline
    table = render.table("", "model", *(("baseline",) if other else ()))
    for name, value in report.metrics.items():
        theirs = other.metrics.get(name) if other else None
        table.add_row(
            name, render.metric(value), *(("" if theirs is None else render.metric(theirs),) if other else ())
        )
    table.add_section()
    for name in ("params", "bytes"):
        shown = render.size if name == "bytes" else render.count
        cells = (shown(getattr(arm.totals, name)) for arm in (report, other) if arm)
        table.add_row({"params": "parameters"}.get(name, name), *cells)
    render.show(table)
    render.out.print(f"{report.samples:,} samples of {', '.join(report.tasks)}", style="dim")


def _show(report: EvalReport) -> None:
    from mpocli.cli import render

    other = report.baseline
    table = render.table("", "model", *(("baseline",) if other else ()))

    def row(name: str, mine: str, theirs: str | None) -> None:
        table.add_row(name, mine, *((theirs or "",) if other else ()))

    for name, value in report.metrics.items():
        row(name, f"{value:.4f}", f"{other.metrics[name]:.4f}" if other else None)
    if report.metrics:
        table.add_section()
    row("parameters", render.count(report.totals.params), render.count(other.totals.params) if other else None)
    row("bytes", render.size(report.totals.bytes), render.size(other.totals.bytes) if other else None)
    speeds = report.speed, other.speed if other else None
    if speeds[0]:
        pairs = [speed or None for speed in speeds]
        row("p50 per batch", *[f"{s.batch_seconds_p50 * 1e3:.1f} ms" if s else "" for s in pairs])
        row("tokens / s", *[f"{s.tokens_per_second:,.0f}" if s else "" for s in pairs])
        row("peak of the process", *[render.size(s.peak_memory_bytes) if s else "" for s in pairs])
    render.show(table)
    if report.metrics:
        render.out.print(f"{report.samples:,} {'windows' if report.task == 'lm' else 'samples'}", style="dim")
    if report.agreement:
        words = {"labels": "equal labels", "tokens": "equal likeliest tokens", "equal_texts": "equal texts"}
        said = [f"{words.get(name, name)} {value:.4f}" for name, value in report.agreement.items()]
        render.out.print("agreement with the baseline: " + ", ".join(said))
    _show_paths(report.paths, "sparse layers")
    _show_paths(other.paths if other else (), "the baseline's")
    if report.truncated:
        render.err.print(f"{report.truncated:,} examples were cut to --max-length", style="yellow")


def _show_paths(paths: Sequence[PathReport], title: str) -> None:
    """Nothing where no layer is sparse."""
    from mpocli.cli import render

    if not paths:
        return
    table = render.table(title, "zeros", "modules", "tokens", "dense ms", "sparse ms", "<path")
    for found in paths:
        sparse = "none" if found.sparse_seconds is None else f"{found.sparse_seconds * 1e3:.3f}"
        shape = f"{found.shape[0]}x{found.shape[1]}"
        numbers = f"{found.sparsity:.1%}", render.count(found.modules), render.count(found.tokens)
        table.add_row(shape, *numbers, f"{found.dense_seconds * 1e3:.3f}", sparse, found.path)
    render.show(table)

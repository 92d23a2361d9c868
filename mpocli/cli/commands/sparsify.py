"""`mpocli sparsify`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from mpocli.cli import options
from mpocli.config.common import Json, Model, Out, Overwrite, Resume
from mpocli.config.modes import needs
from mpocli.config.sparsify import SparsifyConfig, check_options

if TYPE_CHECKING:
    from mpocli.methods.sparsify.run import SparsifyReport


def command(
    model: Model,
    *,
    out: Out = None,
    config: SparsifyConfig,
    resume: Annotated[Resume, needs("--train", why="nothing is trained")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Set most weights to zero, by training or at once, and store the others.

    Of an MPO checkpoint the central cores are pruned. Files hold one bit for every
    weight and the values that are left; mpocli merge makes them dense again.

    [bold]Examples[/bold]

      mpocli sparsify bert-sst2 --task sst2 --train train.tsv --eval dev.tsv

      mpocli sparsify gpt2 --method magnitude --sparsity 0.5

      mpocli sparsify gpt2 --method sparsegpt --sparsity 0.5 --calibrate wiki.txt
    """
    config = options.ready_to_train(config)
    if config.data is not None:
        config = replace(config, data=replace(config.data, precision=config.optimisation.precision))
    check_options(config)

    from mpocli.cli import bars, console
    from mpocli.hf import quiet
    from mpocli.methods.sparsify import run as sparsify

    destination = out or options.default_out(model, "sparse")
    if not resume:
        options.check_out_before_download(model, destination, overwrite=overwrite)
    bar = bars.training_bar if config.trains else bars.progress_bar
    with options.resumable(destination), quiet.transformers(), bar("sparsify") as progress:
        report = sparsify.run(
            model, config, destination, overwrite=overwrite, resume=resume, progress=progress, warn=console.warn
        )
    if not report.is_writer:
        return
    console.report("sparsify", report, lambda: _show(report), json=json)


def _show(report: SparsifyReport) -> None:
    """What became sparse by role, the files, what was trained, and the metrics."""
    from mpocli.cli import console, tables, wording

    table = tables.table("role", "pruned", "entries", "left", "sparsity", "dense", "stored")
    for role, tensors in wording.by_role(report.tensors):
        entries, zeros = (sum(getattr(tensor, name) for tensor in tensors) for name in ("entries", "zeros"))
        table.add_row(
            role or "other",
            str(len(tensors)),
            f"{entries:,}",
            f"{entries - zeros:,}",
            f"{zeros / entries:.1%}",
            wording.size(sum(tensor.dense_bytes for tensor in tensors)),
            wording.size(sum(tensor.bytes for tensor in tensors)),
        )
    before, after = report.totals_before, report.totals
    table.add_section()
    left = f"{after.params - report.model_zeros:,}"
    sizes = wording.size(before.bytes), wording.size(after.bytes)
    table.add_row(
        "model", "", f"{after.params:,}", left, f"{report.model_zeros / after.params:.1%}", *sizes, style="bold"
    )
    tables.show(table)
    for line in wording.notes(report.kept):
        console.out.print(line, style="dim")
    cores = [tensor for tensor in report.tensors if "core_" in tensor.name.rpartition(".")[2]]
    if cores:
        others = len(report.tensors) - len(cores)
        line = f"the central cores of {len(cores)} MPOs" + (f" and {others} dense matrices" if others else "")
        console.out.print(f"pruned: {line}", style="dim")
    _show_training(report)
    for line in report.warnings:
        console.err.print(line, style="yellow")
    for split, cut in (report.truncated or {}).items():
        if cut:
            console.err.print(f"{split}: {cut:,} examples were cut to --max-length", style="yellow")
    if report.widened:
        console.err.print(wording.widened(report.widened), style="yellow")
    if report.resumed_from:
        console.err.print(f"resumed from step {report.resumed_from:,}")
    console.err.print(wording.written(report.out, report.seconds))
    console.err.print(wording.loading(report.architecture, report.out), style="dim")


def _show_training(report: SparsifyReport) -> None:
    """The metrics, and what was trained for how long."""
    from mpocli.cli import console, tables, wording

    columns = [("before", report.metrics_before), ("after", report.metrics), ("test", report.test_metrics)]
    columns = [(title, found) for title, found in columns if found]
    if columns:
        metrics = tables.table("metric", *(title for title, _ in columns))
        for name in columns[-1][1]:
            metrics.add_row(name, *(wording.metric(found[name]) for _, found in columns))
        tables.show(metrics)
    if report.trainable_by_kind:
        parts = ", ".join(f"{count:,} {kind}" for kind, count in report.trainable_by_kind.items())
        console.out.print(
            console.spans(
                "trained ",
                (f"{report.trainable_params:,}", "bold"),
                f" parameters for {report.steps:,} steps: {parts}",
            )
        )
        if report.method == "pst":
            share = report.trainable_params / report.dense_and_scores
            console.out.print(
                f"{share:.1%} of what movement pruning trains: the model, and a score for every pruned weight"
            )

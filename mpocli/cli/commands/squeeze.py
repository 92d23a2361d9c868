"""`mpocli squeeze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mpocli.cli import options
from mpocli.config.common import Json, Model, Out, Overwrite, Resume
from mpocli.config.modes import ALWAYS
from mpocli.config.option import Option
from mpocli.config.squeeze import SqueezeConfig
from mpocli.errors import TargetNotMetError

if TYPE_CHECKING:
    from mpocli.methods.squeeze.run import SqueezeReport


def command(
    model: Model,
    *,
    out: Out = None,
    config: SqueezeConfig,
    plot: Annotated[
        Path | None, Option("--plot", "The metric against parameters: png, svg or pdf.", "FILE"), ALWAYS
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Shrink a fine-tuned MPO checkpoint bond by bond, fine-tuning in between.

    Every round cuts the bond that costs least, trains the auxiliary cores for
    --finetune-steps and evaluates; the last model inside --max-drop is kept.

    [bold]Examples[/bold]

      mpocli squeeze bert-sst2 --task sst2 --train train.tsv --eval dev.tsv \\
      --max-drop 0.01

      mpocli squeeze bert-sst2 --task sst2 --train train.tsv --eval dev.tsv \\
      --target-ratio 0.6 --tie kind --per-param --plot squeeze.svg
    """
    if plot is not None:
        from mpocli.cli import plots

        picture = plots.check(plot, overwrite=overwrite)
    config = options.ready_to_train(config)

    from mpocli.cli import console
    from mpocli.cli.rounds import live_rounds
    from mpocli.hf import quiet
    from mpocli.methods.squeeze import run as squeeze

    destination = out or options.default_out(model, "squeezed")
    if plot is not None:
        _check_plot(plot, destination, model, config)
    with options.resumable(destination, "the last round is"), quiet.transformers(), live_rounds() as watch:
        report = squeeze.run(model, config, destination, overwrite=overwrite, resume=resume, watch=watch)
    if not report.is_writer:
        return
    console.report("squeeze", report, lambda: _show(report), json=json)
    if plot is not None:
        plots.squeeze(picture, report)
        console.err.print(f"drawn in {plot}")
    if report.target_met is False:
        raise TargetNotMetError(
            f"{report.totals.params:,} parameters, the target is {report.target_params:,}: stopped by {_why(report)}",
            hint="allow a larger --max-drop, more --rounds, or a larger --step",
        )


def _check_plot(plot: Path, destination: Path, model: str, config: SqueezeConfig) -> None:
    """The picture is no part of what is written, nor of what is read."""
    from mpocli.io.apart import check_apart
    from mpocli.methods.inputs import paths_read
    from mpocli.methods.training.directory import training_directory

    beside = {"--out": destination, "the training directory": training_directory(destination)}
    check_apart({**beside, "--plot": plot}, paths_read(Path(model), config))


def _why(report: SqueezeReport) -> str:
    return {
        "target": "the target",
        "max-drop": "--max-drop",
        "rounds": "--rounds",
        "exhausted": "bonds that are all 1",
        "not-finite": "a round whose training left the finite numbers (lower --lr)",
    }[report.stopped]


def _show(report: SqueezeReport) -> None:
    """Every round, what was kept, and what it amounts to."""
    from mpocli.cli import console, tables, wording
    from mpocli.cli.rounds import final_table

    if report.rounds:
        tables.show(final_table(report.rounds, report.metric, kept=report.kept_round))
    table = tables.table("", "before", "after", *(("test",) if report.test_metrics else ()))
    for name in report.metrics:
        tested = (f"{report.test_metrics[name]:.4f}",) if report.test_metrics else ()
        table.add_row(name, f"{report.metrics_before[name]:.4f}", f"{report.metrics[name]:.4f}", *tested)
    before, after = report.totals_before, report.totals
    table.add_row("parameters", wording.count(before.params), wording.count(after.params))
    table.add_row("ratio", f"{before.ratio:.3f}", f"{after.ratio:.3f}")
    table.add_row("weight files", wording.size(before.bytes), wording.size(after.bytes))
    tables.show(table)
    if report.rounds and report.kept_round == 0:
        console.err.print("no round was inside --max-drop: nothing was squeezed", style="yellow")
    elif report.rounds:
        console.out.print(f"kept round {report.kept_round} of {len(report.rounds)}, stopped by {_why(report)}")
    if report.resumed_from:
        console.err.print(f"resumed after round {report.resumed_from}")
    console.err.print(wording.written(report.out, report.seconds))

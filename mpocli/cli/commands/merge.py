"""`mpocli merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpocli.cli import options
from mpocli.config.common import Json, Model, Out, Overwrite
from mpocli.config.merge import MergeConfig

if TYPE_CHECKING:
    from mpocli.methods.merge import MergeReport


def command(
    model: Model,
    *,
    out: Out = None,
    config: MergeConfig,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Contract the MPOs back to an ordinary checkpoint, which loads with no mpocli installed.

    Sparse weights become dense ones with zeros, packed codes their values.

    [bold]Examples[/bold]

      mpocli merge bert-base-uncased-mpo -o bert-dense
    """
    destination = out or options.default_out(model, "merged")
    options.check_out_before_download(model, destination, overwrite=overwrite)

    from mpocli.cli import bars, console
    from mpocli.hf import quiet
    from mpocli.methods import merge

    with quiet.transformers(), bars.progress_bar("merge") as progress:
        report = merge.run(model, config, destination, overwrite=overwrite, progress=progress)
    console.report("merge", report, lambda: _show(report), json=json)


def _show(report: MergeReport) -> None:
    from mpocli.cli import console, tables, wording

    table = tables.table("", "before", "after")
    table.add_row("matrices as MPO", str(report.merged), "0")
    for phrase, count in report.unpacked_from.items():
        table.add_row(f"tensors as {phrase.removeprefix('a ')}", str(count), "0")
    table.add_row("parameters", wording.count(report.before.params), wording.count(report.totals.params))
    table.add_row("bytes", wording.size(report.before.bytes), wording.size(report.totals.bytes))
    tables.show(table)
    if report.experts:
        what = f"{report.experts} layers have dense experts now, and no stock class has such"
        console.err.print(f"{what}: loading still needs import mpocli", style="yellow")
    console.err.print(wording.written(report.out, report.seconds))

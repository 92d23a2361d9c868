"""`mpocli quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpocli.cli import options
from mpocli.config.common import Json, Model, Out, Overwrite
from mpocli.config.quantize import QuantizeConfig

if TYPE_CHECKING:
    from mpocli.methods.quantize.run import QuantizeReport


def command(
    model: Model,
    *,
    out: Out = None,
    config: QuantizeConfig,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Round weights and cores to 8, 4, 3 or 2 bits, packed in the files.

    Takes what any command wrote: of an MPO its cores are rounded. With text to
    look at, each is rounded in the norm of its inputs (GPTQ), a chain's cores
    through one another. Norms and biases stay as they are.

    [bold]Examples[/bold]

      mpocli quantize gpt2 --bits 4 --calibrate wiki.txt

      mpocli quantize bert-base-uncased --bits 8 --group 0

      mpocli quantize bert-base-uncased-mpo --bits 4 --cores central
    """
    options.check_calibration(config)
    destination = out or options.default_out(model, f"int{config.bits}")
    options.check_out_before_download(model, destination, overwrite=overwrite)

    from mpocli.cli import bars, console
    from mpocli.hf import quiet
    from mpocli.methods.quantize import run as quantize

    with quiet.transformers(), bars.progress_bar("quantize") as progress:
        report = quantize.run(model, config, destination, overwrite=overwrite, progress=progress)
    for line in report.warnings:
        console.warn(line)
    console.report("quantize", report, lambda: _show(report), json=json)


def _show(report: QuantizeReport) -> None:
    """What was rounded by role, with the largest error of a matrix, and the files."""
    from mpocli.cli import console, tables, wording

    table = tables.table("role", "rounded", "bits", "err", "before", "stored")
    for role, weights in wording.by_role(report.weights):
        table.add_row(
            role or "other",
            str(len(weights)),
            ", ".join(sorted({str(weight.bits) for weight in weights})),
            wording.error(max(weight.error for weight in weights)),
            wording.size(sum(weight.dense_bytes for weight in weights)),
            wording.size(sum(weight.bytes for weight in weights)),
        )
    table.add_section()
    sizes = wording.size(report.before.bytes), wording.size(report.totals.bytes)
    table.add_row("model", "", f"{report.bits_stored:.2f}", "", *sizes, style="bold")
    tables.show(table)
    for line in wording.notes(report.kept):
        console.out.print(line, style="dim")
    console.err.print(f"rounded by {report.method}, {wording.written(report.out, report.seconds)}")
    console.err.print(wording.loading(report.architecture, report.out), style="dim")

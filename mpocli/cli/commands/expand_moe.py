"""`mpocli expand-moe`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from mpocli.cli import options
from mpocli.config.common import Json, Model, Out, Overwrite
from mpocli.config.expand_moe import ExpandConfig
from mpocli.config.modes import ALWAYS
from mpocli.config.option import Option
from mpocli.config.page import NETWORKS

if TYPE_CHECKING:
    from mpocli.methods.expand_moe.report import ExpandReport, ExpertsReport


def command(
    model: Model,
    baseline_moe: Annotated[
        bool, Option("--baseline-moe", "n dense experts, for comparison.", panel=NETWORKS), ALWAYS
    ] = False,
    *,
    out: Out = None,
    config: ExpandConfig,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make experts of the feed-forward networks, which share their central cores.

    Each expert begins as the pretrained network: before training the model
    computes what it did. finetune trains it, and the balance loss with it.

    [bold]Examples[/bold]

      mpocli expand-moe gpt2 --experts 8

      mpocli expand-moe t5-base --experts 16 --router topk --top-k 2 --noise 0.01
    """
    if baseline_moe:
        config = replace(config, share=None)
    destination = out or options.default_out(model, "moe")
    options.check_out_before_download(model, destination, overwrite=overwrite)

    from mpocli.cli import bars, console
    from mpocli.hf import quiet
    from mpocli.methods.expand_moe import run as expand_moe

    with quiet.transformers(), bars.progress_bar("expand-moe") as progress:
        report = expand_moe.run(model, config, destination, overwrite=overwrite, progress=progress)
    console.report("expand-moe", report, lambda: _show(report), json=json)


def _show(report: ExpandReport) -> None:
    """What the experts have in common and of their own, and the size of the model beside n dense experts."""
    from mpocli.cli import console, tables, wording

    table = tables.table("matrices", "shape", "dense", "in common", "each expert's", "stored", "of dense", "err")
    groups: dict[tuple[object, ...], list[ExpertsReport]] = {}
    for module in report.modules:
        key = (module.place, module.shape, module.shared_params, module.own_params)
        groups.setdefault(key, []).append(module)
    for members in groups.values():
        first = members[0]
        errors = [module.relative_error for module in members if module.relative_error is not None]
        table.add_row(
            f"{len(members)} {'first' if first.place == 'in' else 'last'}",
            "x".join(map(str, first.shape)),
            f"{first.dense_params:,}",
            f"{first.shared_params:,}",
            f"{first.own_params:,}",
            f"{first.shared_params + report.experts * first.own_params:,}",
            f"{first.size_ratio:.3f}",
            wording.error(max(errors) if len(errors) == len(members) else None),
        )
    tables.show(table)
    totals = tables.table("", "parameters", "weight files")
    totals.add_row("before", f"{report.before.params:,}", wording.size(report.before.bytes))
    number = f"{report.experts} expert" + "s" * (report.experts > 1)
    totals.add_row(number, f"{report.totals.params:,}", wording.size(report.totals.bytes))
    if report.share != "dense":
        totals.add_row(number.replace("expert", "dense expert"), f"{report.dense_experts_params:,}", "", style="dim")
    tables.show(totals)
    networks = f"{report.networks} network" + "s" * (report.networks > 1)
    console.out.print(f"{networks}, routers with {report.router_params:,} parameters")
    for line in wording.notes(report.kept):
        console.out.print(line, style="dim")
    if report.widened:
        console.err.print(wording.widened(report.widened), style="yellow")
    console.err.print(wording.written(report.out, report.seconds))

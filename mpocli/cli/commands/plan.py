"""`mpocli plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from mpocli.cli import options
from mpocli.config.common import Json, Model
from mpocli.config.decompose import TRUNCATION, DecomposeConfig
from mpocli.config.option import group
from mpocli.errors import UsageError

if TYPE_CHECKING:
    from mpocli.methods.decompose.run import DecomposeReport


def command(
    model: Model,
    config: Annotated[
        DecomposeConfig,
        group(
            without=(*TRUNCATION, "shapes", "gauge", "max_shard_bytes"),
            seed=({"help": "Of the samples that are drawn."},),
        ),
    ],
    json: Json = False,
) -> None:
    """Show what `decompose` would choose for a budget, matrix by matrix.

    The sizes are exact, and the errors are those of the result: everything is
    computed and nothing is written.

    [bold]Examples[/bold]

      mpocli plan gpt2 --ratio 0.5 --layers attention,ffn --calibrate wiki.txt

      mpocli plan bert-base-uncased --max-bytes 200MB --json
    """
    if config.budget is None:
        raise UsageError("no budget to plan for", hint="add --ratio 0.5, --max-bytes 300MB or --max-error 0.1")
    options.check_calibration(config.budget)

    from mpocli.cli import bars, console
    from mpocli.hf import quiet
    from mpocli.methods.decompose import run as decompose
    from mpocli.methods.device import device_of

    device_of(config.device)
    with quiet.transformers(), bars.progress_bar("plan") as progress:
        report = decompose.run(model, config, options.default_out(model, "mpo"), dry_run=True, progress=progress)
    console.report("plan", report, lambda: show(report), json=json)


def show(report: DecomposeReport) -> None:
    """A line for every matrix that was selected, and what that makes of the model."""
    from mpocli.cli import decomposed, tables, wording

    columns = ("<form", "parameters", "ratio", "error", "output", "MACs", "forward", "<bonds")
    rows = []
    for module in report.modules:
        if module.action == "kept" and module.reason == "not selected":
            continue
        kept = module.action == "kept"
        errors = (
            "" if error is None else wording.error(error) for error in (module.relative_error, module.weighted_error)
        )
        cells = (
            "dense" if kept else module.form or "as it was",
            wording.count(module.params),
            wording.ratio(module.params, module.dense_params),
            *errors,
            "" if module.macs is None or kept else f"{module.macs / module.dense_params:.2f}",
            "" if kept else module.path or "",
            "" if kept else wording.bonds(module.bond_dims),
        )
        rows.append((module.name, module.role, cells))
    tables.matrices(columns, rows)
    decomposed.show(report)

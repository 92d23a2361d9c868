"""`mpocli plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mpocli.cli import budget_options as budget_
from mpocli.cli import options
from mpocli.cli import task_options as task_
from mpocli.cli.commands import decompose as decompose_
from mpocli.cli.options import one_of
from mpocli.errors import UsageError
from mpocli.modes import ALWAYS

if TYPE_CHECKING:
    from mpocli.methods.decompose import DecomposeReport


def command(
    model: options.Model,
    ratio: budget_.Ratio = None,
    max_bytes: budget_.MaxBytes = None,
    max_error: budget_.MaxError = None,
    shapes: budget_.Shapes = "auto",
    calibrate: budget_.Calibrate = None,
    samples: budget_.Samples = 128,
    seq_len: budget_.SeqLen = 256,
    weights: budget_.Weights = "fisher",
    allocation: budget_.Allocation = "global",
    sweeps: budget_.Sweeps = 10,
    sequential: budget_.Sequential = False,
    compare: budget_.Compare = False,
    sensitivity: budget_.Sensitivity = None,
    task: Annotated[task_.TaskName, budget_.CALIBRATED] = None,
    text_column: Annotated[task_.TextColumn, budget_.CALIBRATED] = None,
    label_column: Annotated[task_.LabelColumn, budget_.CALIBRATED, budget_.OF_ROWS] = None,
    max_length: Annotated[task_.MaxLength, budget_.CALIBRATED, budget_.OF_ROWS] = 128,
    tokenizer: Annotated[task_.Tokenizer, budget_.CALIBRATED] = None,
    sites: decompose_.Sites = 5,
    layers: decompose_.Layers = None,
    target: decompose_.Targets = None,
    ignore: decompose_.Ignored = None,
    dtype: options.Dtype = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:0 or auto."), ALWAYS
    ] = "cpu",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the samples that are drawn."), ALWAYS] = 0,
    json: options.Json = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what `decompose` would choose for a budget, matrix by matrix.

    The sizes are exact, and the errors are those of the result: everything is
    computed and nothing is written.

    [bold]Examples[/bold]

      mpocli plan gpt2 --ratio 0.5 --layers attention,ffn --calibrate wiki.txt

      mpocli plan bert-base-uncased --max-bytes 200MB --json
    """
    options.check_sites(sites)
    one_of("--dtype", dtype, options.DTYPES)
    calibrate, task = budget_.named_task(calibrate, task)
    budget = budget_.parse(
        ratio=ratio,
        max_bytes=max_bytes,
        max_error=max_error,
        shapes=shapes,
        allocation=allocation,
        weights=weights,
        sweeps=sweeps,
        sequential=sequential,
        compare=compare,
        sensitivity=sensitivity,
        calibrate=calibrate,
        samples=samples,
        seq_len=seq_len,
        data=budget_.data(task, text_column, label_column, max_length, tokenizer, seed),
    )
    if budget is None:
        raise UsageError("no budget to plan for", hint="add --ratio 0.5, --max-bytes 300MB or --max-error 0.1")
    roles = options.parse_layers(layers)

    from mpocli.cli import render
    from mpocli.hf import quiet
    from mpocli.methods import decompose
    from mpocli.methods.decompose_plan import DecomposeConfig
    from mpocli.methods.device import device_of

    device_of(device)
    config = DecomposeConfig(
        sites=sites,
        layers=roles,
        targets=tuple(target or ()),
        ignore=tuple(ignore or ()),
        dtype=dtype,
        device=device,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        budget=budget,
    )
    with quiet.transformers(), render.progress_bar("plan") as progress:
        report = decompose.run(model, config, options.default_out(model, "mpo"), dry_run=True, progress=progress)
    render.report("plan", report, lambda: show(report), json=json)


def show(report: DecomposeReport) -> None:
    """A line for every matrix that was selected, and what that makes of the model."""
    from mpocli.cli import render

    columns = ("<form", "parameters", "ratio", "error", "output", "MACs", "forward", "<bonds")
    rows = []
    for module in report.modules:
        if module.action == "kept" and module.reason == "not selected":
            continue
        kept = module.action == "kept"
        errors = (
            "" if error is None else render.error(error) for error in (module.relative_error, module.weighted_error)
        )
        cells = (
            "dense" if kept else module.form or "as it was",
            render.count(module.params),
            render.ratio(module.params, module.dense_params),
            *errors,
            "" if module.macs is None or kept else f"{module.macs / module.dense_params:.2f}",
            "" if kept else module.path or "",
            "" if kept else render.bonds(module.bond_dims),
        )
        rows.append((module.name, module.role, cells))
    render.matrices(columns, rows)
    decompose_.show(report)

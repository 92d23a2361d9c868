"""`mpocli inspect`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mpocli.config.common import Json, Model
from mpocli.config.inspect import InspectConfig

if TYPE_CHECKING:
    from mpocli.methods.inspect.run import InspectReport, ModuleView

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 30


def command(
    model: Model,
    config: InspectConfig,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds: parameters by role and matrix, bonds, errors, bytes.

    Reads MPO and ordinary checkpoints alike and changes nothing.

    [bold]Examples[/bold]

      mpocli inspect bert-base-uncased

      mpocli inspect bert-base-uncased-mpo --module '*layer.0.*' --spectrum

      mpocli inspect bert-base-uncased-mpo --verify --base bert-base-uncased
    """
    from mpocli.cli import bars, console
    from mpocli.errors import InputError
    from mpocli.methods.inspect import run as inspect

    with bars.progress_bar("inspect", enabled=config.spectrum or config.verify) as progress:
        report = inspect.run(model, **vars(config), progress=progress)
    console.report("inspect", report, lambda: _show(report, one_by_one=bool(config.module)), json=json)
    if report.problems:
        raise InputError(
            f"{model}: {len(report.problems)} of {report.checks} checks failed; the first: {report.problems[0]}",
            hint="name as --base the model that was decomposed"
            if report.problems[0].startswith("base model")
            else "restore the files that the manifest describes, or decompose again",
        )


def _show(report: InspectReport, *, one_by_one: bool) -> None:
    from mpocli.cli import console, tables, wording

    if one_by_one:
        _matrices(report)
    else:
        tables.show(_roles(report))
    if any(view.action != "kept" and view.relative_error is None for view in report.modules):
        console.out.print(wording.UNKNOWN, style="dim")
    if again := sum(view.measured_against is not None for view in report.modules):
        console.out.print(
            f"the errors of {again} MPOs that were truncated again are relative to what they were before", style="dim"
        )
    for view in report.modules:
        if view.singular_values is not None:
            _spectrum(view)
    if report.history:
        console.err.print("history: " + " → ".join(report.history), style="dim")
    if report.problems is not None:
        for problem in report.problems:
            console.err.print(f"✗ {problem}", style="red")
        if not report.problems:
            console.out.print(f"verified: {report.checks} checks, no mismatch", style="green")
        if not report.has_manifest:
            console.err.print("no mpo.json here: only what config.json says of the cores was checked", style="yellow")


def _roles(report: InspectReport) -> Any:
    from mpocli.cli import tables, wording

    experts = any(view.experts for view in report.modules)
    columns = ("sparsity",) if report.sparsity is not None else ()
    bits = ("bits",) if _has_bits(report) else ()
    table = tables.table(
        "role",
        "changed" if experts else "as MPO",
        "parameters",
        "ratio",
        "central",
        "auxiliary",
        "err",
        *columns,
        *bits,
        "bytes",
    )
    for role, views in wording.by_role(report.modules):
        made = [view for view in views if view.action != "kept"]
        known = [view.relative_error for view in made if view.relative_error is not None]
        params = sum(view.params for view in views)
        table.add_row(
            role or "other",
            f"{len(made)} of {len(views)}",
            wording.count(params),
            wording.ratio(params, sum(view.dense_params for view in views)),
            wording.count(sum(view.central_params or 0 for view in made)) if made else "",
            wording.count(sum(view.auxiliary_params or 0 for view in made)) if made else "",
            (wording.error(max(known)) if len(known) == len(made) else "?") if made else "",
            *((_share(sum(view.zeros or 0 for view in views), params),) if columns else ()),
            *((wording.bits(sum(view.bytes for view in views), params),) if bits else ()),
            wording.size(sum(view.bytes for view in views)),
        )
    if report.rest_params:
        table.add_row("rest", "", wording.count(report.rest_params), "1.000", style="dim")
    totals = report.totals
    table.add_section()
    sparse = (_share(report.zeros, totals.params),) if columns else ()
    of_all = (wording.bits(totals.bytes, totals.params),) if bits else ()
    whole = wording.count(totals.params), f"{totals.ratio:.3f}", "", "", "", *sparse, *of_all
    table.add_row("model", "", *whole, wording.size(totals.bytes), style="bold")
    return table


def _has_bits(report: InspectReport) -> bool:
    """Whether anything is rounded to few bits: of every row it is then told what an entry takes."""
    return any(view.bits is not None for view in report.modules)


def _share(zeros: int, params: int) -> str:
    return f"{zeros / params:.1%}" if zeros else ""


def _matrices(report: InspectReport) -> None:
    from mpocli.cli import tables, wording

    rows = []
    bits = ("bits",) if _has_bits(report) else ()
    for view in report.modules:
        made = view.action != "kept"
        more = f", {view.experts} experts of {view.expert_params:,} + {view.shared_params:,}" if view.experts else ""
        more += f", {view.sparsity:.1%} of {'the central core' if made else 'it'} zero" if view.sparsity else ""
        cells = (
            f"{view.shape[0]}x{view.shape[1]}",
            wording.count(view.params),
            f"{view.params / view.dense_params:.3f}",
            wording.count(view.central_params),
            wording.count(view.auxiliary_params),
            wording.error(view.relative_error) if made else "",
            *((wording.bits(view.bytes, view.params),) if bits else ()),
            (wording.bonds(view.bond_dims) if made and view.bond_dims else "dense") + more,
        )
        rows.append((view.name, view.role, cells))
    tables.matrices(("shape", "parameters", "ratio", "central", "auxiliary", "err", *bits, "<bonds"), rows)


def _spectrum(view: ModuleView) -> None:
    """Bars of σ_j/σ_1, one line for each inner bond."""
    from mpocli.cli import console, tables

    assert view.singular_values is not None and view.entropy_nats is not None
    shape = f"{','.join(map(str, view.out_dims or ()))}x{','.join(map(str, view.in_dims or ()))}"
    console.out.print()
    console.out.print(console.spans((view.name, "bold"), f"  {shape}"))
    table = tables.table("bond", "χ", "σ max", "σ min", "entropy", "of ln χ", "<σ_j, j = 1 … χ")
    for k, (values, entropy) in enumerate(zip(view.singular_values, view.entropy_nats, strict=True), 1):
        most = math.log(len(values)) if len(values) > 1 else 0.0
        table.add_row(
            str(k),
            str(len(values)),
            f"{values[0]:.3g}",
            f"{values[-1]:.2g}",
            f"{entropy:.3f}",
            f"{entropy / most:.0%}" if most else "",
            _bars(values),
        )
    tables.show(table)


def _bars(values: tuple[float, ...]) -> str:
    """At most `_WIDTH` bars: the first value of each stretch."""
    if not values or values[0] <= 0:
        return "all zero"
    count = min(_WIDTH, len(values))
    picked = [values[k * len(values) // count] for k in range(count)]
    return "".join(_BLOCKS[round(value / values[0] * (len(_BLOCKS) - 1))] for value in picked)

"""What decompose did, or would do: the tables and lines of `decompose` and `plan`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mpocli.cli import console, tables, wording

if TYPE_CHECKING:
    from mpocli.methods.decompose.report import ModuleReport
    from mpocli.methods.decompose.run import DecomposeReport
    from mpocli.methods.planner.compare import Compared


def show(report: DecomposeReport) -> None:
    """The table by role, what was kept and why, and where the result is."""
    # The worst error of the outputs, where there was a calibration: what a bound on the error is about.
    outputs = ("output",) if any(module.weighted_error is not None for module in report.modules) else ()
    rounded = ("rounded",) if any(module.action == "quantised" for module in report.modules) else ()
    sizes = ("→ bytes",) if rounded else ()
    columns = "role", "as MPO", *rounded, "parameters", "→ after", "ratio", *sizes, "worst err", "mean err", *outputs
    table = tables.table(*columns)
    for role, modules in wording.by_role(report.modules):
        made = [module for module in modules if module.action != "kept"]
        chains = sum(module.action == "mpo" for module in made)
        known = [module.relative_error for module in made if module.relative_error is not None]
        before, after = sum(m.dense_params for m in modules), sum(m.params for m in modules)
        table.add_row(
            role or "other",
            f"{chains} of {len(modules)}",
            *((f"{len(made) - chains}",) if rounded else ()),
            wording.count(before),
            wording.count(after),
            wording.ratio(after, before),
            *((wording.size(sum(m.bytes for m in modules)),) if sizes else ()),
            _over(max, known, made),
            _over(statistics.mean, known, made),
            *((_worst_output(made),) if outputs else ()),
        )
    cut = [module for module in report.modules if module.cut_from is not None]
    forms = Counter(module.form for module in report.modules if module.form)
    totals = report.totals
    rest = totals.dense_params - sum(module.dense_params for module in report.modules)
    if rest:
        table.add_row(
            "rest", "", *("" for _ in rounded), wording.count(rest), wording.count(rest), "1.000", style="dim"
        )
    table.add_section()
    whole = wording.count(totals.dense_params), wording.count(totals.params), f"{totals.ratio:.3f}"
    size = (wording.size(totals.bytes),) if sizes else ()
    table.add_row("model", "", *("" for _ in rounded), *whole, *size, style="bold")
    tables.show(table)
    if any(module.action != "kept" and module.relative_error is None for module in report.modules):
        console.out.print(wording.UNKNOWN, style="dim")
    console.out.print(
        console.spans(
            f"weight files  {wording.size(report.before.bytes)} → ",
            (wording.size(totals.bytes), "bold"),
            "   (ratio = parameters after / dense: below 1 is smaller)",
        )
    )
    if cut:
        _show_cut(cut)
    if forms:
        chosen = ", ".join(f"{count} {form}" for form, count in forms.most_common())
        console.out.print(f"shapes        {chosen}")
    if report.filled:
        console.err.print(f"{report.filled} sparse matrices became MPOs: their zeros are gone", style="yellow")
    if report.widened:
        console.err.print(wording.widened(report.widened), style="yellow")
    if report.compared:
        _show_compared(report.compared)
    _say(report)


def _say(report: DecomposeReport) -> None:
    """What may surprise, and where the result is."""
    totals = report.totals
    for warning in report.warnings:
        console.err.print(warning, style="yellow")
    for line in wording.notes(report.modules):
        console.err.print(line, style="yellow")
    if report.before.params < totals.params and report.before.params < totals.dense_params:
        console.err.print(
            f"the input had {report.before.params:,} parameters: without a truncation option what is decomposed grows",
            style="yellow",
        )
    if all(module.action == "kept" for module in report.modules):
        console.err.print("nothing was decomposed", style="yellow")
    if report.dry_run:
        console.err.print(f"dry run: nothing written; the weights would take {totals.bytes:,} bytes")
    else:
        console.err.print(wording.written(report.out, report.seconds))
        if any(module.action != "kept" for module in report.modules):
            console.err.print(wording.loading(report.architecture, report.out), style="dim")


def _show_cut(modules: Sequence[ModuleReport]) -> None:
    """What became of the bonds of MPOs that were truncated again."""
    console.out.print(f"{len(modules)} MPOs were truncated again; the error is relative to what each of them was")
    rows = [
        (
            module.name,
            module.role,
            (wording.error(module.relative_error), f"{wording.bonds(module.cut_from)} → {after}"),
        )
        for module in modules
        for after in (wording.bonds(module.bond_dims),)
    ]
    tables.matrices(("error", "<bonds"), rows)


def _show_compared(compared: Sequence[Compared]) -> None:
    table = tables.table("same matrices, held-out text", "parameters", "divergence", "perplexity")
    for arm in compared:
        perplexity = "" if arm.perplexity is None else wording.metric(arm.perplexity)
        divergence = "" if arm.name == "dense" else wording.metric(arm.divergence)
        style = "bold" if arm.name == "the plan" else "dim" if arm.name == "dense" else ""
        table.add_row(arm.name, wording.count(arm.params), divergence, perplexity, style=style)
    tables.show(table)
    console.out.print("layers alone: embeddings and what is tied to them are as they were in all rows", style="dim")


def _worst_output(made: list[ModuleReport]) -> str:
    known = [module.weighted_error for module in made if module.weighted_error is not None]
    return wording.error(max(known)) if known else ""


def _over(measure: Callable[[list[float]], float], known: list[float], made: list[ModuleReport]) -> str:
    """Of the errors of all matrices of a row; `?` where one is unknown."""
    if not made:
        return ""
    return wording.error(measure(known)) if len(known) == len(made) else "?"

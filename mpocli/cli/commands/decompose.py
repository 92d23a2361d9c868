"""`mpocli decompose`."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from mpocli.cli import options
from mpocli.config.common import Json, Model, Out, Overwrite
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.modes import ALWAYS
from mpocli.config.option import Option

if TYPE_CHECKING:
    from mpocli.methods.decompose.report import ModuleReport
    from mpocli.methods.decompose.run import DecomposeReport
    from mpocli.methods.planner.compare import Compared


def command(
    model: Model,
    *,
    out: Out = None,
    config: DecomposeConfig,
    dry_run: Annotated[bool, Option("--dry-run", "Print exact sizes, write nothing."), ALWAYS] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Turn weight matrices into matrix product operators.

    With --ratio, --max-bytes or --max-error a planner chooses the shape and the
    bonds of every matrix, the truncated SVD among them, by the error that they
    make on the text of --calibrate; `mpocli plan` shows what it would choose.

    Without a truncation option the result is lossless and 3-15 % larger: the
    start of lightweight fine-tuning and over-parameterisation. With one,
    matrices that would grow stay dense, and the output says which and why.

    [bold]Examples[/bold]

      mpocli decompose bert-base-uncased --trunc 256

      mpocli decompose gpt2 --layers ffn --ffn-trunc 128 -o gpt2-small

      mpocli decompose bert-base-uncased --emb-trunc 100 --dry-run --json

      mpocli decompose gpt2 --ratio 0.5 --layers attention,ffn --calibrate wiki.txt
    """
    options.check_calibration(config.budget)
    destination = out or options.default_out(model, "mpo")
    if not dry_run:
        options.check_out_before_download(model, destination, overwrite=overwrite)

    from mpocli.cli import bars, console
    from mpocli.hf import quiet
    from mpocli.methods.decompose import run as decompose
    from mpocli.methods.device import device_of

    device_of(config.device)
    with quiet.transformers(), bars.progress_bar("decompose") as progress:
        report = decompose.run(model, config, destination, overwrite=overwrite, dry_run=dry_run, progress=progress)

    def say() -> None:
        show(report)
        if config.budget is None and config.truncates:
            _name_the_planner(report, model, config)

    console.report("decompose", report, say, json=json)


def _name_the_planner(report: DecomposeReport, model: str, config: DecomposeConfig) -> None:
    """What truncating every bond alike costs before any training, and the command that reaches the same size."""
    from mpocli.cli import console, wording

    made = [module for module in report.modules if module.action == "mpo" and not module.reason and not module.cut_from]
    chosen = [*made, *(module for module in report.modules if "larger" in module.reason)]
    after, before = sum(m.params for m in chosen), sum(m.dense_params for m in chosen)
    if not made or not 0.001 < after / before < 0.999:
        return
    losses = []
    for role, modules in wording.by_role(made):
        errors = [module.relative_error for module in modules if module.relative_error is not None]
        losses += [f"{statistics.mean(errors):.0%} of {role or 'other'}"] if errors else []
    if losses:
        line = f"before training, that is an error of {', '.join(losses)} on average"
        console.err.print(line, style="yellow")
    words = ["mpocli", "decompose", model, "--ratio", f"{after / before:.3f}"]
    words += ["--layers", ",".join(config.layers)] if config.layers else []
    words += [word for glob in config.targets for word in ("--target", glob)]
    words += [word for glob in config.ignore for word in ("--ignore", glob)]
    line = f"the same size, planned on your text: {shlex.join(words)} --calibrate TEXT"
    console.err.print(line, style="dim")


def show(report: DecomposeReport) -> None:
    """The table by role, what was kept and why, and where the result is."""
    from mpocli.cli import console, tables, wording

    # The worst error of the outputs, where there was a calibration: what a bound on the error is about.
    outputs = ("output",) if any(module.weighted_error is not None for module in report.modules) else ()
    table = tables.table("role", "as MPO", "parameters", "→ after", "ratio", "worst err", "mean err", *outputs)
    for role, modules in wording.by_role(report.modules):
        made = [module for module in modules if module.action == "mpo"]
        known = [module.relative_error for module in made if module.relative_error is not None]
        before, after = sum(m.dense_params for m in modules), sum(m.params for m in modules)
        table.add_row(
            role or "other",
            f"{len(made)} of {len(modules)}",
            wording.count(before),
            wording.count(after),
            wording.ratio(after, before),
            _over(max, known, made),
            _over(statistics.mean, known, made),
            *((_worst_output(made),) if outputs else ()),
        )
    cut = [module for module in report.modules if module.cut_from is not None]
    forms = Counter(module.form for module in report.modules if module.form)
    totals = report.totals
    rest = totals.dense_params - sum(module.dense_params for module in report.modules)
    if rest:
        table.add_row("rest", "", wording.count(rest), wording.count(rest), "1.000", style="dim")
    table.add_section()
    whole = wording.count(totals.dense_params), wording.count(totals.params), f"{totals.ratio:.3f}"
    table.add_row("model", "", *whole, style="bold")
    tables.show(table)
    if any(module.action == "mpo" and module.relative_error is None for module in report.modules):
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
    from mpocli.cli import console, wording

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
    if not any(module.action == "mpo" for module in report.modules):
        console.err.print("nothing was decomposed", style="yellow")
    if report.dry_run:
        console.err.print(f"dry run: nothing written; the weights would take {totals.bytes:,} bytes")
    else:
        console.err.print(f"written to {report.out} in {report.seconds:.1f} s")
        if any(module.action == "mpo" for module in report.modules):
            line = f"load it with: import mpocli, transformers; transformers.{report.architecture}"
            console.err.print(f"{line}.from_pretrained({report.out!r})", style="dim")


def _show_cut(modules: Sequence[ModuleReport]) -> None:
    """What became of the bonds of MPOs that were truncated again."""
    from mpocli.cli import console, tables, wording

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
    from mpocli.cli import console, tables, wording

    table = tables.table("same matrices, held-out text", "parameters", "divergence", "perplexity")
    for arm in compared:
        perplexity = "" if arm.perplexity is None else wording.metric(arm.perplexity)
        divergence = "" if arm.name == "dense" else wording.metric(arm.divergence)
        style = "bold" if arm.name == "the plan" else "dim" if arm.name == "dense" else ""
        table.add_row(arm.name, wording.count(arm.params), divergence, perplexity, style=style)
    tables.show(table)
    console.out.print("layers alone: embeddings and what is tied to them are as they were in all rows", style="dim")


def _worst_output(made: list[ModuleReport]) -> str:
    from mpocli.cli import wording

    known = [module.weighted_error for module in made if module.weighted_error is not None]
    return wording.error(max(known)) if known else ""


def _over(measure: Callable[[list[float]], float], known: list[float], made: list[ModuleReport]) -> str:
    """Of the errors of all matrices of a row; `?` where one is unknown."""
    if not made:
        return ""
    from mpocli.cli import wording

    return wording.error(measure(known)) if len(known) == len(made) else "?"

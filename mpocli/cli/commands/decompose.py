"""`mpocli decompose`."""

from __future__ import annotations

import shlex
import statistics
from typing import TYPE_CHECKING

from mpocli.cli import options
from mpocli.config.common import DryRun, Json, Model, Out, Overwrite
from mpocli.config.decompose import DecomposeConfig

if TYPE_CHECKING:
    from mpocli.methods.decompose.run import DecomposeReport


def command(
    model: Model,
    *,
    out: Out = None,
    config: DecomposeConfig,
    dry_run: DryRun = False,
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

    from mpocli.cli import bars, console, decomposed
    from mpocli.hf import quiet
    from mpocli.methods.decompose import run as decompose
    from mpocli.methods.device import device_of

    device_of(config.device)
    with quiet.transformers(), bars.progress_bar("decompose") as progress:
        report = decompose.run(model, config, destination, overwrite=overwrite, dry_run=dry_run, progress=progress)

    def say() -> None:
        decomposed.show(report)
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

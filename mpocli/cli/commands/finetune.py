"""`mpocli finetune`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from mpocli.cli import options
from mpocli.config import bounds
from mpocli.config.common import Json, Model, Out, Overwrite, Resume
from mpocli.config.finetune import FinetuneConfig
from mpocli.config.modes import ALWAYS
from mpocli.config.option import Option
from mpocli.errors import UsageError

if TYPE_CHECKING:
    from mpocli.methods.finetune.overparam import OverparamReport
    from mpocli.methods.finetune.run import FinetuneReport


def _seeds(text: str, option: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"{option} {text!r} cannot be read", hint="write it as 1,2,3") from None
    for one in found:
        bounds.seed(32)(option, one)
    return found


def command(
    model: Model,
    *,
    out: Out = None,
    config: FinetuneConfig,
    seeds: Annotated[
        tuple[int, ...] | None,
        Option("--seeds", "A run for each, in sub-directories.", "N,N,…", parse=_seeds),
        ALWAYS,
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fine-tune a model on a task: of an MPO checkpoint, its auxiliary cores alone.

    The central cores, most of the parameters, stay as they are; what is not
    decomposed (biases, norms, the head) is trained too. Ordinary checkpoints
    are fine-tuned whole.

    [bold]Examples[/bold]

      mpocli finetune bert-mpo --task sst2 --train train.tsv --lr 3e-4

      mpocli finetune gpt2-mpo --task lm --train train.txt --max-length 512

      accelerate launch -m mpocli finetune bert-mpo --task sst2 \\
      --train train.tsv
    """
    config = options.ready_to_train(config)

    from mpocli.cli import bars, console
    from mpocli.hf import quiet
    from mpocli.methods.finetune import run as finetune
    from mpocli.methods.finetune import seeds as finetune_seeds

    destination = out or options.default_out(model, "finetuned")
    with options.resumable(destination), quiet.transformers(), bars.training_bar("finetune") as progress:
        how: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "progress": progress, "warn": console.warn}
        if seeds:
            reports = finetune_seeds.run_seeds(model, config, destination, seeds, **how)
        else:
            reports = (finetune.run(model, config, destination, **how),)
    if not reports[0].is_writer:
        return
    found = finetune_seeds.summary(str(destination), seeds, reports) if seeds else reports[0]
    console.report("finetune", found, lambda: _show(reports, seeds or (), str(destination)), json=json)


def _show(reports: Sequence[FinetuneReport], seeds: tuple[int, ...], out: str) -> None:
    """Metrics before and after, what was trained, and where the result is."""
    from mpocli.cli import console, tables, wording

    first = reports[0]
    table = tables.table("metric", "before", "after", *(("test",) if first.test_metrics else ()))
    for name in first.metrics:
        before = [report.metrics_before[name] for report in reports if name in report.metrics_before]
        after = [report.metrics[name] for report in reports]
        tested = [report.test_metrics[name] for report in reports if name in report.test_metrics]
        row = [_spread(before), _spread(after), *((_spread(tested),) if first.test_metrics else ())]
        table.add_row(name, *row)
    if first.metrics:
        tables.show(table)
    parts = [f"{count:,} {role}" for role, count in first.trainable_by_role.items() if count]
    size = first.overparam.training_params if first.overparam else first.totals.params
    share = first.trainable_params / size
    losses = [report.loss for report in reports if report.loss is not None]
    ended = f", loss {_spread(losses)} at the end" if losses else ""
    console.out.print(
        console.spans(
            "trained ",
            (f"{first.trainable_params:,}", "bold"),
            f" of {size:,} parameters ({share:.1%}: {', '.join(parts)}) for {first.steps:,} steps{ended}",
        )
    )
    if first.overparam is not None:
        _show_expanded(first.overparam)
    for line in _router_lines(first):
        console.out.print(line)
    if first.selected_step != first.steps:
        console.out.print(f"kept the weights of step {first.selected_step:,}, the best on held-out training data")
    for split, cut in first.truncated.items():
        if cut:
            console.err.print(f"{split}: {cut:,} examples were cut to --max-length", style="yellow")
    if first.resumed_from:
        console.err.print(f"resumed from step {first.resumed_from:,}")
    where = f"{out}/seed-{{{','.join(map(str, seeds))}}}" if seeds else first.out
    console.err.print(wording.written(where, sum(report.seconds for report in reports)))


def _router_lines(report: FinetuneReport) -> list[str]:
    """How evenly routers spread their tokens, over all layers."""
    found = [router for router in report.routers.values() if router]
    if not found:
        return []
    loads = [share for router in found for share in router["load"]]
    entropy = statistics.mean(router["entropy_nats"] for router in found)
    dropped = statistics.mean(router["dropped"] for router in found)
    even = 1 / len(found[0]["load"])
    return [
        f"{len(found)} routers: load of an expert {min(loads):.3f} to {max(loads):.3f} ({even:.3f} is even), entropy "
        f"{entropy:.2f} nats, dropped {dropped:.1%}"
    ]


def _show_expanded(report: OverparamReport) -> None:
    """The matrices that were MPOs, by group, and what is left of that."""
    from mpocli.cli import console, tables, wording

    table = tables.table("over-parameterised", "after step", "score", "bonds", "parameters", "dense")
    for found in sorted(report.expanded, key=lambda found: (found.step, found.group)):
        table.add_row(
            wording.shortened(found.module, 52),
            f"{found.step:,}",
            "" if found.score is None else f"{found.score:.3g}",
            ",".join(dict.fromkeys(map(str, found.bond_dims[1:-1]))),
            f"{found.params:,}",
            f"{found.dense_params:,}",
        )
    tables.show(table)
    if report.score_steps:
        console.out.print(f"{report.score_steps:,} of the steps trained a copy for the scores")
    console.out.print(
        f"{report.training_params:,} parameters in training, {report.deployed_params:,} deployed; folding moved the "
        f"logits by {report.fold_difference:.1e} (largest {report.largest_logit:.1f})"
    )


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean

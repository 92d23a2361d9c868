"""Options of the commands that train, and how they become one object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mpocli.cli.options import at_least, one_of
from mpocli.cli.task_options import precision_of
from mpocli.errors import UsageError

if TYPE_CHECKING:
    from mpocli.train.segment import Optimisation

HOW = "How to train"

Update = Annotated[
    str | None,
    typer.Option(
        "--update",
        metavar="CORES",
        help="auxiliary, central or all; what is not decomposed is always trained. Default: auxiliary.",
        rich_help_panel=HOW,
    ),
]
Lr = Annotated[float, typer.Option("--lr", metavar="X", help="Peak learning rate.", rich_help_panel=HOW)]
MpoLr = Annotated[
    float | None, typer.Option("--mpo-lr", metavar="X", help="Of the cores. Default: --lr.", rich_help_panel=HOW)
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="Per process.", rich_help_panel=HOW)]
Accumulation = Annotated[
    int, typer.Option("--accumulation", metavar="N", help="Batches per step.", rich_help_panel=HOW)
]
WeightDecay = Annotated[
    float, typer.Option("--weight-decay", metavar="X", help="AdamW's, of matrices.", rich_help_panel=HOW)
]
Clip = Annotated[float, typer.Option("--clip", metavar="X", help="Largest gradient norm.", rich_help_panel=HOW)]
RandomBatches = Annotated[
    bool, typer.Option("--random-batches", help="Do not keep similar lengths together.", rich_help_panel=HOW)
]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory: recompute activations.", rich_help_panel=HOW)
]
RecomputeWeights = Annotated[
    bool, typer.Option("--recompute-weights", help="Less memory: rebuild MPO weights twice.", rich_help_panel=HOW)
]
LogSteps = Annotated[int, typer.Option("--log-steps", metavar="N", help="Steps per logged loss.")]
ReportTo = Annotated[
    list[str] | None, typer.Option("--report-to", metavar="NAME", help="tensorboard, wandb, … as in the Trainer.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]


def check_share(option: str, share: float) -> None:
    """`UsageError` for a number outside [0, 1]."""
    if not 0 <= share <= 1:
        raise UsageError(f"{option} {share}: must lie between 0 and 1", hint="it is a share")


def optimisation(
    *,
    update: str | None,
    lr: float,
    mpo_lr: float | None,
    weight_decay: float,
    warmup: float,
    clip: float,
    batch_size: int,
    accumulation: int,
    precision: str,
    device: str,
    gradient_checkpointing: bool,
    random_batches: bool,
    log_steps: int,
    save_steps: int | None = None,
    report_to: list[str] | None,
    seed: int,
) -> Optimisation:
    """The object that the methods take; `UsageError` for values that cannot be meant."""
    one_of("--update", update, ("auxiliary", "central", "all"))
    for option, value in (("--batch-size", batch_size), ("--accumulation", accumulation), ("--log-steps", log_steps)):
        at_least(option, value, 1)
    for option, rate in (("--lr", lr), ("--mpo-lr", mpo_lr)):
        if rate is not None and not 0 < rate < float("inf"):
            raise UsageError(f"{option} {rate}: must be above 0", hint=f"choose a positive {option}")
    check_share("--warmup", warmup)
    if not 0 <= weight_decay < float("inf") or not 0 < clip < float("inf"):
        raise UsageError(
            f"--weight-decay {weight_decay}, --clip {clip}: must not be negative", hint="0 and 1 are usual"
        )

    chosen = precision_of(precision, device)
    from mpocli.train.segment import Optimisation

    return Optimisation(
        lr=lr,
        mpo_lr=mpo_lr,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        batch_size=batch_size,
        accumulation=accumulation,
        precision=chosen,
        gradient_checkpointing=gradient_checkpointing,
        group_by_length=not random_batches,
        log_steps=log_steps,
        save_steps=save_steps,
        report_to=tuple(report_to or ()),
        seed=seed,
    )

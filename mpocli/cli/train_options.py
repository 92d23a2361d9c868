"""Options of the commands that train, and how they become one object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mpocli.cli.options import at_least, one_of, share_of
from mpocli.cli.task_options import precision_of
from mpocli.errors import UsageError
from mpocli.modes import ALWAYS, OF_CORES, OF_CORES_ALONE, excludes, needs

if TYPE_CHECKING:
    from mpocli.train.segment import Optimisation

HOW = "How to train"
TEACHER = "Distillation"
TAUGHT = needs("--teacher")

Update = Annotated[
    str | None,
    typer.Option(
        "--update",
        metavar="CORES",
        help="auxiliary, central or all; what is not decomposed is always trained. Default: auxiliary.",
        rich_help_panel=HOW,
    ),
    OF_CORES_ALONE,
]
Lr = Annotated[float, typer.Option("--lr", metavar="X", help="Peak learning rate.", rich_help_panel=HOW), ALWAYS]
MpoLr = Annotated[
    float | None,
    typer.Option("--mpo-lr", metavar="X", help="Of the cores. Default: --lr.", rich_help_panel=HOW),
    OF_CORES,
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="Per process.", rich_help_panel=HOW), ALWAYS]
Accumulation = Annotated[
    int, typer.Option("--accumulation", metavar="N", help="Batches per step.", rich_help_panel=HOW), ALWAYS
]
WeightDecay = Annotated[
    float, typer.Option("--weight-decay", metavar="X", help="AdamW's, of matrices.", rich_help_panel=HOW), ALWAYS
]
Clip = Annotated[float, typer.Option("--clip", metavar="X", help="Largest gradient norm.", rich_help_panel=HOW), ALWAYS]
Epochs = Annotated[
    float,
    typer.Option("--epochs", metavar="X", help="Passes.", rich_help_panel=HOW),
    excludes("--steps", hint="leave one of them out"),
]
StepCount = Annotated[
    int | None, typer.Option("--steps", metavar="N", help="Instead of --epochs.", rich_help_panel=HOW), ALWAYS
]
Warmup = Annotated[
    float,
    typer.Option("--warmup", parser=share_of("--warmup"), metavar="X", help="Share of the steps.", rich_help_panel=HOW),
    ALWAYS,
]
SaveSteps = Annotated[
    int | None,
    typer.Option("--save-steps", metavar="N", help="Steps per checkpoint. Default: a tenth of all, at least 100."),
    ALWAYS,
]
Teacher = Annotated[
    str | None,
    typer.Option("--teacher", metavar="MODEL", help="Of the same task, to learn from.", rich_help_panel=TEACHER),
    ALWAYS,
]
DistillWeight = Annotated[
    float,
    typer.Option(
        "--distill-weight",
        parser=share_of("--distill-weight"),
        metavar="X",
        help="Its share of the loss.",
        rich_help_panel=TEACHER,
    ),
    TAUGHT,
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="Of both distributions.", rich_help_panel=TEACHER), TAUGHT
]
DistillHidden = Annotated[
    bool, typer.Option("--distill-hidden", help="Hidden states too.", rich_help_panel=TEACHER), TAUGHT
]
RandomBatches = Annotated[
    bool, typer.Option("--random-batches", help="Do not keep similar lengths together.", rich_help_panel=HOW), ALWAYS
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Less memory: recompute activations.", rich_help_panel=HOW),
    ALWAYS,
]
RecomputeWeights = Annotated[
    bool,
    typer.Option("--recompute-weights", help="Less memory: rebuild MPO weights twice.", rich_help_panel=HOW),
    OF_CORES,
]
LogSteps = Annotated[int, typer.Option("--log-steps", metavar="N", help="Steps per logged loss."), ALWAYS]
ReportTo = Annotated[
    list[str] | None,
    typer.Option("--report-to", metavar="NAME", help="tensorboard, wandb, … as in the Trainer."),
    ALWAYS,
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run."), ALWAYS]


def check_share(option: str, share: float) -> None:
    """`UsageError` for a number outside [0, 1]."""
    if not 0 <= share <= 1:
        raise UsageError(f"{option} {share}: must lie between 0 and 1", hint="it is a share")


def check_length(epochs: float, steps: int | None, save_steps: int | None) -> None:
    """`UsageError` for a run that has no steps."""
    for option, number in (("--steps", steps), ("--save-steps", save_steps)):
        at_least(option, number, 1)
    check_positive("--epochs", epochs)


def check_distillation(weight: float, temperature: float) -> None:
    """`UsageError` for a share or temperature that cannot be meant."""
    check_positive("--temperature", temperature)
    check_share("--distill-weight", weight)


def check_positive(option: str, value: float | None) -> None:
    """`UsageError` for zero, less, infinity and NaN."""
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"{option} {value}: must be above 0", hint=f"choose a positive {option}")


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
        check_positive(option, rate)
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

"""Options of the planner: the budget, what may be chosen under it, and the text that decides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpocli.cli import task_options as task_
from mpocli.cli.options import at_least, one_of, parse_bytes, share_of
from mpocli.errors import InputError, UsageError
from mpocli.modes import Condition, excludes, needs

if TYPE_CHECKING:
    from mpocli.methods.budget import Budget
    from mpocli.methods.task_data import DataOptions

PLAN = "Planned to a budget"
_WORD = re.compile(r"[A-Za-z0-9_-]+")


def _names_rows(calibrate: Any) -> bool:
    """Whether `--calibrate` is the name of a task, which stands for the hub's rows of it."""
    return named_task(calibrate, None)[1] not in (None, "lm")


BUDGETS = ("--ratio", "--max-bytes", "--max-error")
_ONE = "a plan has one budget"
BUDGETED = needs(*BUDGETS, why="there is no budget to plan for")
CALIBRATED = needs("--calibrate", why="it is about a text")
_HUB_ROWS = Condition("--calibrate", test=_names_rows, example="--calibrate sst2")
OF_ROWS = needs(task_.ROWS_OF_TASK, _HUB_ROWS, why="windows of a text take --seq-len")

Ratio = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        metavar="X",
        parser=share_of("--ratio"),
        help="Keep this part of the selected matrices' parameters, as 0.5 or 50%.",
        rich_help_panel=PLAN,
    ),
    excludes("--max-bytes", "--max-error", why=_ONE),
]
MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="SIZE", help="Of all weight files written, as 300MB.", rich_help_panel=PLAN),
    excludes("--ratio", "--max-error", why=_ONE),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        parser=share_of("--max-error"),
        metavar="X",
        help="Largest relative error of any matrix, in what it puts out where --calibrate says what goes in.",
        rich_help_panel=PLAN,
    ),
    excludes("--ratio", "--max-bytes", why=_ONE),
]
Shapes = Annotated[
    str,
    typer.Option(
        "--shapes",
        metavar="auto|svd|paper",
        help="Every shape for every matrix, the truncated SVD, or the papers' with --sites.",
        rich_help_panel=PLAN,
    ),
    BUDGETED,
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        "--calibrate",
        metavar="DATA",
        help="Text, rows of a --task, or a task by its name (the hub's rows), to judge errors by.",
        rich_help_panel=PLAN,
    ),
    BUDGETED,
]
Samples = Annotated[
    int,
    typer.Option("--samples", metavar="N", help="Windows or rows of it.", rich_help_panel=PLAN),
    CALIBRATED,
]
SeqLen = Annotated[
    int,
    typer.Option("--seq-len", metavar="N", help="Tokens per window.", rich_help_panel=PLAN),
    CALIBRATED,
    excludes(task_.ROWS_OF_TASK, _HUB_ROWS, why="rows are cut by --max-length"),
]
Sweeps = Annotated[
    int,
    typer.Option("--sweeps", metavar="N", help="Of weighted least squares, at most.", rich_help_panel=PLAN),
    BUDGETED,
    excludes("--shapes svd", why="SVDs have a closed form"),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="fisher|input",
        help="Judge errors by what they do to the loss, or to each matrix's outputs.",
        rich_help_panel=PLAN,
    ),
    CALIBRATED,
    excludes("--max-error", why="the bound is on what each matrix puts out"),
]
Allocation = Annotated[
    str,
    typer.Option(
        "--allocation",
        metavar="global|uniform",
        help="One budget for all matrices, or the same ratio for each.",
        rich_help_panel=PLAN,
    ),
    BUDGETED,
    needs("--ratio", of=("uniform",), why="it gives every matrix the same ratio"),
]
Sequential = Annotated[
    bool,
    typer.Option(
        "--sequential", help="Fit each block to the inputs that the compressed ones make.", rich_help_panel=PLAN
    ),
    CALIBRATED,
    excludes("--max-error", why="the bound is on errors for the dense model's inputs"),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare", help="Measure plain SVD, whitened SVD and plain MPO of the same size too.", rich_help_panel=PLAN
    ),
    CALIBRATED,
]
Sensitivity = Annotated[
    str | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="Measure what truncating each matrix alone does to the loss; kept in FILE, and read from it.",
        rich_help_panel=PLAN,
    ),
    CALIBRATED,
    excludes("--max-error", why="one bound holds for all"),
]


def parse(
    *,
    ratio: float | None,
    max_bytes: str | None,
    max_error: float | None,
    shapes: str,
    allocation: str,
    weights: str,
    sweeps: int,
    sequential: bool,
    compare: bool,
    sensitivity: str | None,
    calibrate: str | None,
    samples: int,
    seq_len: int,
    data: DataOptions | None,
) -> Budget | None:
    """The budget, None where no option asks for one; `UsageError` for values that cannot be meant."""
    at_least("--sweeps", sweeps, 0)
    at_least("--samples", samples, 1)
    at_least("--seq-len", seq_len, 2)
    one_of("--shapes", shapes, ("auto", "svd", "paper"))
    one_of("--allocation", allocation, ("global", "uniform"))
    one_of("--weights", weights, ("fisher", "input"))
    size = None if max_bytes is None else parse_bytes(max_bytes, "--max-bytes")
    if ratio is None and size is None and max_error is None:
        return None
    if calibrate is not None:
        from mpocli.train.data import check_source

        check_source(calibrate)  # before anything slow

    if sensitivity is not None and not Path(sensitivity).absolute().parent.is_dir():
        raise InputError(
            f"--sensitivity {sensitivity}: its folder does not exist", hint="make it, or name another file"
        )

    from mpocli.methods.budget import Budget
    from mpocli.methods.calibration_data import Calibration

    return Budget(
        ratio=ratio,
        max_bytes=size,
        max_error=max_error,
        shapes=shapes,  # type: ignore[arg-type]
        allocation=allocation,  # type: ignore[arg-type]
        weights=weights,  # type: ignore[arg-type]
        sweeps=sweeps,
        sequential=sequential,
        compare=compare,
        sensitivity=sensitivity,
        calibration=None if calibrate is None else Calibration(calibrate, samples, seq_len),
        data=data,
    )


def named_task(calibrate: str | None, task: str | None) -> tuple[str | None, str | None]:
    """(source, task): where a task's name stands for a text, the hub's rows of it; else what was given."""
    from mpocli.train.tasks import task_named

    if calibrate is None or not _WORD.fullmatch(calibrate):
        return calibrate, task
    try:
        found = task_named(calibrate)
    except UsageError:
        return calibrate, task
    if task is not None and task_named(task) != found:
        return calibrate, task
    if not found.hub:
        raise UsageError(
            f"--calibrate {calibrate}: the hub has no rows of this task", hint=f"--task {found.name} --calibrate FILE"
        )
    return found.hub, found.name


def data(
    task: str | None,
    text_column: list[str] | None,
    label_column: str | None,
    max_length: int,
    tokenizer: str | None,
    seed: int,
) -> DataOptions | None:
    """How rows or text become tokens, None where nothing says."""
    if task is None and tokenizer is None and not text_column:
        return None
    return task_.data_options(
        task or "lm",
        text_column=text_column,
        label_column=label_column,
        max_length=max_length,
        tokenizer=tokenizer,
        seed=seed,
    )

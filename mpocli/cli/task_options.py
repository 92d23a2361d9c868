"""Options of the commands that work on a task's data, and how they become one object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpocli.cli.options import at_least, one_of
from mpocli.errors import UsageError
from mpocli.modes import ALWAYS, Condition, needs

if TYPE_CHECKING:
    from mpocli.methods.task_data import DataOptions

DATA = "Data"
FILES = "tsv, csv, jsonl, parquet or txt file, or a hub data set as NAME[:CONFIG[:SPLIT]]"


def _kind(task: Any) -> str | None:
    from mpocli.train.tasks import task_named

    return None if task is None else task_named(str(task)).kind


# Rows with labels, not one text.
ROWS_OF_TASK = Condition("--task", test=lambda task: _kind(task) not in (None, "lm"), example="--task sst2")
_NOT_ONE_TEXT = Condition("--task", test=lambda task: _kind(task) != "lm")
LABELLED = needs(_NOT_ONE_TEXT, why="a text has no labels", hint="leave it out")
ROWS = needs(_NOT_ONE_TEXT, why="it reads one text", hint="cut the file, or use --steps")
WRITTEN = needs(
    Condition("--task", test=lambda task: _kind(task) in (None, "text2text"), example="--task e2e"),
    why="no text is written",
)

TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        rich_help_panel=DATA,
        help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, boolq, lm, e2e; or classification, regression, "
        "text2text with --text-column and --label-column.",
    ),
    ALWAYS,
]
Train = Annotated[
    str | None, typer.Option("--train", metavar="DATA", help=f"To train on: {FILES}.", rich_help_panel=DATA), ALWAYS
]
Eval = Annotated[
    list[str] | None,
    typer.Option("--eval", metavar="DATA", help="To evaluate on. Twice for MNLI: m, mm.", rich_help_panel=DATA),
    ALWAYS,
]
Test = Annotated[
    str | None, typer.Option("--test", metavar="DATA", help="Read once, at the very end.", rich_help_panel=DATA), ALWAYS
]
TextColumn = Annotated[
    list[str] | None,
    typer.Option("--text-column", metavar="NAME", help="Of the text; twice for pairs.", rich_help_panel=DATA),
    ALWAYS,
]
LabelColumn = Annotated[
    str | None,
    typer.Option("--label-column", metavar="NAME", help="Of the label or target.", rich_help_panel=DATA),
    LABELLED,
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="Train on N random rows, the same for all seeds.", rich_help_panel=DATA),
    ROWS,
]
MaxLength = Annotated[
    int,
    typer.Option("--max-length", metavar="N", help="Tokens per example, or per window.", rich_help_panel=DATA),
    ALWAYS,
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="MODEL", help="Where the checkpoint has none.", rich_help_panel=DATA),
    ALWAYS,
]
EvalBatch = Annotated[
    int, typer.Option("--eval-batch-size", metavar="N", help="Examples per batch in evaluation.", rich_help_panel=DATA)
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="Of a text that is written.", rich_help_panel=DATA), WRITTEN
]
Precision = Annotated[
    str, typer.Option("--precision", metavar="NAME", help="fp32, bf16 or auto: bf16 on a GPU that has it."), ALWAYS
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:0 or auto."), ALWAYS]


def precision_of(name: str, device: str) -> str:
    """`fp32` or `bf16`; auto by the device."""
    one_of("--precision", name, ("auto", "fp32", "bf16"))
    if name != "auto":
        return name
    import torch

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"


def data_options(
    task: str | None,
    *,
    train: str | None = None,
    evaluate: list[str] | None = None,
    test: str | None = None,
    text_column: list[str] | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    max_length: int = 128,
    eval_batch_size: int = 32,
    batch_option: str = "--eval-batch-size",
    precision: str = "fp32",
    max_new_tokens: int = 96,
    tokenizer: str | None = None,
    seed: int = 0,
) -> DataOptions:
    """The object that the methods take; `UsageError` for values that cannot be meant."""
    if task is None:
        raise UsageError("--task is missing", hint="--task sst2, for example; see --help for the names")
    at_least("--max-length", max_length, 2)
    at_least("--limit", limit, 1)
    at_least(batch_option, eval_batch_size, 1)
    at_least("--max-new-tokens", max_new_tokens, 1)

    from mpocli.train.data import check_source
    from mpocli.train.tasks import task_named

    found = task_named(task)
    for source in (train, *(evaluate or ()), test):
        if source is not None:
            check_source(source)  # before anything slow
    if found.needs_columns and not text_column:
        raise UsageError(f"--task {task} needs --text-column", hint="name the column of the text, and --label-column")
    if found.needs_columns and label_column is None:
        raise UsageError(f"--task {task} needs --label-column", hint="name the column of the labels")

    from mpocli.methods.task_data import DataOptions

    return DataOptions(
        task=found.name,
        train=train,
        eval=tuple(evaluate or ()),
        test=test,
        text_columns=tuple(text_column or ()),
        label_column=label_column,
        limit=limit,
        max_length=max_length,
        eval_batch_size=eval_batch_size,
        precision=precision,
        max_new_tokens=max_new_tokens,
        tokenizer=tokenizer,
        seed=seed,
    )

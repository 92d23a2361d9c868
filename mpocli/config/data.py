"""What to train and evaluate on, and how it becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mpocli.config.bounds import at_least
from mpocli.config.modes import ALWAYS, Condition, needs
from mpocli.config.option import Option
from mpocli.config.page import DATA
from mpocli.config.tasks import task_named
from mpocli.errors import UsageError

Precision = Literal["auto", "fp32", "bf16"]
FILES = "tsv, csv, jsonl, parquet or txt file, or a hub data set as NAME[:CONFIG[:SPLIT]]"


def _kind(task: Any) -> str | None:
    return None if task is None else task_named(str(task)).kind


# Rows with labels, not one text.
ROWS_OF_TASK = Condition("--task", test=lambda task: _kind(task) not in (None, "lm"), example="--task sst2")
_NOT_ONE_TEXT = Condition("--task", test=lambda task: _kind(task) != "lm")
_LABELLED = needs(_NOT_ONE_TEXT, why="a text has no labels", hint="leave it out")
_ROWS = needs(_NOT_ONE_TEXT, why="it reads one text", hint="cut the file, or use --steps")
_WRITTEN = needs(
    Condition("--task", test=lambda task: _kind(task) in (None, "text2text"), example="--task e2e"),
    why="no text is written",
)

_TASK = Option(
    "--task",
    "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, boolq, lm, e2e; or classification, regression, text2text with "
    "--text-column and --label-column.",
    "TASK",
    DATA,
)
TaskName = Annotated[str | None, _TASK, ALWAYS]
Evaluated = Annotated[
    tuple[str, ...],
    Option("--eval", "To evaluate on. Twice for MNLI: m, mm.", "DATA", DATA, several=True, reads=True),
    ALWAYS,
]
TextColumns = Annotated[
    tuple[str, ...], Option("--text-column", "Of the text; twice for pairs.", "NAME", DATA, several=True), ALWAYS
]
LabelColumn = Annotated[str | None, Option("--label-column", "Of the label or target.", "NAME", DATA), _LABELLED]
NewTokens = Annotated[
    int, Option("--max-new-tokens", "Of a text that is written.", "N", DATA, check=at_least(1)), _WRITTEN
]
Tokenizer = Annotated[
    str | None, Option("--tokenizer", "Where the checkpoint has none.", "MODEL", DATA, reads=True), ALWAYS
]
PrecisionName = Annotated[
    Precision,
    Option("--precision", "fp32, bf16 or auto: bf16 on a GPU that has it.", "NAME", default="auto"),
    ALWAYS,
]


@dataclass(frozen=True)
class DataOptions:
    """What to train and evaluate on, and how it becomes tokens. `seed` draws the rows of `limit`."""

    task: Annotated[str, _TASK, ALWAYS]
    train: Annotated[str | None, Option("--train", f"To train on: {FILES}.", "DATA", DATA, reads=True), ALWAYS] = None
    eval: Evaluated = ()
    test: Annotated[str | None, Option("--test", "Read once, at the very end.", "DATA", DATA, reads=True), ALWAYS] = (
        None
    )
    text_columns: TextColumns = ()
    label_column: LabelColumn = None
    limit: Annotated[
        int | None,
        Option("--limit", "Train on N random rows, the same for all seeds.", "N", DATA, check=at_least(1)),
        _ROWS,
    ] = None
    max_length: Annotated[
        int, Option("--max-length", "Tokens per example, or per window.", "N", DATA, check=at_least(2)), ALWAYS
    ] = 128
    eval_batch_size: Annotated[
        int,
        Option(
            "--eval-batch-size",
            "Examples per batch in evaluation.",
            "N",
            DATA,
            check=at_least(1),
            default=64,
            recorded=False,
        ),
        ALWAYS,
    ] = 32
    precision: Precision = "fp32"
    max_new_tokens: NewTokens = 96
    tokenizer: Tokenizer = None
    seed: int = 0

    @classmethod
    def from_options(cls, task: str | None, **given: Any) -> DataOptions | None:
        """None where nothing is said of data; without a task but with a tokenizer or columns its name is empty.

        Raises `UsageError` for a task that is none, or that needs to be told its columns.
        """
        if task is None:
            return cls("", **given) if given.get("tokenizer") or given.get("text_columns") else None
        found = task_named(task)
        if found.needs_columns and not given.get("text_columns"):
            raise UsageError(
                f"--task {task} needs --text-column", hint="name the column of the text, and --label-column"
            )
        if found.needs_columns and given.get("label_column") is None:
            raise UsageError(f"--task {task} needs --label-column", hint="name the column of the labels")
        return cls(found.name, **given)

    def files(self) -> list[str | None]:
        """As they were named, so that a resumed run is not given others of the same names."""
        return [self.train, *self.eval, self.test, self.tokenizer]


def required(data: DataOptions | None) -> DataOptions:
    """`UsageError` where no task is named."""
    if data is None or not data.task:
        raise UsageError("--task is missing", hint="--task sst2, for example; see --help for the names")
    return data
